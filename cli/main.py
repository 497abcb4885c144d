"""The command line's root, and the one place where the library's errors become words."""

from __future__ import annotations

import contextlib
import io
import os
import sys

import click

from alexprep.cli.ablate import ablate
from alexprep.cli.bench import bench
from alexprep.cli.check_grads import check_grads
from alexprep.cli.demo import demo
from alexprep.cli.evaluate import evaluate
from alexprep.cli.export import export
from alexprep.cli.features import features
from alexprep.cli.inspect_source import inspect_command
from alexprep.cli.options import INTERRUPTED
from alexprep.cli.pca_stats import pca_stats
from alexprep.cli.predict import predict
from alexprep.cli.push import push
from alexprep.cli.recipes import recipes
from alexprep.cli.report import report
from alexprep.cli.shard import shard
from alexprep.cli.similar import similar
from alexprep.cli.train import train
from alexprep.cli.tune import tune
from alexprep.cli.verify import verify
from alexprep.shards.errors import TRACEBACK, AlexprepError, command_line_words
from alexprep.shards.thread_waiting import choose_waiting

LOAD_TORCH = ("train", "ablate", "eval", "bench", "demo", "check-grads")  # and compute with it for long
COMPUTE_LITTLE = ("inspect", "shard", "verify", "pca-stats", "recipes")  # with numpy's matrix products, in this process
_SHARDS = "Interrupted. Finished work is kept: run the same command again to go on."
# What an interrupted command leaves. A training that is under way is not interrupted by the first Ctrl-C: it saves and ends.
LEAVES = {
    "shard": _SHARDS,
    "pca-stats": _SHARDS,
    "features": _SHARDS,
    "push": "Interrupted. What was sent is kept: run the same command again to go on.",
    "ablate": "Interrupted. What was trained is kept: run the same command again to go on.",
    "train": "Interrupted. Checkpoints that were saved are kept: if the run has one, the same command with --resume goes on from it.",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="alexprep")
def cli() -> None:
    """Raw ImageNet in, trained AlexNet out.

    \b
    alexprep inspect /imagenet  what it holds, and what shard would make of it
    alexprep shard /imagenet    resized webdataset shards in ./alexprep-data
    alexprep verify             every byte of them checked
    alexprep pca-stats          the mean image and the RGB covariance's eigenpairs
    alexprep tune               how this machine loads fastest; train uses it
    alexprep train              DALI pipelines and a torch training loop; results in ./runs
    """


COMMANDS = (
    inspect_command,
    shard,
    verify,
    push,
    pca_stats,
    tune,
    recipes,
    train,
    ablate,
    check_grads,
    evaluate,
    predict,
    export,
    features,
    similar,
    report,
    bench,
    demo,
)
for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Runs the command line: an error is a line on stderr and exit status 1, a question 2; never a traceback."""
    with command_line_words():
        _main()


def _main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a letter that the terminal lacks costs no result
    command = next(iter(sys.argv[1:]), "")
    if command in LOAD_TORCH:
        choose_waiting()
    if command in COMPUTE_LITTLE:
        # Its threads take 25 ms of every process's start, and each worker computes with one anyway.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        status = cli.main(standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        status = _interrupted()
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except Exception as error:
        if _began_with_interrupt(error):
            status = _interrupted()
        elif isinstance(error, AlexprepError):
            _failed(f"Error: {error}")
            status = error.exit_status
        elif isinstance(error, OSError):
            where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            status = _failed(f"Error: {where}{error.strerror or error}")
        elif os.environ.get(TRACEBACK):
            raise
        else:
            words = f"{type(error).__name__}: {error}".splitlines()[0]
            status = _failed(f"Error: {words}\nThis may be a bug in alexprep; {TRACEBACK}=1 shows where it happened.")
    sys.exit(status if isinstance(status, int) else 0)


def _began_with_interrupt(error: BaseException) -> bool:
    """Whether an error is what became of a Ctrl-C: a library in C that is being imported turns it into an ImportError."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        reason = waiting.pop()
        if isinstance(reason, KeyboardInterrupt):
            return True
        if reason is not None and id(reason) not in seen:  # a cause is mostly the context too
            seen.add(id(reason))
            waiting += reason.__cause__, reason.__context__
    return False


def _interrupted() -> int:
    command = next(iter(sys.argv[1:]), "")
    _failed(LEAVES.get(command, "Interrupted before there was a result: run the same command again."))
    return INTERRUPTED


def _failed(words: str) -> int:
    """Says why, where anybody can still hear it."""
    with contextlib.suppress(OSError):
        click.echo(words, err=True)
    return 1
