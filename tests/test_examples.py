"""The programs in docs/examples run, and do what their first lines say."""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from alexprep.pipeline import Augmentation, Loader
from alexprep.shards.conversion import convert
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.rgb_statistics import pca_stats, publish_statistics

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SMALL = ["--crop", "48"]
SECONDS = 600  # no limit may depend on the machine's speed

Script = Callable[..., str]


def _module(name: str) -> ModuleType:
    """An example as a module, without its main program."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs an example as a program would be, in this process: importing torch again takes longer than most examples."""

    def run(name: str, *words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def _place(state: dict[str, int]) -> tuple[int, int]:
    return state["epoch"], state["step"]


def _process(*words: str | Path) -> None:
    """Runs Python in a process of its own; one that hangs is asked to end, so that it can end its own children."""
    command = [sys.executable, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=SECONDS - 20)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    assert process.returncode == 0, output


def test_every_example_is_run_here_and_says_how() -> None:
    tests = Path(__file__).read_text() + (Path(__file__).parent / "ecosystem/test_ray_train.py").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in tests, path
        assert f"docs/examples/{path.name} alexprep-data" in path.read_text(), path


def test_readers(script: Script, data: Path) -> None:
    """Those that need no other library; tests/ecosystem has the others, and these on shards with metadata."""
    for name in ("torch_dataloader", "dali_iterator"):
        assert script(f"readers/{name}", data) == "48 samples in 3 batches\n"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves tars to be closed whenever that is
        assert script("readers/webdataset_alone", data) == "48 samples in 3 batches\n"
        gc.collect()
    ecosystem = (EXAMPLES.parents[1] / "tests/ecosystem/test_readers.py").read_text()
    for path in (EXAMPLES / "readers").glob("*.py"):
        lines = path.read_text().splitlines()
        assert f'"{path.stem}"' in ecosystem and len(lines) <= 25, path
        assert f"docs/examples/readers/{path.name} alexprep-data" in lines[0], path


def test_torch_loop_resumes_to_the_same_weights(script: Script, data: Path, tmp_path: Path) -> None:
    """Stopped in the second epoch, one step after its last checkpoint; five steps an epoch."""
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    words = [data, *SMALL, "--batch-size", "10"]
    script("torch_loop", *words, "--checkpoint", whole)
    script("torch_loop", *words, "--checkpoint", parts, "--stop-after", "7")
    assert _place(torch.load(parts)["loader"]) == (1, 1)
    script("torch_loop", *words, "--checkpoint", parts, "--resume")
    expected, got = torch.load(whole), torch.load(parts)
    assert got["loader"] == expected["loader"] and _place(got["loader"]) == (2, 0)
    torch.testing.assert_close(got["model"], expected["model"], rtol=0, atol=0)
    torch.testing.assert_close(got["optimizer"], expected["optimizer"], rtol=0, atol=0)


def test_two_ranks_train_as_one_process(data: Path, tmp_path: Path) -> None:
    """48 samples in batches of 47: parts of 23 and 24, then of 0 and 1."""
    weights = tmp_path / "weights.pt"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _process(*torchrun, EXAMPLES / "ddp.py", data, *SMALL, "--batch-size", "47", "--weights", weights)

    module = _module("ddp")
    with Loader(data, batch_size=47, augmentation=Augmentation(crop=48)) as loader:
        start = module.network(len(loader.classes)).state_dict()
        model = module.network(len(loader.classes))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        while loader.epoch < module.EPOCHS:
            for images, labels, _ in loader:
                optimizer.zero_grad()
                functional.cross_entropy(model(images / 64), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    got = torch.load(weights)
    torch.testing.assert_close(got, model.state_dict(), rtol=0, atol=1e-5)
    assert any((got[name] - start[name]).abs().max() > 1e-3 for name in got)


def test_lightning_resumes_to_the_same_weights(data: Path, tmp_path: Path) -> None:
    """From the middle of the first epoch and of the second; five steps an epoch."""
    words = ["lightning_module", str(data), *SMALL, "--batch-size", "10", "--save-every", "3", "--checkpoints"]
    whole = str(tmp_path / "whole")
    runs = [[*words, whole]]
    runs += [[*words, str(tmp_path / f"from-{step}"), "--resume", f"{whole}/step={step}.ckpt"] for step in (3, 6)]
    program = "import runpy, sys\nfor sys.argv in {}: runpy.run_path({!r}, run_name='__main__')"
    _process("-c", program.format(runs, str(EXAMPLES / "lightning_module.py")))
    expected = torch.load(f"{whole}/last.ckpt")
    assert expected["global_step"] == 10
    for step, left in ((3, ["last", "step=6", "step=9"]), (6, ["last", "step=9"])):
        folder = tmp_path / f"from-{step}"
        assert sorted(path.stem for path in folder.iterdir()) == left
        got = torch.load(folder / "last.ckpt")
        assert got["loops"]["fit_loop"]["state_dict"] == expected["loops"]["fit_loop"]["state_dict"]
        assert got["global_step"] == 10
        torch.testing.assert_close(got["state_dict"], expected["state_dict"], rtol=0, atol=0)


def test_own_pipeline(script: Script, data: Path) -> None:
    output = script("own_pipeline", data, *SMALL, "--batch-size", "10")
    assert output.startswith("48 samples, batches (10, 3, 48, 48), 4 classes, mean "), output


def test_features(script: Script, data: Path) -> None:
    output = script("features", data, *SMALL)
    found = re.fullmatch(r"20 val images, 1024 features, accuracy (0\.\d\d|1\.00)\n", output)
    assert found, output
    vectors, labels = _module("features").features(torch.nn.Flatten(), data, "val", 48)
    assert vectors.shape == (20, 3 * 48 * 48) and sorted(labels) == [n // 5 for n in range(20)]


def test_torchdata_nodes(script: Script, data: Path) -> None:
    assert script("torchdata_nodes", data, *SMALL, "--batch-size", "10").startswith("3 batches left, the same")


def test_torchdata_resumes_from_any_step(data: Path) -> None:
    """With three batches and two threads ahead; the state goes through JSON."""
    graph = _module("torchdata_nodes").graph

    def fresh() -> Loader:
        return Loader(data, batch_size=10, augmentation=Augmentation(crop=48), threads=1)

    with fresh() as loader:
        nodes = graph(loader)
        states, images = [json.dumps(nodes.state_dict())], []
        for batch in (batch for _ in range(2) for batch in nodes):
            images.append(batch.images)
            states.append(json.dumps(nodes.state_dict()))
    assert len(images) == 10
    for n, state in enumerate(states[:-1]):
        with fresh() as loader:
            nodes = graph(loader)
            nodes.load_state_dict(json.loads(state))
            rest = [batch.images for _ in range(2 if n < 5 else 1) for batch in nodes]
        assert len(rest) == 10 - n and all(map(torch.equal, rest, images[n:]))


def test_torch_s_distributed_checkpoint_takes_a_loader(data: Path, tmp_path: Path) -> None:
    # Here, since they take a second, and other tests do without.
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.checkpoint.stateful import Stateful

    def fresh() -> Loader:
        return Loader(data, batch_size=10, augmentation=Augmentation(crop=48))

    with fresh() as loader, fresh() as other, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is no process group
        for _ in zip(range(3), loader, strict=False):
            pass
        save({"loader": loader}, checkpoint_id=tmp_path / "saved")
        load({"loader": other}, checkpoint_id=tmp_path / "saved")
        assert other.state_dict() == loader.state_dict() and _place(other.state_dict()) == (0, 3)
        assert isinstance(loader, Stateful)


def test_multi_label(script: Script, photos: Path, tmp_path: Path) -> None:
    """Which tags a picture has is seen in it: its class, and whether its number is odd, which is chance."""
    folder = Path(shutil.copytree(photos / "train", tmp_path / "photos"))
    for path in folder.glob("*/*.JPEG"):
        tags = [path.parent.name, *(["odd"] if int(path.stem) % 2 else [])]
        path.with_suffix(".json").write_text(json.dumps({"tags": tags}))
    convert(folder, tmp_path / "data", ShardOptions(Target(size=64)), 1)
    publish_statistics(pca_stats(tmp_path / "data", "train", 1), tmp_path / "data", "train")
    output = script("multi_label", tmp_path / "data", *SMALL, "--epochs", "8")
    found = re.fullmatch(r"48 samples, 5 tags: loss (\S+), then (\S+)\n", output)
    assert found and float(found[2]) < 0.9 * float(found[1]), output
