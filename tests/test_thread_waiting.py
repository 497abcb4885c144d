"""How OpenMP's threads wait: by what runs besides, unless the user has said so; set before torch is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from alexprep.cli import main as command_line
from alexprep.shards import thread_waiting
from alexprep.shards.thread_waiting import ASLEEP, BRIEFLY, SETTINGS, others_running, waiting


@pytest.mark.parametrize(
    ("others", "cores", "processors", "wanted"),
    [
        (0.0, 2, 2, BRIEFLY),
        (0.4, 2, 2, BRIEFLY),
        (4.0, 2, 2, ASLEEP),
        (20.0, 2, 64, BRIEFLY),  # there are cores for all of them
        (63.0, 2, 64, ASLEEP),
        (None, 2, 2, {}),
    ],
)
def test_threads_sleep_where_others_want_the_cores(
    others: float | None, cores: int, processors: int, wanted: dict[str, str]
) -> None:
    assert waiting({"PATH": "/bin"}, others, cores, processors) == wanted
    for name in SETTINGS:
        assert waiting({name: "7"}, others, cores, processors) == {}


def test_what_runs_is_counted_where_it_goes_on_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(*running: int) -> None:
        texts = iter([f"cpu 1 2\nprocs_running {count}\nprocs_blocked 0\n" for count in running])
        monkeypatch.setattr(Path, "read_text", lambda path: next(texts))

    monkeypatch.setattr(thread_waiting, "PAUSE_SECONDS", 0.0)
    looks(*[6] * 5, *[2] * 5, *[6] * 50)
    assert others_running() == 3.0
    looks(*[6] * 20, *[1] * 9, 2)  # what only started besides has started
    assert others_running() == pytest.approx(0.1)
    monkeypatch.setattr(Path, "read_text", lambda path: "")
    assert others_running() is None


def test_commands_that_load_torch_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(command_line, "choose_waiting", lambda: chosen.append(sys.argv[1]))
    for arguments in (["train", "--help"], ["demo", "--help"], ["shard", "--help"], ["--help"], []):
        monkeypatch.setattr(sys, "argv", ["alexprep", *arguments])
        with pytest.raises(SystemExit):
            command_line.main()
    assert chosen == ["train", "demo"]
