# make demo | make test | make check: each sets itself up in .venv; Python >= 3.10 and make are all that is needed.
PYTHON ?= python3
BIN := .venv/bin
PACKAGES := shards pipeline train cli
# As many processes as there are cores, four at most: many tests start processes of their own.
TEST := $(BIN)/pytest -q -n auto --maxprocesses 4 --dist worksteal
# Of tests/stress, what pytest runs: it does not look there by itself.
LONG_TESTS = $(shell grep -l '^def test_' tests/stress/*.py)

.DEFAULT_GOAL := help
.PHONY: help demo test check ecosystem stress format wheel-check gpu-check clean

help:
	@echo "make demo    shards, statistics, training and evaluation on a small set made on the spot"
	@echo "make test    the test suite"
	@echo "make check   format, lint, types, tests"
	@echo "make ecosystem  our shards and networks in other libraries: a torch of its own, 8 GB where that is one for CUDA"
	@echo "make stress  long campaigns of faults; SECONDS=600 for a part of each in that time"

# The stamp is newer than what it was made from, so an edited dependency list or C source reinstalls.
.venv/installed: pyproject.toml setup.cfg constraints.txt $(wildcard */compiled/*.c */*/compiled/*.c)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "alexprep needs Python >= 3.10; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev
	touch $@

# Links that give type checkers the import names.
build/types: Makefile
	mkdir -p build/types/alexprep
	for p in $(PACKAGES); do ln -sfn ../../../$$p build/types/alexprep/$$p; done
	touch $@

demo: .venv/installed
	$(BIN)/alexprep demo

test: .venv/installed
	$(TEST)

check: .venv/installed build/types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TEST)

# torchvision fits one torch alone, which is not the one that the rest is tested with.
build/ecosystem-env/installed: pyproject.toml setup.cfg constraints.txt tests/ecosystem/constraints.txt
	$(PYTHON) -m venv build/ecosystem-env
	build/ecosystem-env/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	grep -v '^torch==' constraints.txt | cat - tests/ecosystem/constraints.txt > build/ecosystem-constraints.txt
	build/ecosystem-env/bin/python -m pip install --quiet -c build/ecosystem-constraints.txt -e . --group dev --group ecosystem
	touch $@

ecosystem: build/ecosystem-env/installed
	build/ecosystem-env/bin/pytest -q tests/ecosystem

# Hours; SECONDS=600 makes it about ten minutes. `make test` tries a seeded sample of the same.
stress: .venv/installed
	$(if $(SECONDS),,$(TEST) --whole)
	$(if $(SECONDS),,$(TEST) $(LONG_TESTS))
	$(BIN)/python -m tests.stress $(if $(SECONDS),--seconds $(SECONDS))

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The built wheel, in an environment of its own, run from another directory.
wheel-check: .venv/installed
	rm -rf build/wheel build/wheel-env build/lib build/bdist.*
	$(BIN)/python -m build --quiet --wheel --outdir build/wheel
	$(PYTHON) -m venv build/wheel-env
	build/wheel-env/bin/python -m pip install --quiet -c constraints.txt build/wheel/*.whl
	cd / && "$(CURDIR)/build/wheel-env/bin/alexprep" --help
	cd / && "$(CURDIR)/build/wheel-env/bin/python" -c 'import alexprep.shards, alexprep.pipeline, alexprep.train, alexprep.cli'
	mkdir -p build/elsewhere && cd build/elsewhere && ../wheel-env/bin/alexprep demo

# What benchmarks/gpu.py does on a GPU, in small and without one, so that its first call on one does not fail by a slip.
gpu-check: .venv/installed
	[ -d demo/photos ] || $(BIN)/alexprep demo
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gpu.py demo/photos/train --device cpu --small --inputs 200 --batch-sizes 8 \
		--only data,tests,loader,step,profile,overlap,codec,tune --out build/gpu/gpu.json

clean:
	rm -rf .venv build demo
