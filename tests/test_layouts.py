"""Sets as people download them: each is read with the labels that its publisher's rule gives, or there is a question or a refusal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from PIL import Image

from alexprep.shards.errors import AlexprepError, AmbiguousSourceError
from alexprep.shards.listing import Listing
from alexprep.shards.sources.published import SETS
from alexprep.shards.worker_pool import InProcessEngine, LocalEngine
from tests.source_checks import write_tar
from tests.support.command_line import listed
from tests.support.layouts import MINIATURES, Miniature, Rows, matlab, pictures, texts
from tests.support.record_files import gzipped_tar

ROOT = Path(__file__).parents[1]
PUBLISHED = {each.layout for each in SETS}


def rows_of(listing: Listing) -> Rows:
    """Split, class and label of each path, as the miniatures have them."""
    rows: Rows = {}
    for split, table in listing.splits.items():
        for row in table.to_pylist():
            path = os.fsdecode(b"/".join(filter(None, (row["path"], row["member"]))))
            assert path not in rows
            rows[path] = (split, listing.names[row["class"]], int(listing.label_of[row["class"]]))
    return rows


@pytest.mark.parametrize("name", MINIATURES)
def test_a_layout_is_read_right_or_asked_about(name: str, tmp_path: Path) -> None:
    made = MINIATURES[name]()
    place = made.write(tmp_path)
    if made.rows is not None:
        listing = listed(place)
        assert (listing.source.layout, rows_of(listing)) == (made.layout, made.rows)
        if not any(path.endswith(".tar") for path in made.files):
            assert listing.account.found == sum(not path.endswith("/") for path in made.files)
        said = "\n".join(listing.account.warnings)
        for words in made.words:
            assert words in said
    else:
        with pytest.raises(AlexprepError) as raised:
            listed(place)
        assert isinstance(raised.value, AmbiguousSourceError) == bool(made.ways), raised.value
        assert str(place) in str(raised.value)
        for words in made.words:
            assert words in str(raised.value)
        printed = [what for what, _ in getattr(raised.value, "ways", ())]
        assert set(made.ways) <= set(printed)
        for way in printed:
            rows = chosen(place, way)
            if way in made.ways:
                assert rows == made.ways[way], way


def chosen(place: Path, way: str, before: str = "") -> Rows:
    """What a way that a question prints leads to; where it is another question, the first of its ways is taken too."""
    if way.startswith("SOURCE "):
        return rows_of(listed(Path(way.removeprefix("SOURCE "))))
    try:
        return rows_of(listed(place, f"{before} {way}"))
    except AmbiguousSourceError as error:
        assert before.count("--") < 3, error
        return chosen(place, error.ways[0][0], f"{before} {way}")


def test_the_docs_have_these_layouts() -> None:
    text = (ROOT / "docs" / "sources.md").read_text().split("## Sets as they are downloaded", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][1:]
    read = {name: ends.strip("`") for name, _, ends, _ in rows}
    made = {name: make() for name, make in MINIATURES.items()}
    assert len(rows) >= 25 and list(read) == list(made)
    for name, each in made.items():
        assert read[name] == (each.layout if each.rows is not None else "asked" if each.ways else "refused")
        how = next(row[3] for row in rows if row[0] == name)
        assert each.rows is not None or not each.ways or any(way in how for way in each.ways)


# Lists that are damaged, or say something else than the folders: set, changes of its files (None deletes one), words of the error.
_FOOD, _CUB, _TINY = "food-101/meta/", "CUB_200_2011/", "tiny-imagenet-200/"
DAMAGES: list[tuple[str, Mapping[str, bytes | None], str]] = [
    ("Tiny ImageNet", {_TINY + "train/n09999999/images/a.JPEG": b"p"}, "train.*n09999999.*wnids.txt does not name"),
    (
        "Tiny ImageNet",
        {_TINY + "val/val_annotations.txt": b"val_0.JPEG\tn01443537\t0\nval_1.JPEG"},
        "val_annotations.txt, line 2",
    ),
    ("Tiny ImageNet", {_TINY + "val/val_annotations.txt": b"val_0.JPEG\tn09999999\t0\n"}, "n09999999.*wnids.txt"),
    ("Places365", {"places365_val.txt": None}, "val_256 has no class folders, and places365_val.txt"),
    ("Places365", {"places365_val.txt": b"Places365_val_00000001.jpg 3\n"}, "places365_val.txt.*none of the 3"),
    (
        "Places365",
        {"places365_train_standard.txt": b"/a/airfield/0.jpg 2\n"},
        "standard.txt.*'b/bar'.*data_256 contradicts",
    ),
    ("Places365", {"places365_train_challenge.txt": b"/b/bar/0.jpg 2\n"}, "standard.txt and .*challenge.txt"),
    ("Places365", {"data_large/a/airfield/0.jpg": b"p"}, "data_256 and .*data_large, which hold the same pictures"),
    (
        "Places365",
        {"categories_places365.txt": b"/a/airfield 0\n/b/bar 2\n"},
        "numbers 2 classes from 0 to 2, expected",
    ),
    ("SUN397", {"SUN397/ClassName.txt": b"/b/bar\n/b/bar\n"}, "ClassName.txt numbers classes in two ways.*'b/bar'"),
    (
        "Food-101",
        {_FOOD + "classes.txt": b"apple_pie\nwaffles\n"},
        "train.txt has the class 'baby_back_ribs'.*classes.txt",
    ),
    (
        "Food-101",
        {_FOOD + "test.txt": b"apple_pie/100\n"},
        "test.txt says that .*100.jpg is 'apple_pie' of test.*of train",
    ),
    (
        "Food-101",
        {_FOOD + "train.txt": b"waffles/9\n", _FOOD + "test.txt": b"waffles/8\n"},
        "9 pictures .*only 0 that they name",
    ),
    (
        "CUB-200-2011",
        {_CUB + "train_test_split.txt": b"1 1\n2 0\n"},
        "images.txt and .*train_test_split.txt.*3 stands in one",
    ),
    (
        "CUB-200-2011",
        {_CUB + "image_class_labels.txt": b"1 1\n2 2\n3 2\n4 2\n5 3\n6 3\n"},
        "image_class_labels.txt says that .*'002.Laysan_Albatross', which its folder in .*images contradicts",
    ),
    ("CUB-200-2011", {_CUB + "classes.txt": b"1 a\n1 b\n"}, "classes.txt numbers classes in two ways"),
    ("Oxford-IIIT Pet", {"annotations/test.txt": b"Bengal_2 1 1 2\n"}, "numbers classes in two ways"),
    (
        "Oxford 102 Flower",
        {"setid.mat": matlab(trnid=[[7]], valid=[[1]], tstid=[[2]])},
        "setid.mat names picture 7.*for 6",
    ),
    ("Oxford 102 Flower", {"setid.mat": matlab(trnid=[[1]])}, "setid.mat has no vector 'valid'"),
    (
        "FGVC-Aircraft",
        {"fgvc-aircraft-2013b/data/variants.txt": b"707-320\n"},
        "images_variant_train.txt has the class.*variants.txt",
    ),
    ("Stanford Dogs", {"test_list.mat": matlab(file_list=["a/b.jpg"], labels=[[1, 2]])}, "1 pictures and 2 labels"),
    (
        "GTSRB",
        {"GTSRB/GT-final_test.csv": b"Filename;Width;ClassId\n00000.ppm;1;43\n"},
        "GT-final_test.csv gives 00000.ppm",
    ),
    ("ImageNet-21k (winter21), a tar a synset", {"winter21_whole/n01443537/a.jpg": b"p"}, "as tars .* and as folders"),
]


@pytest.mark.parametrize(("name", "changes", "words"), DAMAGES)
def test_lists_that_do_not_fit_are_refused(
    name: str, changes: Mapping[str, bytes | None], words: str, tmp_path: Path
) -> None:
    made = MINIATURES[name]()
    files = {**made.files, **changes}
    kept = {path: content for path, content in files.items() if content is not None}
    place = type(made)(kept).write(tmp_path)
    with pytest.raises(AlexprepError, match=words) as raised:
        listed(place)
    assert str(place) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "gone", "more", "warning"),
    [
        ("Food-101", "food-101/images/waffles/100.jpg", "food-101/images/waffles/7.jpg", "1 picture .*waffles/7.jpg"),
        ("CUB-200-2011", "CUB_200_2011/images/001.Black_footed_Albatross/Black_footed_Albatross_0000_0.jpg", "", ""),
        ("Places365", "val_256/Places365_val_00000001.jpg", "data_256/a/airfield/new.jpg", "1 picture .*new.jpg"),
        (
            "Tiny ImageNet",
            "tiny-imagenet-200/val/images/val_0.JPEG",
            "tiny-imagenet-200/train/stray.JPEG",
            "stray.JPEG",
        ),
    ],
)
def test_what_lists_and_folders_lack_is_told(name: str, gone: str, more: str, warning: str, tmp_path: Path) -> None:
    made = MINIATURES[name]()
    assert made.rows is not None
    place = made.write(tmp_path)
    (place / gone).unlink()
    if more:
        (place / more).write_bytes(b"p")
    listing = listed(place)
    assert rows_of(listing) == {path: row for path, row in made.rows.items() if path != gone}
    said = "\n".join(listing.account.warnings)
    assert re.search(f"1 picture that the lists name is not there: .*{re.escape(gone)}", said)
    assert re.search(warning, said)
    assert listing.account.found == sum(not path.endswith("/") for path in made.files) - 1 + bool(more)


def test_lists_of_these_names_in_another_form_are_a_question(tmp_path: Path) -> None:
    """As NABirds has the lists of CUB-200-2011, with names in place of numbers."""
    made = MINIATURES["CUB-200-2011"]()
    place = type(made)({**made.files, **texts({"CUB_200_2011/images.txt": ["0000139e-21dc 001.a/b.jpg"]})}).write(
        tmp_path
    )
    with pytest.raises(AmbiguousSourceError, match="lists named as those of CUB-200-2011") as raised:
        listed(place)
    assert made.rows is not None
    rows = rows_of(listed(place, raised.value.ways[0][0]))
    assert rows == {path: ("train", *row[1:]) for path, row in made.rows.items()}


def test_folders_alone_are_read_where_the_user_says_so(tmp_path: Path) -> None:
    made = MINIATURES["Food-101"]()
    assert made.rows is not None
    listing = listed(made.write(tmp_path), "--layout folders")
    assert rows_of(listing) == {path: ("train", *row[1:]) for path, row in made.rows.items()}
    for layout, option in (
        ("food-101", "--class-depth 1"),
        ("folders", "--columns label=y"),
        ("table", "--unlabelled"),
    ):
        with pytest.raises(
            AlexprepError, match=f"{option} is for .*: leave it out, SOURCE .* is to be read as '{layout}'"
        ):
            listed(tmp_path, f"--layout {layout} {option}")


@pytest.mark.parametrize(
    "name", ["Tiny ImageNet", "Places365", "Oxford 102 Flower", "ImageNet-21k (winter21), a tar a synset"]
)
def test_in_a_store_they_are_the_same(name: str, tmp_path: Path) -> None:
    made = MINIATURES[name]()
    assert made.rows is not None
    store = fsspec.filesystem("memory")
    store.put(str(made.write(tmp_path)), "/layouts", recursive=True)
    listing = listed("memory://layouts")
    assert (listing.source.layout, rows_of(listing)) == (made.layout, made.rows)


@pytest.mark.parametrize("name", [name for name in MINIATURES if MINIATURES[name]().layout in PUBLISHED])
def test_in_a_tar_lists_are_not_passed_over_in_silence(name: str, tmp_path: Path) -> None:
    made = MINIATURES[name]()
    place = write_tar(tmp_path / "packed.tar", {path: content for path, content in made.files.items() if content})
    with pytest.raises(AlexprepError, match=r"packed\.tar"):
        listed(place)


def test_by_the_command_line(
    command: Callable[..., tuple[int, str, str]],
    photo: Callable[..., Image.Image],
    encoded: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = InProcessEngine()
    monkeypatch.setattr(LocalEngine, "run", lambda engine, task, arguments, *more: here.run(task, arguments, *more))
    made = MINIATURES["CUB-200-2011"]()
    assert made.rows is not None
    seen = {
        path: encoded(photo(9, 9, seed)) if path in made.rows else made.files[path]
        for seed, path in enumerate(made.files)
    }
    type(made)(seen).write(tmp_path / "cub")
    status, _, said = command("shard", "cub", "--out", "data", "--size", "8", "--workers", "1")
    assert status == 0, said
    document = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert document["account"]["found"] == len(made.files)
    assert document["classes"] == ["001.Black_footed_Albatross", "002.Laysan_Albatross", "010.Red_winged_Blackbird"]
    ledger = {
        split: pq.read_table(tmp_path / "data" / split / "samples.parquet").to_pylist() for split in ("train", "test")
    }
    status, _, said = command("shard", "cub", "--out", "cub/data", "--size", "8", "--workers", "1")
    assert status == 0, said
    status, _, said = command(
        "shard", "cub", "--out", "cub/data", "--size", "8", "--workers", "1"
    )  # goes on with the same plan
    assert status == 0, said
    written = {row["source"]: (split, row["label"], row["status"]) for split, rows in ledger.items() for row in rows}
    assert written == {path: (split, label, "written") for path, (split, _, label) in made.rows.items()}


def test_a_question_ends_the_command_line_with_status_2(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    MINIATURES["iNaturalist 2017 to 2019"]().write(tmp_path / "inat")
    status, _, said = command("shard", "inat", "--out", "data")
    assert status == 2 and not (tmp_path / "data").exists()
    assert "--class-depth 1  " in said and "--class-depth 2  " in said and "Traceback" not in said


CLASSES = tuple(f"{split}/{name}/{n}.jpg" for split in ("train", "val") for name in "abc" for n in range(2))


def folder_of(root: Path, names: Iterable[str], lists: Mapping[str, Iterable[str]] | None = None) -> Path:
    """A folder of pictures and lists."""
    return Miniature({**pictures(names), **texts(lists or {})}).write(root)


def asked(place: Path, words: str) -> list[str]:
    """The ways out of the question that a source is."""
    with pytest.raises(AmbiguousSourceError, match=words) as raised:
        listed(place)
    return [what for what, _ in raised.value.ways]


def test_a_flat_archive_is_the_question_that_a_flat_folder_is(tmp_path: Path) -> None:
    names = [f"{name}.{n}.jpg" for name in ("cat", "dog") for n in range(3)]
    packed = write_tar(tmp_path / "flat.tar", pictures(names))
    for place in (packed, folder_of(tmp_path / "flat", names)):
        assert asked(place, "no class folders, and nothing tells.*The names begin with cat, dog") == ["--unlabelled"]
        assert len(rows_of(listed(place, "--unlabelled"))) == 6
    with pytest.raises(AlexprepError, match="names begin with a, b"):  # of a split that stands alone, as before
        listed(write_tar(tmp_path / "wide.tar", pictures(["train/a.1.jpg", "train/b.2.jpg", "val/x/1.jpg"])))


def test_pictures_beside_archives_are_a_question(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "tar", ("0.jpg", "1.jpg"))
    write_tar(place / "train.tar", pictures(["a/0.jpg", "b/0.jpg"]))
    assert asked(place, "layout 'tar', and beside it 2 pictures in no folder, such as 0.jpg")[0] == "--layout tar"
    assert len(rows_of(listed(place, "--layout tar"))) == 2
    assert set(rows_of(listed(place, "--layout folders --unlabelled"))) == {"0.jpg", "1.jpg"}
    (place / "1.jpg").unlink()
    assert len(rows_of(listed(place))) == 2  # a preview
    hub = folder_of(tmp_path / "hub", CLASSES)
    gzipped_tar(hub / "train_images_0.tar.gz", [("a_n01443537.JPEG", b"x"), ("b_n01440764.JPEG", b"x")])
    assert asked(hub, "layout 'hub-imagenet', and beside it 12 pictures in 6 folders")[1] == "--layout folders"
    assert len(rows_of(listed(hub, "--layout folders"))) == 12


def test_a_list_beside_class_folders_in_splits_is_a_question(tmp_path: Path) -> None:
    lines = {"metadata.csv": ["file_name,label", "train/a/0.jpg,dog", "train/b/0.jpg,cat"]}
    place = folder_of(tmp_path, CLASSES, lines)
    assert asked(place, "metadata.csv, and beside it 12 pictures in 6 folders")[0] == "--layout imagefolder"
    said = listed(place, "--layout imagefolder").account.warnings
    assert any("passed over: 10 pictures that no list names, such as" in words for words in said)


@pytest.mark.parametrize(
    ("names", "lists", "words"),
    [
        ([*CLASSES[:6], "val/1.jpg"], {"val.txt": ["1.jpg a", "2.jpg b"]}, "1 picture that .*val.txt names are not in .*val, such as 2$"),
        ([f"{name}/0.jpg" for name in (*range(12), "other")], {}, "most class names are numbers, but 'other' is none.*11 is label 3"),
        ([f"{name}/0.jpg" for name in range(1, 6)], {}, "numbered in their order: 1 is label 0, 5 is label 4$"),
    ],
)  # fmt: skip
def test_what_needs_no_decision_is_said(
    names: list[str], lists: Mapping[str, list[str]], words: str, tmp_path: Path
) -> None:
    said = listed(folder_of(tmp_path, names, lists)).account.warnings
    assert any(re.search(words, each) for each in said), said


def test_numbers_that_no_picture_has_are_said(tmp_path: Path) -> None:
    place = folder_of(tmp_path, ("1.jpg", "2.jpg"), {"list.csv": ["path,label", "1.jpg,3", "2.jpg,1"]})
    said = listed(place / "list.csv").account.warnings
    assert "no image at all: 2 of 4 classes, such as '0', which keep their labels" in said


def test_a_detection_set_of_roboflow_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AlexprepError, match="COCO's form"):
        listed(folder_of(tmp_path, ("train/1.jpg", "valid/2.jpg"), {"train/_annotations.coco.json": ["{}"]}))
