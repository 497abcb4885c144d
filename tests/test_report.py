"""The report: numbers and pictures against their sources, what is missing in words, and the page in a browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from PIL import Image

from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import LEDGER
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.rgb_statistics import read_statistics
from alexprep.shards.storage import folder_at
from alexprep.shards.worker_pool import InProcessEngine
from alexprep.train.evaluation import evaluate, evaluation_file, predictions_of, publish_evaluation
from alexprep.train.layer_outputs import write_outputs
from alexprep.train.prediction_table import write_predictions
from alexprep.train.report import blocks
from alexprep.train.report.blocks import Picture, Plot, Section, Table, Words, plot, thinned
from alexprep.train.report.data_section import read_ledger
from alexprep.train.report.page import find_places, render, write_report
from alexprep.train.report.paper_section import paper_section
from alexprep.train.run_dir import Place
from tests.made_up import make_run
from tests.support.browser import CHROMIUM, Browser

ERRORS = [75.0, 55.5, 41.25, 47.0]  # of the made-up epochs: the third is the best


def write_log(run: Path, errors: list[float]) -> None:
    """As a training with two records an epoch would have written it, its last line cut short."""
    lines = []
    for epoch, error in enumerate(errors):
        about = {"loss": 2.0 - 0.25 * epoch, "top1_error": error + 1, "top5_error": error / 5, "lr": 0.01}
        for half in (1, 2):
            step = 2 * epoch + half
            speed = {"images_per_second": 100.0 + step, "data_wait_ms": 5.0, "step_ms": 95.0}
            lines.append({"kind": "steps", "step": step, "epoch": epoch, **about, **speed})
        val = {"split": "val", "top1_error": error, "top5_error": error / 4, "loss": 1.0, "samples": 20}
        lines.append({"kind": "epoch", "step": 2 * epoch + 2, "epoch": epoch, **about, "seconds": 30.0, "val": val})
    text = "\n".join(map(json.dumps, lines))
    (run / "log.jsonl").write_text(text + '\n{"kind": "st')


class Page(html.parser.HTMLParser):
    """What a page holds: tables by caption, images, identifiers, words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.images: list[dict[str, str | None]] = []
        self.identifiers: list[str] = []
        self.text = path.read_text()
        self._row: list[str] | None = None
        self._caption = self._in_caption = ""
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.identifiers += [found["id"]] if found.get("id") else []  # type: ignore[list-item]
        if tag == "img":
            self.images.append(found)
        if tag == "caption":
            self._in_caption, self._caption = "yes", ""
        if tag == "tr":
            self._row = []
            self.tables.setdefault(self._caption, []).append(self._row)
        if tag in ("td", "th") and self._row is not None:
            self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self._in_caption = ""
        if tag == "tr":
            self._row = None
        if tag == "table":
            self._caption = ""

    def handle_data(self, data: str) -> None:
        if self._in_caption:
            self._caption += data
        elif self._row:
            self._row[-1] += data.strip()

    def table(self, caption: str) -> list[dict[str, str]]:
        """The rows of the table whose caption begins so, by column."""
        (rows,) = (rows for name, rows in self.tables.items() if name.startswith(caption))
        return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a log, predictions and features."""
    run = make_run(tmp_path_factory.mktemp("runs"), "a", data, 1)
    write_log(run, ERRORS)
    found = evaluate([Place(run)], device="cpu", threads=1, batch_size=20)
    path = evaluation_file(found.document, run.parent).with_suffix(".parquet")
    write_predictions(predictions_of(found), path)
    found.document["predictions_file"] = str(path)
    publish_evaluation(found.document, run.parent)
    for split in ("train", "val"):
        write_outputs(Place(run), split=split, batch_size=20, threads=1, device="cpu")
    return run


@pytest.fixture(scope="module")
def report(data: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    written = write_report(data, [run], out)
    assert written.missing == []
    return out


def test_numbers_are_those_of_their_sources(report: Path, photos: Path, data: Path, run: Path) -> None:
    page, dataset = Page(report / "report.html"), json.loads((data / "dataset.json").read_text())
    for row in page.table("Splits"):
        split = dataset["splits"][row["split"]]
        assert (row["inputs"], row["samples"]) == (str(split["inputs"]), str(split["samples"]))
        assert row["MB"] == f"{split['bytes'] / 1e6:.2f}"
    ledger = pq.read_table(data / "train" / "samples.parquet").to_pydict()
    for row in page.table("Classes: samples"):
        assert row["train"] == str(ledger["label"].count(int(row["label"])))
        assert row["class"] == dataset["classes"][int(row["label"])]
    (row,) = page.table("Formats of the originals")
    files = [path.stat().st_size for path in photos.glob("*/*/*.JPEG")]
    assert (row["files"], row["kB on average"]) == (str(len(files)), f"{np.mean(files) / 1000:,.2f}")
    statistics = read_statistics(data)
    for axis, row in enumerate(page.table("Eigenvalues")):
        assert row["eigenvalue, (0-255)²"] == f"{statistics.eigenvalues[axis]:,.2f}"
        assert row["standard deviation, grey levels"] == f"{statistics.stdevs[axis]:.2f}"
        assert row["noise α λ (paper)"] == f"{0.1 * statistics.eigenvalues[axis] / 255:.2f}"
    (row,) = page.table("Runs")
    assert (row["best epoch"], row["its top-1 error, %"], row["top-5, %"]) == ("3", "41.25", "10.31")
    assert (row["steps"], row["epochs"], row["minutes"], row["training loss"]) == ("8", "4", "2.00", "1.2500")
    (document,) = (json.loads(path.read_text()) for path in run.glob("eval-*.json"))
    table = pq.read_table(document["predictions_file"]).to_pydict()
    worst = page.table("Worst predicted images")
    given = sorted(table["label_probability"])
    assert [row["its probability"] for row in worst] == [f"{value:.3g}" for value in given]
    assert worst[0]["source"] == table["source"][table["label_probability"].index(given[0])]
    errors = {row["class"]: float(row["top-1 error, %"]) for row in page.table("Classes by error")}
    assert np.mean(list(errors.values())) == pytest.approx(document["top1_error"])  # the classes are of one size
    assert f"top-1 error {document['top1_error']:.2f} %" in page.text


def test_the_page_is_whole_and_described(report: Path) -> None:
    page = Page(report / "report.html")
    assert len(page.images) > 20 and len(set(page.identifiers)) == len(page.identifiers)
    for image in page.images:
        assert image["alt"] and str(image["src"]).startswith("data:image/")
    elsewhere = re.sub(r"data:image/[^\"]+", "", page.text)
    assert "//" not in re.sub(r"^\s*// .*$", "", elsewhere, flags=re.MULTILINE)  # no address of anything
    assert "default-src 'none'" in page.text
    pictures = {path.name for path in (report / "pictures").iterdir()}
    assert {"errors.svg", "errors.png", "kernels.png", "neighbours.png", "sheet_by_class.png"} <= pictures


def test_pictures_are_of_what_they_say(report: Path, data: Path) -> None:
    """The mean image is the file of the statistics; the ramps' middle is the mean colour; no plot is all of one colour."""
    pictures = report / "pictures"
    mean = np.asarray(Image.open(pictures / "mean_image.png"))
    np.testing.assert_array_equal(mean, np.asarray(Image.open(data / "stats" / "mean_image.png")))
    axes = np.asarray(Image.open(pictures / "axes.png"))
    middle = axes[:, axes.shape[1] // 2][[10, 46, 82]].astype(int)
    assert np.abs(middle - read_statistics(data).channel_means).max() < 3
    ten = np.asarray(Image.open(pictures / "ten_views.png")).astype(int)
    crop = (ten.shape[1] - 4 * 4) // 5
    for n in range(5):  # the second row has the reflections
        left = n * (crop + 4)
        np.testing.assert_array_equal(ten[:crop, left : left + crop], ten[-crop:, left : left + crop][:, ::-1])
    for path in pictures.glob("*.png"):
        assert np.asarray(Image.open(path).convert("RGB")).std() > 3, path.name


@pytest.fixture
def cheap_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are drawn, but not made into files, which takes most of the time; other tests look at these."""

    def drawn(draw: Callable[[Any], None], size: tuple[float, float]) -> tuple[bytes, bytes]:
        draw(Figure(figsize=size))
        return b"<svg/>", b"PNG"

    monkeypatch.setattr(blocks, "_drawn", drawn)


@pytest.mark.usefixtures("cheap_plots")
def test_what_is_missing_is_said(data: Path, run: Path, tmp_path: Path) -> None:
    """A dataset without statistics and with a damaged ledger, a run that has just begun, and nothing at all: the rest is shown."""
    broken = tmp_path / "broken"
    shutil.copytree(data, broken, ignore=shutil.ignore_patterns("stats"))
    (broken / "val" / "samples.parquet").write_bytes(b"PAR1 damaged")
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(run / "config.json", half)
    written = write_report(broken, [half], tmp_path / "out")
    said = "\n".join(written.missing)
    for words in (
        f"{broken}/val/samples.parquet cannot be read",
        f"{broken}/stats/stats.json does not exist: run `alexprep pca-stats`",
        "the run has logged nothing yet",
        f"make them with `alexprep eval half --runs {tmp_path} --predictions`",
        f"{half} has no valid checkpoint",
        f"make them with `alexprep features half --runs {tmp_path}` and `alexprep features half --runs {tmp_path} --split val`",
    ):
        assert words in said, words
    page = Page(written.path)
    assert len(page.table("Classes: samples")) == 4 and "sheet" not in said
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "dataset.json").write_text('{"name": "of somebody else"}')
    for place, words in ((foreign, "There is no finished dataset"), (None, "There is no dataset: name its folder")):
        assert words in write_report(place, [], tmp_path / "out", notes=["x is no run."]).missing[1]
    assert "x is no run." in (tmp_path / "out" / "report.html").read_text()
    assert list((tmp_path / "out" / "pictures").iterdir()) == []  # those of the earlier report are gone


@pytest.mark.usefixtures("cheap_plots")
def test_one_image_alone(photos: Path, tmp_path: Path) -> None:
    """A dataset of one image, without statistics: what takes two is left out in words, and all else is drawn."""
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
    shutil.copy(photos / "train/class0/000.JPEG", tmp_path / "photos/train/cat")
    convert(tmp_path / "photos", tmp_path / "data", ShardOptions(Target(size=64)), InProcessEngine())
    written = write_report(tmp_path / "data", [], tmp_path / "out")
    assert len(written.missing) == 4, written.missing
    page = Page(written.path)
    assert "With one sample there is no order to measure." in page.text
    assert page.table("Classes: samples")[0]["train"] == "1"
    assert {"sheet_by_class.png", "sizes.png"} <= {p.name for p in (tmp_path / "out/pictures").iterdir()}


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    """An earlier report's pictures go, whatever else lies beside them stays, and no file of somebody else is written over."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "holiday.png").write_bytes(b"mine")
    section = Section("x", "X", [Picture("axes", "a", "c", np.zeros((2, 2, 3), np.uint8))])
    page = render("x", [section])
    (pictures / "axes.png").write_bytes(b"of the report")
    (tmp_path / "report.html").write_text(page)
    write_report(None, [], tmp_path)
    assert [path.name for path in pictures.iterdir()] == ["holiday.png"]
    write_report(None, [], tmp_path)
    (tmp_path / "report.html").write_text("<title>Coverage report</title>")
    with pytest.raises(AlexprepError, match=r"report\.html is not of an earlier report: .* --out"):
        write_report(None, [], tmp_path)
    assert "Coverage" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("cheap_plots")
def test_a_dataset_that_was_moved_is_the_one_that_is_named(data: Path, run: Path, tmp_path: Path) -> None:
    moved, other = tmp_path / "moved", tmp_path / "a"
    shutil.copytree(data, moved)
    shutil.copytree(run, other)
    for path in [*other.glob("eval-*.json"), *other.glob("features-*.json")]:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "not/here"}))
    paper = paper_section(moved, [other])
    assert paper.warnings == []
    assert [block.name for block in paper.blocks if isinstance(block, Plot | Picture)][-2:] == ["guesses", "neighbours"]
    assert len(paper_section(None, [other]).warnings) == 2


def test_damage_of_any_kind_costs_its_part_alone() -> None:
    section = Section("x", "X")
    section.add(lambda: [Words("before")], "words")
    facts: dict[str, str] = {}
    section.add(lambda: [Words(facts["gone"])], "number")
    assert [type(block) for block in section.blocks] == [Words, Words]
    assert section.warnings == [
        "There is no number: what it is drawn from is damaged or of another form (KeyError: 'gone')."
    ]


def test_names_from_outside_are_text(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>"
    section = Section("x", "X", [Table(nasty, ["a", "b"], [[nasty, 1.5], ["y", None]], search=True), Words(nasty)])
    page = render(nasty, [section])
    assert "<script>alert" not in page and page.count("&lt;script&gt;alert(1)") >= 4
    assert 'data-value="1.5">1.50<' in page and 'data-value="">–<' in page


def test_a_plot_is_the_same_each_time_and_fits_dark_pages() -> None:
    def draw(figure: Any) -> None:
        figure.subplots().plot([1, 2], [3, 4])

    one, other = (plot("p", "a", "c", draw, (2, 2)) for _ in range(2))
    assert (one.light, one.png) == (other.light, other.png)
    assert b"#17181a" in one.dark and b"#ffffff" not in one.dark and b"#1d1d1f" not in one.dark
    assert thinned(np.zeros(10**5)).tolist()[-1] == 10**5 - 1 and len(thinned(np.zeros(10**5))) == 2000


def test_what_is_meant(data: Path, run: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "no data"
    assert find_places([str(data), "a"], nothing, run.parent) == (data, [run], [])
    assert find_places([], nothing, run.parent) == (data, [run], [])  # the run last active, and its data
    assert find_places([str(run)], nothing, tmp_path)[:2] == (data, [run])
    with pytest.raises(AlexprepError, match=r"There is no dataset in .* and no run in .*: name its folder"):
        find_places([], nothing, tmp_path)
    assert find_places([], data, tmp_path) == (data, [], [])
    assert find_places(["a"], nothing, run.parent, insist=True)[2] == [f"{nothing} is no dataset's folder."]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dataset.json").write_text("{}")
    assert find_places(["a"], tmp_path / "other", run.parent, insist=True) == (tmp_path / "other", [run], [])
    with pytest.raises(AlexprepError, match=r"^b is neither a dataset's folder.*: name its folder"):
        find_places(["b"], data, run.parent)  # and not of the data that happens to be there
    _, _, notes = find_places(["b", str(data), str(data)], nothing, run.parent)
    assert len(notes) == 2 and notes[0].startswith("b is neither a dataset's folder")


def test_the_command(run: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    """Of what is not there it says so, and ends well where anything is left to show."""
    status, out, err = command("report", "nobody", str(run), "--json")
    assert status == 0 and "nobody is neither" in err
    printed = json.loads(out.splitlines()[-1])
    assert printed["runs"] == [str(run)] and Path(printed["report"]).exists()


@pytest.mark.parametrize(
    ("named", "words"), [(["nobody"], "nobody is neither a dataset's folder"), ([], "no dataset in .* and no run in")]
)
def test_a_report_on_nothing(
    named: list[str], words: str, command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, _, err = command("report", *named, "--runs", str(tmp_path / "none"))
    assert status == 1 and re.search(words, err) and "name its folder" in err and not (tmp_path / "report").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_in_a_browser(report: Path, tmp_path: Path) -> None:
    """Tabs, search and sorting by keys and by the mouse; no error, no request, and nothing wider than the screen, light or dark."""
    parts = (
        "[...document.querySelectorAll('[role=tabpanel]')].filter((part) => !part.hidden).map((part) => part.id).join()"
    )
    table = "document.querySelector('#data input[type=search]').closest('div').querySelector('table')"

    def column(number: int) -> str:
        rows = f"[...{table}.tBodies[0].rows].filter((row) => row.offsetParent)"
        return f"{rows}.map((row) => row.cells[{number}].textContent)"

    with Browser(tmp_path / "profile") as browser:
        browser.open(report / "report.html")

        def seen() -> Any:
            return browser.evaluate(parts)

        assert seen() == "data"
        browser.press("Tab")  # to the first part's name; then by arrows, as with any row of tabs
        after = []
        for key in ("ArrowRight", "End", "ArrowRight", "ArrowLeft", "Home"):
            browser.press(key)
            after.append(seen())
        assert after == ["statistics", "paper", "data", "paper", "data"]
        browser.click("document.querySelector('#tab-training')")
        assert seen() == "training" and browser.evaluate("location.hash") == "#training"
        browser.click("document.querySelector('#tab-data')")
        browser.click("document.querySelector('#data input[type=search]')")
        browser.write("CLASS2")
        assert browser.evaluate(column(1)) == ["class2"]
        browser.evaluate("document.activeElement.select()")
        browser.write("class")
        names = ["class0", "class1", "class2", "class3"]
        browser.click(f"{table}.tHead.querySelectorAll('button')[1]")
        assert browser.evaluate(column(1)) == names
        browser.press("Enter")  # the column's name has the focus
        assert browser.evaluate(column(1)) == names[::-1]
        assert browser.evaluate(f"{table}.tHead.rows[0].cells[1].getAttribute('aria-sort')") == "descending"
        browser.click(f"{table}.tHead.querySelectorAll('button')[0]")
        assert browser.evaluate(column(0)) == ["0", "1", "2", "3"]
        assert browser.evaluate("[...document.images].filter((image) => !image.naturalWidth).length") == 0
        papers = set()
        for width, dark in ((390, True), (1440, False)):
            browser.open(report / "report.html", width, dark=dark)
            for part in ("data", "statistics", "augmentation", "training", "paper"):
                browser.evaluate(f"document.querySelector('#tab-{part}').click()")
                wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
                assert browser.evaluate(wide) == 0, (width, part)
            papers.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(papers) == 2
        assert browser.said == [] and set(browser.asked) == {(report / "report.html").as_uri()}


@pytest.mark.usefixtures("cheap_plots")
def test_classes_are_called_by_their_words(data: Path, run: Path, tmp_path: Path) -> None:
    """Where dataset.json has any: in full in tables, the first word in pictures' texts."""
    worded = tmp_path / "worded"
    shutil.copytree(data, worded)
    dataset = json.loads((worded / "dataset.json").read_text())
    dataset["words"] = ["tench, Tinca tinca", "crane", "crane, lift", ""]
    (worded / "dataset.json").write_text(json.dumps(dataset))
    moved = tmp_path / "a"
    shutil.copytree(run, moved)
    (path,) = moved.glob("eval-*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": str(worded)}))
    page = Page(write_report(worded, [moved], tmp_path / "out").path)
    named = ["class0 (tench, Tinca tinca)", "class1 (crane)", "class2 (crane, lift)", "class3"]
    assert [row["class"] for row in page.table("Classes: samples")] == named
    assert {row["label"] for row in page.table("Worst predicted images")} == set(named)
    assert "by class: tench, class1, class2, class3." in page.text


def test_a_ledger_in_a_store_is_read_as_on_a_disk(data: Path) -> None:
    (folder_at("memory://bucket/read") / "train" / LEDGER).write_bytes((data / "train" / LEDGER).read_bytes())
    here, there = (read_ledger(folder, "train") for folder in (data, folder_at("memory://bucket/read")))
    np.testing.assert_equal(vars(there), vars(here))
    assert here.written.any()
