"""Binary codes against plain numpy and scikit-learn: the search, what the encoder gives, recall, and files that are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from alexprep.shards.errors import AlexprepError
from alexprep.train import binary_codes
from alexprep.train.binary_codes import BinaryCodes, codes_file, encode, read_codes, write_codes
from alexprep.train.layer_outputs import FORMAT, LayerOutputs
from alexprep.train.neighbour_search import nearest_codes


def made_up(folder: Path, count: int, values: int, seed: int) -> LayerOutputs:
    """Outputs around 20 centres, so that there is something to be found."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(scale=3, size=(20, values))
    outputs = (centres[rng.integers(0, 20, count)] + rng.normal(size=(count, values))).astype(np.float32)
    np.save(folder / "f.npy", outputs)
    facts = {
        "format": FORMAT,
        "run": "runs/a",
        "layer": "relu4",
        "data_digest": "d",
        "split": "train",
        "images": count,
        "step": 7,
    }
    return LayerOutputs(folder / "f.npy", facts | {"precision": "fp32", "weights_sha256": "w", "shape": [values]})


@pytest.mark.parametrize("bits", [64, 192])
def test_the_search_equals_scikit_learns(bits: int, seed: int) -> None:
    """Distances in bits; of equal ones the lower row comes first."""
    rng = np.random.default_rng(seed)
    bit_codes = rng.integers(0, 2, (90, bits), np.uint8)
    bit_codes[50:] = bit_codes[:40]
    codes = np.packbits(bit_codes, axis=1)
    distances, rows = nearest_codes(codes, codes[30:37], 12)
    search = NearestNeighbors(n_neighbors=12, metric="hamming", algorithm="brute").fit(bit_codes)
    np.testing.assert_allclose(distances, search.kneighbors(bit_codes[30:37])[0] * bits)
    assert rows[:, :2].tolist() == [[row, row + 50] for row in range(30, 37)]
    exact = (bit_codes[30:37, None] != bit_codes).sum(axis=2)
    assert rows.tolist() == np.argsort(exact, axis=1, kind="stable")[:, :12].tolist()


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> BinaryCodes:
    return write_codes(made_up(tmp_path_factory.mktemp("codes"), 600, 24, 1), 64)


def test_codes_find_the_neighbours(codes: BinaryCodes) -> None:
    """Recall is that of plain numpy, and far above that of codes that tell nothing."""
    outputs = np.load(codes.path.with_name("f.npy")).astype(np.float64)
    exact = ((outputs[:, None] - outputs) ** 2).sum(axis=2)
    bits = np.unpackbits(codes.codes, axis=1).astype(int)
    hamming = (bits[:, None] != bits).sum(axis=2)
    shares: dict[int, list[float]] = {10: [], 100: []}
    for row in range(len(outputs)):
        true, found = ([n for n in np.argsort(each[row], kind="stable") if n != row] for each in (exact, hamming))
        for among, values in shares.items():
            values.append(len(set(true[:10]) & set(found[:among])) / 10)
    for among, values in shares.items():
        assert codes.facts[f"recall@10 among {among}"] == pytest.approx(np.mean(values), abs=0.002)
    assert codes.facts["recall@10 among 10"] > 0.3 > 10 * 10 / 599
    assert codes.facts["recall@10 among 100"] > 0.9


def test_a_code_depends_on_its_own_outputs_alone(codes: BinaryCodes) -> None:
    outputs = np.load(codes.path.with_name("f.npy"))
    for rows in (slice(0, 1), slice(599, 600), slice(100, 400)):
        np.testing.assert_array_equal(encode(codes.encoder, outputs[rows]), codes.codes[rows])
    values: NDArray[Any] = (outputs - codes.encoder["offset"]) @ codes.encoder["weight"].T + codes.encoder["bias"]
    sure = np.abs(values) > 1e-4
    np.testing.assert_array_equal(np.unpackbits(codes.codes, axis=1).astype(bool)[sure], (values > 0)[sure])
    distances, found = codes.nearest(outputs[7:9], 3)
    assert distances[:, 0].tolist() == [0, 0] and found.shape == (2, 3)


def test_finished_codes_are_kept_and_others_made_anew(
    codes: BinaryCodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = made_up(codes.path.parent, 600, 24, 1)
    again = read_codes(codes.path)
    assert again.facts == codes.facts and again.path == codes_file(outputs.path, 64)
    np.testing.assert_array_equal(again.codes, codes.codes)
    monkeypatch.setattr(binary_codes, "_EPOCHS", 1)
    assert write_codes(outputs, 64).facts == codes.facts  # not trained again
    few = write_codes(made_up(tmp_path, 9, 24, 2), 64)
    assert few.facts["recall@10 among 10"] is None and few.codes.shape == (9, 8)
    other = LayerOutputs(tmp_path / "f.npy", few.facts | {"format": FORMAT, "step": 7, "weights_sha256": "x"})
    assert write_codes(other, 64).facts["weights_sha256"] == "x"
    few.path.write_bytes(few.path.read_bytes()[:-3])
    with pytest.raises(AlexprepError, match="delete it, and it is made again"):
        read_codes(few.path)
    assert write_codes(other, 64).facts["images"] == 9
    for bits in (0, 96, 5000):
        with pytest.raises(AlexprepError, match="a multiple of 64 from 64 to 4,096"):
            write_codes(outputs, bits)
