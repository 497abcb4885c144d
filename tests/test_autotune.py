"""`alexprep tune`: the search on a made-up machine, the file that it keeps, and what `alexprep train` makes of it."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from alexprep.cli.tune import tune as tune_command
from alexprep.pipeline import autotune as search_module
from alexprep.pipeline import loader_settings as tuning_module
from alexprep.pipeline.autotune import Found, LoaderMeter, dimensions, search, tune
from alexprep.pipeline.loader_settings import Tuning, save_tuning, saved_tuning, this_machine, tuning_for
from alexprep.shards import storage
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.verification import verify
from alexprep.train.config import TrainConfig, prepare
from alexprep.train.trainer import train

CPU = Tuning(threads=8)
CUDA = Tuning(threads=8, decode="cuda")
LATER = "2999-01-01T00:00:00Z"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The user's cache folder, empty."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
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


def test_the_search_finds_the_best() -> None:
    found = Machine(hill).searched()
    assert (found.tuning, found.rate, found.default_rate) == (Tuning(4, 4), 1400.0, 800.0)
    assert found.notes == []
    rounds = {(trial.dimension, trial.value): len(trial.rates) for trial in found.trials}
    values = [("threads", str(n)) for n in (1, 2, 4, 8)] + [("prefetch", str(n)) for n in (1, 2, 4)]
    assert rounds == dict.fromkeys([*values, ("batch size", "128, default"), ("batch size", "128, chosen")], 3)


def test_all_values_of_a_setting_are_measured_in_turns() -> None:
    machine = Machine(hill)
    machine.searched()
    assert [tuning.threads for tuning, _ in machine.asked[1:13]] == [1, 2, 4, 8, 8, 4, 2, 1, 1, 2, 4, 8]


@pytest.mark.parametrize("drift", [lambda seconds: 1 - seconds / 100, lambda seconds: 1 + seconds / 30])
def test_a_drifting_machine_changes_no_choice(drift: Callable[[float], float]) -> None:
    assert Machine(hill, drift=drift).searched().tuning.threads == 4


def test_the_cheaper_wins_a_tie() -> None:
    found = Machine(lambda tuning, size: 100.0 * min(tuning.dali_threads, 4)).searched()
    assert found.tuning == Tuning(4, 1)


def test_less_than_the_spread_is_no_difference() -> None:
    """The fourth step ahead brings 8 %, and the rounds differ by 12 %; then they agree."""

    def speed(tuning: Tuning, size: int) -> float:
        return 1000.0 if tuning.prefetch < 4 else 1080.0

    noisy = Machine(speed, noise=(1.0, 1.06, 0.94, 1.0)).searched()
    assert noisy.tuning.prefetch == 1
    assert noisy.notes == []
    assert Machine(speed).searched().tuning.prefetch == 4


@pytest.mark.parametrize("gain", [0.0, 0.3])
def test_on_a_busy_machine_nothing_changes_for_being_cheaper(gain: float) -> None:
    """Rounds that differ by half must not make half the speed a tie."""
    found = Machine(lambda tuning, size: 100.0 * tuning.dali_threads**gain, noise=(1.0, 1.3, 0.8)).searched()
    assert found.tuning == CPU
    assert found.notes == ["rounds of the same settings differ by 50 %: try again when the machine is less busy"]
    steep = Machine(lambda tuning, size: 1000.0 / tuning.dali_threads, noise=(1.0, 1.3, 0.8)).searched()
    assert steep.tuning.threads == 1  # this much shows all the same


@pytest.mark.parametrize("best", [0.0, 0.5, 0.8, 1.0])
def test_the_load_of_the_jpeg_engines(best: float) -> None:
    def speed(tuning: Tuning, size: int) -> float:
        return 3000.0 if tuning.decode == "cpu" else 7000.0 - 4000 * abs(tuning.hw_decoder_load - best)

    found = Machine(speed).searched(CUDA, (128, 256, 512, 1024))
    assert (found.tuning.decode, found.tuning.hw_decoder_load) == ("cuda", best)
    curve = [trial.value for trial in found.trials if trial.dimension == "batch size"]
    assert curve == [f"{size}, {who}" for size in (128, 256, 512, 1024) for who in ("default", "chosen")]


def test_where_engines_make_no_difference_decoding_stays_where_it_was() -> None:
    found = Machine(lambda tuning, size: 1000.0).searched(CUDA)
    assert (found.tuning.decode, found.tuning.hw_decoder_load) == ("cuda", Tuning().hw_decoder_load)
    slow_gpu = Machine(lambda tuning, size: 2000.0 if tuning.decode == "cpu" else 1000.0).searched(CUDA)
    assert slow_gpu.tuning.decode == "cpu"


@pytest.mark.parametrize("least_seconds", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("seconds", [4.0, 10.0, 25.0])
def test_it_ends_in_time(least_seconds: float, seconds: float) -> None:
    machine = Machine(hill, least_seconds)
    if least_seconds * 5 > seconds:  # the warm-up and one round of threads
        with pytest.raises(AlexprepError):
            machine.searched(seconds=seconds)
        return
    found = machine.searched(seconds=seconds)
    assert machine.now <= seconds + least_seconds + 1e-6
    if len(machine.asked) < 28:
        (note,) = found.notes
        assert note.startswith(f"{seconds:g} s were over before {28 - len(machine.asked)} of 27 turns: --seconds ")
        enough = float(note.split("--seconds ")[1].split()[0])
        assert Machine(hill, least_seconds).searched(seconds=enough + 1).tuning == Tuning(4, 4)
    else:
        assert found.tuning == Tuning(4, 4)


def test_too_few_seconds_are_told() -> None:
    with pytest.raises(AlexprepError, match=r"--seconds 2 is too short .* first turn took 1.0 s: give at least 27"):
        Machine(hill, least_seconds=1.0).searched(seconds=2)


def test_what_fails_is_told_and_not_chosen() -> None:
    def speed(tuning: Tuning, size: int) -> float:
        if tuning.prefetch == 4:
            raise RuntimeError("out of memory\n#1 somewhere")
        return hill(tuning, size)

    found = Machine(speed).searched()
    assert found.tuning == Tuning(4, 2)
    assert found.notes == ["4 threads, 4 steps ahead failed at batches of 128: out of memory"]


def test_defaults_that_fail_are_told() -> None:
    """They passed the warm-up, and then never again."""
    calls = []

    def speed(tuning: Tuning, size: int) -> float:
        calls.append(tuning)
        if len(calls) > 1 and tuning == calls[0]:
            raise RuntimeError("out of memory")
        return hill(tuning, size)

    with pytest.raises(AlexprepError, match=r"the default settings do not work: .* failed at batches of 128"):
        Machine(speed).searched()


def test_the_default_stays_where_the_choice_is_slower_after_all() -> None:
    def speed(tuning: Tuning, size: int) -> float:
        late = len(machine.asked) > 21
        return 500.0 if late and tuning != CPU else hill(tuning, size)

    machine = Machine(speed)
    found = machine.searched()
    assert found.tuning == CPU
    assert found.notes[0] == "side by side the choice is slower than the default, which stays"


def entry(tuning: Tuning, when: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    return {"settings": json.loads(json.dumps(tuning.__dict__)), "measured_at": when}


def test_each_machine_has_its_entry(mine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert saved_tuning(mine, "cpu") == (None, [])
    assert tuning_for(mine) == Tuning()
    here = this_machine("cpu")
    machines = {here: Tuning(1, 4), here._replace(cores=96): Tuning(64, 2)}
    for machine, tuning in machines.items():
        assert save_tuning(mine, machine, entry(tuning)) == (mine / "tuning.json", [])
    assert tuning_for(mine) == Tuning(1, 4)
    monkeypatch.setattr(tuning_module, "cores", lambda: 96)
    assert tuning_for(str(mine), "cpu") == Tuning(64, 2)
    monkeypatch.setattr(tuning_module, "_gpu_name", lambda device: "NVIDIA H200")
    assert tuning_for(mine, "cuda:1") == Tuning()
    gpu = Tuning(8, 2, "cuda", 0.8)
    save_tuning(mine, this_machine("cuda:1"), entry(gpu))
    assert tuning_for(mine, "cuda") == gpu
    document = json.loads((mine / "tuning.json").read_bytes())
    names = [str(here), str(here._replace(cores=96)), f"{here.processor}, 96 cores, NVIDIA H200, cuda"]
    assert list(document) == ["machines"] and list(document["machines"]) == names
    assert not cache.exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"machines": 3}', b'{"other": {}}', b"[" * 100_000, b"\xff\xfe"]
)
def test_a_damaged_file_is_replaced_with_a_warning(content: bytes, mine: Path) -> None:
    (mine / "tuning.json").write_bytes(content)
    tuning, (problem,) = saved_tuning(mine, "cpu")
    assert tuning is None and problem.startswith(f"{mine}/tuning.json is damaged (")
    path, (note,) = save_tuning(mine, this_machine("cpu"), entry(Tuning(3)))
    assert path == mine / "tuning.json" and note == f"{problem}: it was replaced"
    assert saved_tuning(mine, "cpu") == (Tuning(3), [])


GOOD = {"threads": 2, "prefetch": 2, "decode": None, "hw_decoder_load": 0.65}


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {},
        {"settings": None},
        {"settings": {"threads": 1}},
        *(
            {"settings": {**GOOD, name: value}}
            for name, value in (
                *(("threads", "1"), ("threads", 0), ("threads", 2.0), ("prefetch", True), ("prefetch", None)),
                *(("decode", "tpu"), ("decode", ["cpu"]), ("hw_decoder_load", 2), ("hw_decoder_load", float("inf"))),
            )
        ),
    ],
    ids=str,
)
def test_an_entry_that_makes_no_sense_is_not_used(broken: Any, mine: Path) -> None:
    assert save_tuning(mine, this_machine("cpu"), {"settings": GOOD})[1] == []
    assert tuning_for(mine) == Tuning(2)
    (mine / "tuning.json").write_text(json.dumps({"machines": {str(this_machine("cpu")): broken}}))
    tuning, (problem,) = saved_tuning(mine, "cpu")
    assert tuning is None and "tuning.json has no usable settings for this machine" in problem
    assert tuning_for(mine) == Tuning()


def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, whom no permission stops."""

    def publish(path: Path, document: Any) -> None:
        if path.is_relative_to(folder):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        storage.publish_json(path, document)

    monkeypatch.setattr("alexprep.pipeline.loader_settings.publish_json", publish)


def test_of_a_read_only_data_set_the_users_cache_knows(
    mine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tuning(mine, this_machine("cpu"), entry(Tuning(1)))
    read_only(mine, monkeypatch)
    path, notes = save_tuning(mine, this_machine("cpu"), entry(Tuning(2), LATER))
    assert (path, notes) == (cache / "tuning.json", [f"{mine}/tuning.json cannot be written (Read-only file system)"])
    assert tuning_for(mine) == Tuning(2)  # the newer one
    assert tuning_for(mine.parent / "other") == Tuning()
    read_only(mine.parent, monkeypatch)
    assert save_tuning(mine, this_machine("cpu"), entry(Tuning(2)))[0] is None


def test_neither_verify_nor_the_digest_minds(mine: Path) -> None:
    digest = read_dataset(mine)["digest"]
    save_tuning(mine, this_machine("cpu"), entry(Tuning(2)))
    assert verify(mine, 1).problems == []
    assert read_dataset(mine)["digest"] == digest


def run_tune(*arguments: object) -> Result:
    return CliRunner().invoke(tune_command, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("patient_search")
def test_the_command(mine: Path, tmp_path: Path) -> None:
    result = run_tune("--data", mine, "--device", "cpu", "--batch-size", 16, "--batch-size", 8, "--seconds", 0.5)
    assert result.exit_code == 0, (result.output, result.exception)
    for words in (
        f"48 images of 'train' in {mine}",
        "Threads, batches of 16:",
        "█",
        "images/s",
        "16, default",
        "8, default",
    ):
        assert words in result.stdout
    for words in ("sequential  0.000", "× the default's", "host memory", f"{mine}/tuning.json"):
        assert words in result.stdout
    saved = saved_tuning(mine, "cpu").tuning
    assert saved is not None and saved.words("cpu") in result.stdout
    notes = prepare(config(mine, tmp_path)).notes
    assert notes == [f"loader settings: {saved.words('cpu')}, from alexprep tune"]


@pytest.mark.usefixtures("patient_search")
def test_json_alone(mine: Path) -> None:
    result = run_tune("--data", mine, "--device", "cpu", "--batch-size", 200, "--seconds", 0.5, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    document = json.loads(result.stdout)
    machines = json.loads((mine / "tuning.json").read_bytes())["machines"]
    assert machines == {str(this_machine("cpu")): {name: document[name] for name in machines[str(this_machine("cpu"))]}}
    assert document["images_per_second"] > 0 and document["saved_to"] == f"{mine}/tuning.json"
    assert set(document["shuffle_quality"]) == {"shuffle", "blocks", "sequential"}
    assert document["augmentation"]["crop"] == 56 and document["memory_bytes"]["host"] > 10**7
    assert document["versions"].keys() == {"alexprep", "torch", "dali"}
    assert "there are only 48 images: a step is smaller than 200" in document["notes"]


@pytest.mark.usefixtures("patient_search")
def test_other_peoples_tars(mine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine)
    result = run_tune("--data", "train", "--device", "cpu", "--batch-size", 16, "--seconds", 0.5, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    document = json.loads(result.stdout)
    assert document["saved_to"] == str(cache / "tuning.json") and document["augmentation"]["scale"] == [0.08, 1.0]
    assert tuning_for(mine / "train") == Tuning(**document["settings"])
    assert tuning_for(mine / "val") == Tuning()
    assert not (mine / "tuning.json").exists() and not (mine / "train" / "tuning.json").exists()


@pytest.mark.usefixtures("patient_search")
def test_no_place_to_write_is_no_error(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_only(tmp_path, monkeypatch)
    result = run_tune("--data", mine, "--device", "cpu", "--batch-size", 16, "--seconds", 0.5)
    assert result.exit_code == 0
    assert f"Note: {mine}/tuning.json cannot be written (Read-only file system)" in result.stderr
    assert "nowhere: `alexprep train` uses its defaults" in result.stdout and "settings" in result.stdout


def test_interrupted_it_leaves_nothing(mine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []

    def interrupted(meter: LoaderMeter, tuning: Tuning, batch_size: int, seconds: float) -> float:
        turns.append(tuning)
        if len(turns) == 5:
            raise KeyboardInterrupt
        return 100.0

    before = sorted(mine.rglob("*"))
    monkeypatch.setattr(LoaderMeter, "__call__", interrupted)
    assert run_tune("--data", mine, "--device", "cpu").exit_code != 0
    assert sorted(mine.rglob("*")) == before and not cache.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--seconds", "0"], 2, "0.0 is not in the range 0<x<=32000000.0"),
        (["--batch-size", "0"], 2, "0 is not in the range x>=1"),
        (["--augmentation", "box"], 2, "'box' is not one of 'paper', '2012-code', 'resized', 'none'"),
        (["--device", "tpu"], 1, "'tpu' is not a device: use cpu or cuda"),
        (["--device", "cuda:99"], 1, "there is no cuda:99 here"),
        (["--device", "cpu", "--augmentation", "paper"], 1, "a crop of 224 pixels does not fit 48 of 48 images"),
        (["--device", "cpu", "--seconds", "1e-3"], 1, "--seconds 0.001 is too short"),
        (["--device", "cpu", "--data", "nowhere"], 1, "nowhere/dataset.json does not exist: make one with"),
        (["--device", "cpu", "--data", "train-{0..3}.tar"], 1, "train-0.tar"),
    ],
)
def test_wrong_arguments(arguments: list[str], status: int, words: str, data: Path, tmp_path: Path) -> None:
    result = run_tune("--data", data, *arguments)
    assert result.exit_code == status
    assert words in (result.stderr if status == 2 else str(result.exception))
    assert status == 2 or isinstance(result.exception, AlexprepError)
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


def test_threads_that_are_given_win(mine: Path, tmp_path: Path) -> None:
    save_tuning(mine, this_machine("cpu"), entry(Tuning(1, 4)))
    job = prepare(config(mine, tmp_path, threads=3))
    assert job.tuning == Tuning(3, 4)
    assert job.notes == ["loader settings: 3 threads, 4 steps ahead, from alexprep tune, threads as given"]


def test_ranks_of_one_host_share_its_cores(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tuning(mine, this_machine("cpu"), entry(Tuning(9, 1)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert prepare(config(mine, tmp_path)).tuning == Tuning(2, 1)
    assert prepare(config(mine, tmp_path, threads=9)).tuning == Tuning(9, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_named(mine: Path) -> None:
    with pytest.raises(AlexprepError, match="there is no cuda here, torch sees 0 GPUs"):
        tuning_for(mine, "cuda")


def test_a_damaged_file_does_not_stop_training(mine: Path, tmp_path: Path) -> None:
    (mine / "tuning.json").write_bytes(b"{")
    job = prepare(config(mine, tmp_path))
    assert job.tuning == Tuning()
    assert job.notes[0].startswith(f"{mine}/tuning.json is damaged") and "`alexprep tune` makes it anew" in job.notes[0]


def test_a_run_decodes_as_it_began(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is tuned later: the decoders differ by a grey level here and there."""
    monkeypatch.setattr(tuning_module, "_gpu_name", lambda device: "NVIDIA H200")
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


def test_a_run_of_before_decodes_as_the_default(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepare(config(mine, tmp_path, name="old")).run / "config.json"
    document = json.loads(path.read_bytes())
    for name in ("decode", "hw_decoder_load"):
        del document["options"][name]
    path.write_text(json.dumps(document))
    monkeypatch.setattr(tuning_module, "_gpu_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr("alexprep.train.config.choose_device", lambda name: torch.device(name))
    save_tuning(mine, this_machine("cuda"), entry(Tuning(8, 2, "cpu")))
    job = prepare(replace(config(mine, tmp_path, name="old", resume=True), device="cuda"))
    assert job.tuning == Tuning(8, 2)


def test_every_default_is_among_the_values() -> None:
    """Else nothing would be compared with it."""
    for device, start in (("cpu", CPU), ("cuda", CUDA)):
        for dimension in dimensions(device, 8):
            assert start in [replace(start, **value) for value in dimension.values.values()]
    assert search_module.ROUNDS >= 2  # what was measured once has no spread


@pytest.mark.gpu
def test_on_a_gpu(mine: Path) -> None:
    tuned = tune(mine, "cuda", batch_sizes=[16, 32], seconds=40)
    assert tuned.machine.gpu == torch.cuda.get_device_name()
    assert tuned.found.rate > 0 and tuned.found.tuning.decode in ("cpu", "cuda")
    assert {trial.dimension for trial in tuned.found.trials} == {"decode", "threads", "prefetch", "batch size"}
    gpu = tuned.memory["gpu"]
    assert gpu is not None and gpu >= 0
    save_tuning(mine, tuned.machine, tuned.entry())
    assert tuning_for(mine, "cuda") == tuned.found.tuning
