"""What a source holds, told before anything is done: against the tree itself, and against Pillow."""

from __future__ import annotations

import io
import json
import re
import shutil
import statistics
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from alexprep.shards.contact_sheet import _squares, draw_contact_sheet
from alexprep.shards.errors import AlexprepError, AmbiguousSourceError
from alexprep.shards.image_codec import Codec, Target
from alexprep.shards.image_header import Refused, general_reason
from alexprep.shards.inspection import (
    AS_GIVEN,
    AS_NUMBERS,
    BY_NAME,
    OWN,
    Inspection,
    SampleRow,
    inspect_source,
    passed_over_rows,
    pick,
)
from alexprep.shards.listing import Listing, list_inputs
from alexprep.shards.sources import LAYOUTS
from alexprep.shards.sources.base import Account, Input, Location, PassedOver, Source
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.storage import LocalFiles
from alexprep.shards.worker_pool import InProcessEngine
from tests.source_checks import write_tar
from tests.test_docs import _stand_ins as stand_ins

Command = Callable[..., tuple[int, str, str]]
FORMATS = Path(__file__).parents[1] / "docs" / "formats.md"
# Images of each class: train and val, uneven, one class without any in val.
COUNTS = {"train": {"ant": 7, "bee": 4, "cow": 12, "dog": 9}, "val": {"ant": 3, "bee": 1, "dog": 2}}
COLOURS = {"ant": (200, 30, 30), "bee": (30, 170, 60), "cow": (40, 60, 210), "dog": (220, 200, 40)}


def _image(colour: tuple[int, int, int], size: tuple[int, int], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders as in `COUNTS`, each class in its colour, of sizes 10 × 20 upwards."""
    root = tmp_path_factory.mktemp("tree")
    for split, classes in COUNTS.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.png").write_bytes(_image(COLOURS[name], (10 + number, 20 + 2 * number)))
    return root


def _listed(place: Path | str, **options: Any) -> Listing:
    return list_inputs(find_source(str(place)), **options)


class MadeUp(Source):
    """Names that are given, and an account."""

    layout = "made-up"
    expects = "nothing"
    files = LocalFiles(b"/nowhere")
    given: tuple[Input, ...] = ()
    own: tuple[str, ...] = ()

    def inputs(self, account: Account) -> Any:
        """As given, and three files that are passed over."""
        account.found = len(self.given) + 3
        account.pass_over("a rule", "notes\x1b[2J.txt", 2)
        account.pass_over("another", "x", 1)
        account.warnings += ["look twice", "look twice"]
        yield from self.given

    def classes(self, present: set[str]) -> list[str]:
        """The numbering of its own, or none."""
        return list(self.own) or super().classes(present)


def _made_up(names: list[str], own: tuple[str, ...] = ()) -> Source:
    source = MadeUp(MadeUp.files)
    object.__setattr__(
        source, "given", tuple(Input("train", name, Location(b"%d" % n)) for n, name in enumerate(names))
    )
    object.__setattr__(source, "own", own)
    return source


def test_figures_are_those_of_the_tree(tree: Path) -> None:
    found = inspect_source(_listed(tree))
    files = list(tree.rglob("*.png"))
    assert (
        found.layout == "folders"
        and found.evidence.endswith("train, val")
        and found.found == found.inputs == len(files)
    )
    assert list(found.splits) == ["train", "val"] and found.classes == sorted(COLOURS) and found.numbering == BY_NAME
    for split, held in found.splits.items():
        counts = Counter(path.parts[-2] for path in files if path.parts[-3] == split)
        per_class = [counts[name] for name in found.classes]
        assert (held.inputs, held.unlabelled, held.classes) == (sum(per_class), 0, len(counts))
        assert held.per_class == (min(per_class), statistics.median(per_class), max(per_class))
        assert held.fewest == min(found.classes, key=lambda name: counts[name])
    assert any("'cow'" in words for words in found.warnings)  # none of it in val


def test_rows_are_inputs_with_their_labels_from_every_split(tree: Path) -> None:
    found = inspect_source(_listed(tree))
    assert len(set(found.rows)) == 10 and Counter(row.split for row in found.rows) == {"train": 5, "val": 5}
    for row in found.rows:
        split, class_name, _ = Path(row.file).parts
        assert (tree / row.file).is_file() and row == SampleRow(
            row.file, split, class_name, sorted(COLOURS).index(class_name)
        )
    assert inspect_source(_listed(tree)) == found


def test_a_sample_of_all_is_what_pillow_says(tree: Path) -> None:
    sample = inspect_source(_listed(tree)).sample
    sizes = [Image.open(io.BytesIO(path.read_bytes())).size for path in tree.rglob("*.png")]
    lengths = [path.stat().st_size for path in tree.rglob("*.png")]
    assert (sample.files, sample.formats, sample.refused) == (38, {"PNG": 38}, {})
    for spread, numbers in (
        (sample.width, [w for w, _ in sizes]),
        (sample.height, [h for _, h in sizes]),
        (sample.bytes, lengths),
    ):
        assert spread == (min(numbers), statistics.median(numbers), max(numbers))
    some = inspect_source(_listed(tree), sample=5).sample
    assert some.files == some.formats["PNG"] == 5
    assert inspect_source(_listed(tree), sample=0).sample.files == 0


def test_a_store_and_a_tar_tell_the_same(tree: Path, tmp_path: Path) -> None:
    expected = inspect_source(_listed(tree)).as_json()
    url = "memory://inspected/tree"
    fsspec.filesystem("memory").put(str(tree), "/inspected/tree", recursive=True)
    assert inspect_source(_listed(url)).as_json() == {**expected, "root": url}
    members = {str(path.relative_to(tree)): path.read_bytes() for path in sorted(tree.rglob("*.png"))}
    packed = inspect_source(_listed(write_tar(tmp_path / "tree.tar", members))).as_json()
    for name in ("inputs", "splits", "classes", "numbering"):
        assert packed[name] == expected[name]
    assert packed["sample"]["width"] == expected["sample"]["width"]
    assert [row["file"] for row in packed["rows"]] == [f"tree.tar/{row['file']}" for row in expected["rows"]]


@pytest.mark.parametrize(
    ("names", "own", "labels", "numbering", "line"),
    [
        (["b", "a", "b"], (), "auto", BY_NAME, "2, sorted by name: 'a' is 0, 'b' is 1"),
        (["10", "9", "1"], (), "auto", AS_NUMBERS, "3, sorted as numbers: '1' is 0 … '10' is 2"),
        (["10", "9", "1"], (), "sorted", BY_NAME, "3, sorted by name: '1' is 0 … '9' is 2"),
        (["b", "a"], ("c", "b", "a"), "auto", OWN, "3, by the source's own numbering: 'c' is 0 … 'a' is 2"),
        (["b", "a"], (), ["c", "b", "a"], AS_GIVEN, "3, as --labels says: 'c' is 0 … 'a' is 2"),
        (["b"], (), "auto", BY_NAME, "1, sorted by name: 'b' is 0"),
        ([""], (), "auto", BY_NAME, "none is known: every label is -1"),
    ],
)
def test_how_classes_are_numbered(
    names: list[str], own: tuple[str, ...], labels: Any, numbering: str, line: str
) -> None:
    found = inspect_source(list_inputs(_made_up(names, own), labels), sample=0)
    assert found.numbering == numbering
    assert f"  classes  {line}" in found.opening().splitlines()


def test_inputs_without_a_label_are_counted_apart() -> None:
    held = inspect_source(list_inputs(_made_up(["", "a", ""])), sample=0).splits["train"]
    assert (held.inputs, held.unlabelled, held.classes, held.fewest) == (3, 2, 1, "a")
    held = inspect_source(list_inputs(_made_up(["", ""])), sample=0).splits["train"]
    assert (held.unlabelled, held.classes, held.per_class, held.fewest) == (2, 0, None, None)


def test_a_warning_is_said_once_and_names_cannot_steer_a_terminal() -> None:
    found = inspect_source(list_inputs(_made_up(["a\nb", "\x1b[31mc"])))
    lines = str(found).splitlines()
    assert lines[: len(found.opening().splitlines())] == found.opening().splitlines()
    assert [line for line in lines if "look twice" in line] == ["Warning: look twice"]
    assert "\x1b" not in str(found) and "    2          a rule: notes\\x1b[2J.txt, …" in lines
    assert any(line.endswith("a\\nb") for line in lines)
    assert found.sample.refused == {"cannot be read: No such file or directory": 2}


def test_passed_over_rows_have_the_count_and_names() -> None:
    account = Account(
        0, {"a list": PassedOver(2, ["/set/a/x", "y"]), "beyond": PassedOver(1000, []), "more": PassedOver(9, ["z"])}
    )
    account.make_relative("/set")
    rows = passed_over_rows(account.passed_over)
    assert rows == [("passed over", "1,011"), ("  2", "a list: a/x, y"), ("  1,000", "beyond"), ("  9", "more: z, …")]


def test_formats_and_refusals(tmp_path: Path) -> None:
    """Every format that is decoded, whatever the name says; what has no header, with the reason."""
    kinds = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "BMP": "BMP", "PPM": "PNM", "GIF": "GIF", "TIFF": "TIFF"}
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    for kind in kinds:
        (folder / f"{kind}.jpg").write_bytes(_image((9, 9, 9), (31, 17), kind))
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_bytes(b"<html>not here</html>")
    (folder / "cut.jpg").write_bytes(_image((9, 9, 9), (31, 17), "TIFF")[:6])
    (folder / "link.jpg").symlink_to("/nowhere/at/all")
    sample = inspect_source(_listed(tmp_path / "set")).sample
    assert sample.formats == dict.fromkeys(kinds.values(), 1)
    assert sample.width == (31, 31, 31) and sample.height == (17, 17, 17)
    assert sum(sample.refused.values()) == 4
    assert {"empty file", "a TIFF whose header makes no sense", "cannot be read: No such file or directory"} < set(
        sample.refused
    )
    assert not any(re.search("first bytes", reason) for reason in sample.refused)


def test_what_is_no_image_has_the_same_words_as_in_shard(tmp_path: Path) -> None:
    """And where it is more than half of what was looked at, a warning on top says so."""
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    foreign = {
        "page": b"\n<!DOCTYPE html><html>429</html>",
        "paper": b"%PDF-1.7\n" + bytes(99),
        "phone": b"\0\0\0\x18ftypheic" + bytes(99),
        "zeros": bytes(5000),
        "later": bytes(5000) + b"\1",
        "text": b"hello, world",
    }
    for name, content in foreign.items():
        (folder / f"{name}.jpg").write_bytes(content)
    codec, expected = Codec(Target()), set()
    for content in foreign.values():
        refusal = codec.convert(content)
        assert isinstance(refusal, Refused)
        expected.add(general_reason(refusal.reason))
    assert len(expected) == 5
    for n in range(6):
        (folder / f"good{n}.jpg").write_bytes(_image((9, 9, 9), (31, 17), "JPEG"))
    half = inspect_source(_listed(tmp_path / "set"))
    assert set(half.sample.refused) == expected and "cannot be used" not in str(half.warnings)
    (folder / "good0.jpg").write_bytes(foreign["page"])
    most = inspect_source(_listed(tmp_path / "set"))
    warning = most.warnings[0]
    assert (
        warning.startswith("7 of the 12 inputs that were looked at cannot be used (2: ") and "--max-rejects" in warning
    )
    assert f"Warning: {warning}" in most.opening()
    assert inspect_source(_listed(tmp_path / "set"), sample=0).warnings == half.warnings


def test_of_large_files_the_beginning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the header lies behind a long profile."""
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    data = _image((9, 9, 9), (31, 17), "JPEG")
    profile = (b"\xff\xe2" + struct.pack(">H", 60_000) + bytes(59_998)) * 3
    for n in range(4):
        (folder / f"{n}.jpg").write_bytes(data[:2] + profile + data[2:] + bytes(10**6))
    read, total = LocalFiles.read, Counter[bytes]()

    def counted(files: LocalFiles, path: bytes, offset: int = 0, size: int = -1) -> bytes:
        found = read(files, path, offset, size)
        total[path] += len(found)
        return found

    listing = _listed(tmp_path / "set")
    monkeypatch.setattr(LocalFiles, "read", counted)
    assert inspect_source(listing).sample.width == (31, 31, 31)
    assert len(total) == 4 and max(total.values()) < 70_000


def test_a_server_that_sends_whole_files_only_is_asked_for_these(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, read = inspect_source(_listed(tree)), LocalFiles.read

    def whole(files: LocalFiles, path: bytes, offset: int = 0, size: int = -1) -> bytes:
        if size >= 0:
            raise AlexprepError("the server does not answer range requests")
        return read(files, path)

    monkeypatch.setattr(LocalFiles, "read", whole)
    assert inspect_source(_listed(tree)) == expected


def test_pixels_are_no_files(tmp_path: Path) -> None:
    """MNIST, and our own shards of --format raw."""
    images = struct.pack(">4I", 0x803, 3, 12, 10) + bytes(3 * 120)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 3) + bytes([2, 0, 2]))
    listing = _listed(tmp_path)
    found = inspect_source(listing)
    assert found.sample.formats == {"pixels": 3} and found.sample.bytes is None and not found.sample.refused
    assert (found.sample.width, found.sample.height) == ((10, 10, 10), (12, 12, 12))
    assert found.classes == ["0", "1", "2"] and found.splits["train"].fewest == "1"
    assert draw_contact_sheet(listing, InProcessEngine()).getpixel((230, 80)) == (0, 0, 0)


@pytest.fixture(scope="module")
def every_layout(photos: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small source of each layout, by its name."""
    root = tmp_path_factory.mktemp("layouts")
    named = stand_ins(root, photos)
    places = {
        "folders": "/imagenet",
        "ilsvrc": "/downloads/ilsvrc",
        "kaggle": "/kaggle",
        "tar": "photos.tar",
        "zip": "photos.zip",
        "parquet": "hub",
        "imagefolder": "pets",
        "hub-imagenet": "imagenet-1k",
        "arrow": "saved",
        "tfrecord": "records",
        "recordio": "faces",
        "lmdb": "train_lmdb",
        "table": "photos.csv",
        "cifar": "cifar-10-binary.tar.gz",
        "mnist": "mnist",
        "norb": "norb",
    }
    return {"webdataset": data, **{layout: root / named.get(place, place) for layout, place in places.items()}}


# Sets with lists are looked at as folders are, a tar a synset as the archives are, stereo pairs only where they are named.
@pytest.mark.parametrize(
    "layout",
    [
        name
        for name, place in LAYOUTS.items()
        if place.partition(".")[0] != "published" and name not in ("synset-tars", "norb-stereo")
    ],
)
def test_every_layout_can_be_looked_at(layout: str, every_layout: dict[str, Path]) -> None:
    listing = _listed(every_layout[layout])
    found = inspect_source(listing)
    assert found.layout == layout and found.inputs and not found.sample.refused
    assert sum(found.sample.formats.values()) == found.sample.files == min(200, found.inputs)
    assert all(row.label == found.classes.index(row.class_name) for row in found.rows)
    sheet = draw_contact_sheet(listing, InProcessEngine())
    assert not (np.asarray(sheet) == (190, 30, 30)).all(axis=2).any()  # no crossed box


def test_pick_takes_a_class_alone(tree: Path) -> None:
    listing = _listed(tree)
    for label, name in enumerate(listing.classes):
        for split, counts in COUNTS.items():
            names = [str(location).split("/")[1] for _, location in pick(listing, split, 5, label)]
            assert names == [name] * min(5, counts.get(name, 0))


# The contact sheet.


def _patches(sheet: Image.Image, colour: tuple[int, int, int]) -> Any:
    """(top, left) of each 96 × 96 square of a colour."""
    near = (np.abs(np.asarray(sheet).astype(int) - colour) <= 3).all(axis=2)
    sums = np.pad(near.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return np.argwhere(sums[96:, 96:] - sums[:-96, 96:] - sums[96:, :-96] + sums[:-96, :-96] == 96 * 96)


def test_the_sheet_shows_each_class_in_a_row_of_its_own(tree: Path) -> None:
    sheet = draw_contact_sheet(_listed(tree), InProcessEngine())
    tops = []
    for name in sorted(COLOURS):
        places = _patches(sheet, COLOURS[name])
        assert len(places) == sum(min(5, COUNTS[split].get(name, 0)) for split in COUNTS)
        assert len({int(top) for top, _ in places}) == 1
        tops.append(int(places[0][0]))
        of_val = [left for _, left in places if left > places[0][1] + 5 * 100 - 1]
        assert len(of_val) == min(5, COUNTS["val"].get(name, 0))
    assert tops == sorted(tops) and len(set(tops)) == 4
    assert draw_contact_sheet(_listed(tree), InProcessEngine()).tobytes() == sheet.tobytes()


def test_of_many_classes_ten_are_drawn_the_first_and_the_last_among_them(tmp_path: Path) -> None:
    for n in range(15):
        (tmp_path / "set" / f"class {n:02d}").mkdir(parents=True)
        (tmp_path / "set" / f"class {n:02d}" / "1.png").write_bytes(_image((n * 15, 0, 255 - n * 15), (8, 8)))
    sheet = draw_contact_sheet(_listed(tmp_path / "set"), InProcessEngine())
    rows = [n for n in range(15) if len(_patches(sheet, (n * 15, 0, 255 - n * 15)))]
    assert len(rows) == 10 and rows[0] == 0 and rows[-1] == 14
    assert max(np.diff(rows)) - min(np.diff(rows)) <= 1


def test_what_cannot_be_decoded_is_a_crossed_box(tmp_path: Path) -> None:
    folder = (
        tmp_path / "set" / ("a class whose name is longer than the column, and not all ASCII: ä 犬 \x07" + "x" * 100)
    )
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(b"no picture")
    (folder / "2.jpg").symlink_to("/nowhere")
    (folder / "3.png").write_bytes(_image((0, 0, 200), (20, 20)))
    listing = _listed(tmp_path / "set")
    sheet = draw_contact_sheet(listing, InProcessEngine())
    red = (np.asarray(sheet) == (190, 30, 30)).all(axis=2)
    assert red.sum() > 2 * 4 * 90 and len(_patches(sheet, (0, 0, 200))) == 1
    places = [location for _, location in pick(listing, "train", 3)]
    cells = _squares(listing.source, places, {2: "crashes the decoder"})
    assert [isinstance(cell, Refused) for cell in cells] == [True, True, True]
    assert cells[2] == Refused("crashes the decoder") and "No such file" in cells[1].reason  # type: ignore[union-attr]


# The commands.


def test_the_command_says_what_the_library_says(command: Command, tree: Path, tmp_path: Path) -> None:
    code, out, err = command("inspect", str(tree), "--json", "--picture", "sheet.png")
    *lines, last = out.splitlines()
    found = inspect_source(_listed(tree))
    assert (code, err) == (0, "") and lines == [*str(found).splitlines(), "Contact sheet: sheet.png"]
    assert json.loads(last) == {**json.loads(json.dumps(found.as_json())), "picture": "sheet.png"}
    assert len(_patches(Image.open(tmp_path / "sheet.png"), COLOURS["cow"])) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet.png"]


def test_every_key_of_json_is_told(tree: Path) -> None:
    document = {**inspect_source(_listed(tree)).as_json(), "picture": None}
    nested = [document["splits"]["train"], document["rows"][0], document["sample"], document["sample"]["width"]]
    assert {key for each in (document, *nested) for key in each} <= _told_of_json()
    for value in (BY_NAME, AS_NUMBERS, OWN, AS_GIVEN):
        assert f"`{value}`" in FORMATS.read_text()


def _told_of_json() -> set[str]:
    """The words in backticks where docs/formats.md tells of --json."""
    page = FORMATS.read_text()
    return set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", page[page.index("## `--json`") :]))))


def test_wrong_arguments(command: Command, tree: Path, tmp_path: Path) -> None:
    for arguments, status, words in (
        (("nowhere",), 1, "nowhere"),
        ((str(tree), "--picture", "sheet.jpg"), 2, "does not end in .png"),
        ((str(tree), "--picture", "no/such/folder/sheet.png"), 2, "is no folder"),
        ((str(tree), "--layout", "mnist"), 1, "has not the layout 'mnist'"),
        ((str(tree), "--labels", "nowhere.txt"), 1, "nowhere.txt"),
        ((), 2, "Missing argument 'SOURCE'"),
    ):
        code, out, err = command("inspect", *arguments)
        assert code == status and words in err and "Traceback" not in err and not out, (arguments, err)
    assert list(tmp_path.iterdir()) == []


def test_a_question_ends_with_status_2(command: Command, tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "set")
    (tmp_path / "set/train/ANT").mkdir()
    shutil.copy(tmp_path / "set/train/ant/0.png", tmp_path / "set/train/ANT")
    code, out, err = command("inspect", "set")
    with pytest.raises(AmbiguousSourceError) as asked:
        _listed(tmp_path / "set")
    assert code == 2 and not out and err.splitlines()[1:] == str(asked.value).splitlines()[1:]
    assert "--class-names folded" in err


def test_shard_begins_with_the_first_lines_and_ends_with_the_account(
    command: Command, tree: Path, tmp_path: Path
) -> None:
    code, out, err = command("shard", str(tree), "--size", "16", "--limit", "9", "--workers", "1", "--json")
    found: Inspection = inspect_source(_listed(tree), sample=0)
    assert code == 0 and err.startswith(found.opening() + "\n")
    result = json.loads(out.splitlines()[-1])
    assert result.keys() <= _told_of_json()
    recorded = json.loads((tmp_path / "alexprep-data/dataset.json").read_text())["account"]
    assert (result["found"], result["inputs"], result["written"]) == (38, 15, 15)
    assert result["passed_over"] == recorded["passed_over"] and result["warnings"] == found.warnings
    assert result["found"] == result["written"] + result["rejected"] + sum(
        p["count"] for p in result["passed_over"].values()
    )
    lines = out.splitlines()
    assert any(re.fullmatch(r"  passed over +23", line) for line in lines)
    assert any(re.fullmatch(r"    23 +beyond --limit", line) for line in lines)
