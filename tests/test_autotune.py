"""`alexprep tune`: the search on a made-up machine, the file that keeps what it found, the command, and what `alexprep train` makes of it."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from alexprep.cli.tune import tune as tune_command
from alexprep.pipeline import loader_settings
from alexprep.pipeline.autotune import ROUNDS, Found, dimensions, search, tune
from alexprep.pipeline.loader_settings import Tuning, save_tuning, saved_tuning, this_machine, tuning_for
from alexprep.shards import storage
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.verification import verify
from alexprep.train.config import TrainConfig, prepare
from alexprep.train.trainer import train

CPU = Tuning(threads=8)
CUDA = Tuning(threads=8, decode="cuda")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "alexprep"


@pytest.fixture
def mine(data: Path, tmp_path: Path) -> Path:
    """A copy of the data set that may be changed."""
    return Path(shutil.copytree(data, tmp_path / "mine"))


@dataclass
class Machine:
    """A machine made up: it measures without doing anything, and its clock shows what that would have taken."""

    speed: Callable[[Tuning, int], float]  # images/s
    least_seconds: float = 0.1  # that a turn takes, however few it is given
    drift: Callable[[float], float] = lambda seconds: 1.0  # of all speeds, by the time
    noise: tuple[float, ...] = (1.0,)  # of the speeds that one setting shows, one after the other
    now: float = 0.0
    asked: list[tuple[Tuning, int]] = field(default_factory=list)

    def __call__(self, tuning: Tuning, batch_size: int, seconds: float) -> float:
        noise = self.noise[self.asked.count((tuning, batch_size)) % len(self.noise)]
        self.asked.append((tuning, batch_size))
        self.now += max(seconds, self.least_seconds)
        return self.speed(tuning, batch_size) * noise * self.drift(self.now)

    def searched(self, start: Tuning = CPU, batch_sizes: tuple[int, ...] = (128,), seconds: float = 60.0) -> Found:
        device = "cuda" if start.decode else "cpu"
        return search(self, dimensions(device, 8), batch_sizes, seconds, start, clock=lambda: self.now)


def hill(tuning: Tuning, batch_size: int) -> float:
    """Best with 4 threads and 4 steps ahead."""
    return 1000.0 - 100 * abs(tuning.dali_threads - 4) + 100 * tuning.prefetch


@pytest.mark.parametrize("drift", [lambda now: 1.0, lambda now: 1 - now / 100, lambda now: 1 + now / 30])
def test_the_search_measures_in_turns(drift: Callable[[float], float]) -> None:
    """So that a drifting machine changes no choice."""
    machine = Machine(hill, drift=drift)
    found = machine.searched()
    assert found.settings.threads == 4
    if drift(1.0) == 1.0:
        assert (found.settings, found.rate, found.default_rate, found.notes) == (Tuning(4, 4), 1400.0, 800.0, [])
    rounds = {(trial.compared, trial.value): len(trial.rounds) for trial in found.trials}
    values = {
        "threads": ("1", "2", "4", "8"),
        "prefetch": ("1", "2", "4"),
        "batch size": ("128, default", "128, chosen"),
    }
    assert rounds == {(compared, value): ROUNDS for compared in values for value in values[compared]}
    assert [settings.threads for settings, _ in machine.asked[1:13]] == [1, 2, 4, 8, 8, 4, 2, 1, 1, 2, 4, 8]


FOURTH_STEP = (lambda tuning, size: 1000.0 + 80 * (tuning.prefetch == 4), lambda tuning, size: 1000.0)
BUSY_NOTE = "rounds of the same settings differ by 50 %: try again when the machine is less busy"


@pytest.mark.parametrize(
    ("speed", "noise", "chosen", "notes"),
    [
        (lambda tuning, size: 100.0 * min(tuning.dali_threads, 4), (1.0,), Tuning(4, 1), []),  # the cheaper wins a tie
        # 8 % are no difference where rounds differ by 12 %, and one where they agree.
        (FOURTH_STEP[0], (1.0, 1.06, 0.94, 1.0), Tuning(1, 1), []),
        (FOURTH_STEP[0], (1.0,), Tuning(1, 4), []),
        # Rounds that differ by half must not make half the speed a tie; what is much faster shows all the same.
        (FOURTH_STEP[1], (1.0, 1.3, 0.8), CPU, [BUSY_NOTE]),
        (lambda tuning, size: 100.0 * tuning.dali_threads**0.3, (1.0, 1.3, 0.8), CPU, [BUSY_NOTE]),
        (lambda tuning, size: 1000.0 / tuning.dali_threads, (1.0, 1.3, 0.8), Tuning(1), [BUSY_NOTE]),
    ],
)
def test_what_is_faster_and_what_is_not(speed: Any, noise: tuple[float, ...], chosen: Tuning, notes: list[str]) -> None:
    found = Machine(speed, noise=noise).searched()
    assert (found.settings, found.notes) == (chosen, notes)


@pytest.mark.parametrize("best", [0.0, 0.5, 0.8, 1.0])
def test_the_load_of_the_jpeg_engines(best: float) -> None:
    def speed(tuning: Tuning, size: int) -> float:
        return 3000.0 if tuning.decode == "cpu" else 7000.0 - 4000 * abs(tuning.hw_decoder_load - best)

    found = Machine(speed).searched(CUDA, (128, 256, 512, 1024))
    assert (found.settings.decode, found.settings.hw_decoder_load) == ("cuda", best)
    curve = [trial.value for trial in found.trials if trial.compared == "batch size"]
    assert curve == [f"{size}, {who}" for size in (128, 256, 512, 1024) for who in ("default", "chosen")]
    same = Machine(lambda tuning, size: 1000.0).searched(CUDA).settings
    assert (same.decode, same.hw_decoder_load) == ("cuda", Tuning().hw_decoder_load)  # decoding stays where it was
    slow_gpu = Machine(lambda tuning, size: 2000.0 if tuning.decode == "cpu" else 1000.0).searched(CUDA)
    assert slow_gpu.settings.decode == "cpu"


@pytest.mark.parametrize(("least_seconds", "seconds"), [(0.01, 4.0), (0.3, 4.0), (1.0, 25.0)])
def test_it_ends_in_time(least_seconds: float, seconds: float) -> None:
    machine = Machine(hill, least_seconds)
    found = machine.searched(seconds=seconds)
    assert machine.now <= seconds + least_seconds + 1e-6
    if len(machine.asked) < 28:
        (note,) = found.notes
        assert note.startswith(f"{seconds:g} s were over before {28 - len(machine.asked)} of 27 turns: --seconds ")
        enough = float(note.split("--seconds ")[1].split()[0])
        assert Machine(hill, least_seconds).searched(seconds=enough + 1).settings == Tuning(4, 4)
    else:
        assert found.settings == Tuning(4, 4)
    with pytest.raises(AlexprepError, match=r"--seconds 2 is too short .* first turn took 1.0 s: give at least 27"):
        Machine(hill, least_seconds=1.0).searched(seconds=2)


def test_what_fails_is_told_and_not_chosen() -> None:
    def speed(tuning: Tuning, size: int) -> float:
        if tuning.prefetch == 4 or (tuning == CPU and len(broken.asked) > 1):
            raise RuntimeError("out of memory\n#1 somewhere")
        return hill(tuning, size)

    broken = Machine(hill)  # of which the defaults work
    found = Machine(speed).searched()
    assert found.settings == Tuning(4, 2)
    assert found.notes == ["4 threads, 4 steps ahead failed at batches of 128: out of memory"]
    broken = Machine(speed)  # and here they do once, at the warm-up
    with pytest.raises(AlexprepError, match=r"the default settings do not work: .* failed at batches of 128"):
        broken.searched()


def test_the_default_stays_where_the_choice_is_slower_after_all() -> None:
    machine = Machine(lambda tuning, size: 500.0 if len(machine.asked) > 21 and tuning != CPU else hill(tuning, size))
    found = machine.searched()
    assert found.settings == CPU
    assert found.notes[0] == "side by side the choice is slower than the default, which stays"


def entry(tuning: Tuning, when: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    return {"settings": asdict(tuning), "measured_at": when}


def test_each_machine_has_its_entry(mine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And neither the data set's digest nor `verify` minds the file."""
    digest = read_dataset(mine)["digest"]
    assert saved_tuning(mine, "cpu") == (None, []) and tuning_for(mine) == Tuning()
    names = [this_machine("cpu")]
    assert save_tuning(mine, names[0], entry(Tuning(1, 4))) == (mine / "tuning.json", [])
    monkeypatch.setattr(loader_settings, "cores", lambda: 96)
    assert tuning_for(mine) == Tuning()
    names.append(this_machine("cpu"))
    save_tuning(mine, names[1], entry(Tuning(64, 2)))
    assert tuning_for(str(mine), "cpu") == Tuning(64, 2)
    monkeypatch.setattr(loader_settings, "_gpu_name", lambda device: "NVIDIA H200")
    assert tuning_for(mine, "cuda:1") == Tuning()
    names.append(this_machine("cuda:1"))
    save_tuning(mine, names[2], entry(Tuning(8, 2, "cuda", 0.8)))
    assert tuning_for(mine, "cuda") == Tuning(8, 2, "cuda", 0.8)
    assert names[2].endswith(", 96 cores, NVIDIA H200, cuda")
    assert list(json.loads((mine / "tuning.json").read_bytes())["machines"]) == names
    monkeypatch.undo()
    assert tuning_for(mine) == Tuning(1, 4)
    assert verify(mine, 1).problems == [] and read_dataset(mine)["digest"] == digest


@pytest.mark.parametrize("content", [b"", b"[]", b'{"machines": 3}', b'{"other": {}}', b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_file_is_replaced_with_a_warning(content: bytes, mine: Path, tmp_path: Path) -> None:
    """And stops no training."""
    (mine / "tuning.json").write_bytes(content)
    tuning, (problem,) = saved_tuning(mine, "cpu")
    assert tuning is None and problem.startswith(f"{mine}/tuning.json is damaged (")
    job = prepare(config(mine, tmp_path))
    assert (job.tuning, job.notes) == (Tuning(), [f"{problem}: `alexprep tune` makes it anew"])
    path, (note,) = save_tuning(mine, this_machine("cpu"), entry(Tuning(3)))
    assert path == mine / "tuning.json" and note == f"{problem}: it was replaced"
    assert saved_tuning(mine, "cpu") == (Tuning(3), [])


def test_an_entry_that_makes_no_sense_is_not_used(mine: Path) -> None:
    good = {"threads": 2, "prefetch": 2, "decode": None, "hw_decoder_load": 0.65}
    wrong: dict[str, list[Any]] = {"threads": ["1", 0, 2.0], "prefetch": [True, None]}
    wrong |= {"decode": ["tpu", ["cpu"]], "hw_decoder_load": [2, float("inf")]}
    settings = [good | {name: value} for name, values in wrong.items() for value in values]
    for one in [*({"settings": each} for each in [*settings, None, {"threads": 1}]), [], {}]:
        (mine / "tuning.json").write_text(json.dumps({"machines": {this_machine("cpu"): one}}))
        tuning, (problem,) = saved_tuning(mine, "cpu")
        assert tuning is None and "tuning.json has no usable settings for this machine" in problem
        assert tuning_for(mine) == Tuning()
    (mine / "tuning.json").write_text(json.dumps({"machines": {this_machine("cpu"): {"settings": good}}}))
    assert saved_tuning(mine, "cpu") == (Tuning(2), [])


def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, whom no permission stops."""

    def publish(path: Path, document: Any) -> None:
        if path.is_relative_to(folder):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        storage.publish_json(path, document)

    monkeypatch.setattr("alexprep.pipeline.loader_settings.publish_json", publish)


def test_the_cache_knows_a_read_only_data_set(mine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tuning(mine, this_machine("cpu"), entry(Tuning(1)))
    read_only(mine, monkeypatch)
    path, notes = save_tuning(mine, this_machine("cpu"), entry(Tuning(2), "2999-01-01T00:00:00Z"))
    assert (path, notes) == (cache / "tuning.json", [f"{mine}/tuning.json cannot be written (Read-only file system)"])
    assert tuning_for(mine) == Tuning(2)  # the newer one
    assert tuning_for(mine.parent / "other") == Tuning()
    read_only(mine.parent, monkeypatch)
    assert save_tuning(mine, this_machine("cpu"), entry(Tuning(2)))[0] is None


def run_tune(*arguments: object) -> Result:
    return CliRunner().invoke(tune_command, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("patient_search")
def test_the_command(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves and the choice for people, which training then takes up; where nothing can be written, that is told and no error."""
    options = ("--device", "cpu", "--batch-size", 16, "--seconds", 0.5)
    result = run_tune("--data", mine, *options, "--batch-size", 8)
    assert result.exit_code == 0, (result.output, result.exception)
    told = (f"48 images of 'train' in {mine}", "Threads, batches of 16:", "█", "images/s", "16, default", "8, default")
    assert all(words in result.stdout for words in (*told, "× the default's", f"{mine}/tuning.json"))
    saved, _ = saved_tuning(mine, "cpu")
    assert saved is not None and saved.words("cpu") in result.stdout
    assert prepare(config(mine, tmp_path)).notes == [f"loader settings: {saved.words('cpu')}, from alexprep tune"]
    read_only(tmp_path, monkeypatch)
    result = run_tune("--data", mine, *options)
    assert result.exit_code == 0
    assert f"Note: {mine}/tuning.json cannot be written (Read-only file system)" in result.stderr
    assert "nowhere: `alexprep train` uses its defaults" in result.stdout and "settings" in result.stdout


@pytest.mark.usefixtures("patient_search")
def test_json_alone(mine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of other people's tars go to the user's cache, under the tars' path."""
    options = ("--device", "cpu", "--batch-size", 200, "--seconds", 0.5, "--json")
    monkeypatch.chdir(mine)
    for data, images, place, crop, scale in ((mine, 48, mine, 56, None), ("train", 7, cache, 224, [0.08, 1.0])):
        for tar in [tar for tar in sorted(mine.glob("train/*.tar"))[1:] if data == "train"]:
            tar.unlink()  # crops so large take long
        result = run_tune("--data", data, *options)
        assert result.exit_code == 0, (result.output, result.exception)
        document = json.loads(result.stdout)
        ((name, kept),) = json.loads((place / "tuning.json").read_bytes())["machines"].items()
        assert name.startswith(this_machine("cpu")) and kept == {field: document[field] for field in kept}
        assert document["images_per_second"] > 0 and document["saved_to"] == f"{place}/tuning.json"
        assert (document["augmentation"]["crop"], document["augmentation"]["scale"]) == (crop, scale)
        assert document["versions"].keys() == {"alexprep", "torch", "dali"}
        assert f"there are only {images} images: a step is smaller than 200" in document["notes"]
        assert tuning_for(data) == Tuning(**document["settings"])
    assert tuning_for(mine / "val") == Tuning() and not (mine / "train" / "tuning.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--augmentation", "box"], "'box' is not one of 'paper', '2012-code', 'resized', 'none'"),
        (["--device", "cuda:99"], "there is no cuda:99 here"),
        (["--augmentation", "paper"], "a crop of 224 pixels does not fit 48 of 48 images"),
        (["--seconds", "1e-3"], "--seconds 0.001 is too short"),
        (["--data", "nowhere"], "nowhere/dataset.json does not exist: make one with"),
        (["--data", "train-{0..3}.tar"], "train-0.tar"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str, data: Path) -> None:
    result = run_tune("--data", data, "--device", "cpu", *arguments)
    assert result.exit_code == (1 if isinstance(result.exception, AlexprepError) else 2)
    assert words in result.stderr + str(result.exception)
    assert not (data / "tuning.json").exists()


def config(data: Path, runs: Path, **options: Any) -> TrainConfig:
    return TrainConfig(data=data, recipe="tiny", batch_size=8, runs=runs, device="cpu", **options)


def test_the_result_does_not_depend_on_it(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even when it changes between a run's beginning and its end."""
    plain = train(config(mine, tmp_path, name="plain", steps=3))["weights_sha256"]
    assert "loader settings" not in capsys.readouterr().err
    save_tuning(mine, this_machine("cpu"), entry(Tuning(1, 4)))
    train(config(mine, tmp_path, name="tuned", steps=2))
    assert "loader settings: 1 thread, 4 steps ahead, from alexprep tune" in capsys.readouterr().err
    save_tuning(mine, this_machine("cpu"), entry(Tuning(2, 1)))
    assert train(config(mine, tmp_path, name="tuned", steps=3, resume=True))["weights_sha256"] == plain


def test_given_threads_win_and_ranks_share(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tuning(mine, this_machine("cpu"), entry(Tuning(9, 4)))
    job = prepare(config(mine, tmp_path, threads=3))
    assert job.tuning == Tuning(3, 4)
    assert job.notes == ["loader settings: 3 threads, 4 steps ahead, from alexprep tune, threads as given"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert prepare(config(mine, tmp_path)).tuning == Tuning(2, 4)
    assert prepare(config(mine, tmp_path, threads=9)).tuning == Tuning(9, 4)


def test_a_run_decodes_as_it_began(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is tuned later: the decoders differ by a grey level here and there."""
    monkeypatch.setattr(loader_settings, "_gpu_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr("alexprep.train.config.choose_device", lambda name: torch.device(name))
    on_gpu = replace(config(mine, tmp_path), device="cuda")
    began = Tuning(8, 2, "cuda", 0.8)
    save_tuning(mine, this_machine("cuda"), entry(began))
    job = prepare(replace(on_gpu, name="one"))
    assert job.tuning == began
    words = "8 threads, 2 steps ahead, decode on the GPU with 0.8 of it on its JPEG engines"
    assert job.notes == [f"loader settings: {words}, from alexprep tune"]
    save_tuning(mine, this_machine("cuda"), entry(Tuning(4, 1, "cpu")))
    again = prepare(replace(on_gpu, name="one", resume=True))
    assert again.tuning == Tuning(4, 1, "cuda", 0.8)
    assert again.notes[0].endswith("from alexprep tune, decoding as the run began")
    assert prepare(replace(on_gpu, name="two")).tuning.decode == "cpu"
    moved = prepare(replace(on_gpu, name="one", resume=True, device="cpu"))
    assert moved.notes[0].startswith("the run began with images decoded on a GPU")
    path = job.run / "config.json"
    document = json.loads(path.read_bytes())
    del document["options"]["decode"], document["options"]["hw_decoder_load"]  # as runs were before there was a choice
    path.write_text(json.dumps(document))
    assert prepare(replace(on_gpu, name="one", resume=True)).tuning == Tuning(4, 1)


@pytest.mark.gpu
def test_on_a_gpu(mine: Path) -> None:
    found, kept = tune(mine, "cuda", batch_sizes=[16, 32], seconds=40)
    assert torch.cuda.get_device_name() in kept["machine"]
    assert found.rate > 0 and found.settings.decode in ("cpu", "cuda")
    assert {trial.compared for trial in found.trials} == {"decode", "threads", "prefetch", "batch size"}
    save_tuning(mine, kept["machine"], kept)
    assert tuning_for(mine, "cuda") == found.settings
