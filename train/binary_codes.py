"""Compresses what a layer gives for images into short binary codes, by an autoencoder, so that similar images are found by Hamming distance.

The AlexNet paper proposes it (section 6.1): Euclidean distance between 4,096 numbers "could be made efficient by training an auto-encoder to
compress these vectors to short binary codes". As in Krizhevsky and Hinton 2011, whose autoencoder it cites, the units of the code are rounded to
0 or 1 on the way forward, and the rounding is ignored on the way back; as there, codes have 256 bits unless told otherwise. Theirs begins with
pixels and is pretrained layer by layer; this one begins with a layer's outputs, and has one layer each way.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import publish_bytes
from alexprep.train.layer_outputs import LayerOutputs, same_outputs
from alexprep.train.neighbour_search import nearest, nearest_codes

FORMAT = "alexprep binary codes"
BITS = 256  # of the longer codes of Krizhevsky and Hinton 2011
_BATCH, _LR = 256, 1e-3
_SAMPLES, _EPOCHS = (
    500_000,
    50,
)  # that the autoencoder sees at most, and how often each: more did not find more neighbours
_QUERIES, _AMONG = 1000, (10, 100)  # for recall


@dataclass(frozen=True)
class BinaryCodes:
    """The codes of a split's images, and what makes a code of other outputs of the layer.

    Attributes:
        path: of the .safetensors.
        facts: those of the outputs that they were made of, and bits, "recall@10 among 10", "recall@10 among 100".
        codes: uint8 (images, bits / 8), in the order of the split's index; the first bit of a code is the highest of its first byte.
        encoder: of the autoencoder, by name: `offset` (D,), which outputs are given less; `weight` (bits, D), `bias` (bits,).
    """

    path: Path
    facts: dict[str, Any]
    codes: NDArray[np.uint8]
    encoder: dict[str, NDArray[np.float32]]

    def nearest(self, outputs_QD: NDArray[np.float32], count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The Hamming distances, in bits, of the images nearest to some outputs, and their rows, both (Q, count), nearest first."""
        return nearest_codes(self.codes, encode(self.encoder, outputs_QD), count)


def codes_file(outputs: Path, bits: int) -> Path:
    """Where the codes lie: beside the outputs that they are made of, NAME-codesBITS.safetensors."""
    return outputs.with_name(f"{outputs.stem}-codes{bits}.safetensors")


def write_codes(
    outputs: LayerOutputs, bits: int = BITS, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> BinaryCodes:
    """Trains an autoencoder on a layer's outputs and writes the images' codes beside them; finished ones are returned as they are.

    Args:
        outputs: what `write_outputs` wrote of a split.
        bits: of a code, a multiple of 64.
        seed: of the first weights and of the order.
        progress: called with the images that the autoencoder has seen, and will see.

    Raises:
        AlexprepError: `bits` is no such number, the outputs cannot be read, or scikit-learn, which finds the exact neighbours that recall is
            measured against, is not installed.
    """
    check_bits(bits)
    path = codes_file(outputs.path, bits)
    with contextlib.suppress(AlexprepError):
        done = read_codes(path)
        if same_outputs(done.facts, outputs.facts) and len(done.codes) == outputs.facts["images"]:
            return done
    vectors = outputs.array()
    encoder = _train(vectors, bits, seed, progress or (lambda done, total: None))
    codes = encode(encoder, vectors)
    facts = outputs.facts | {"format": FORMAT, "bits": bits, **_recalls(vectors, codes, seed)}
    data = safetensors.numpy.save({"codes": codes, **encoder}, {"facts": json.dumps(facts)})
    publish_bytes(path, data)
    return BinaryCodes(path, facts, codes, encoder)


def check_bits(bits: int) -> None:
    """Raises AlexprepError unless codes can have so many bits."""
    if not 64 <= bits <= 4096 or bits % 64:
        raise AlexprepError(f"bits is {bits}, must be a multiple of 64 from 64 to 4,096")


def read_codes(path: Path) -> BinaryCodes:
    """Reads codes that `write_codes` wrote. Raises AlexprepError where there are none, or they are damaged."""
    try:
        with safetensors.safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            encoder = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        codes = encoder.pop("codes")
        if facts["format"] != FORMAT or codes.shape != (facts["images"], facts["bits"] // 8):
            raise ValueError(f"codes of shape {codes.shape}")
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise AlexprepError(f"{path} cannot be read ({error}): delete it, and it is made again") from None
    return BinaryCodes(path, facts, codes, encoder)


def encode(encoder: dict[str, NDArray[np.float32]], outputs_ND: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The codes of outputs, uint8 (N, bits / 8).

    Outputs go through in batches of one size, filled up with zeros, so that a code does not depend on what is encoded with it.
    """
    weights = {name: torch.from_numpy(value) for name, value in encoder.items()}
    codes = np.zeros((len(outputs_ND), len(weights["bias"]) // 8), np.uint8)
    with torch.inference_mode():
        for first in range(0, len(codes), _BATCH):
            part = torch.from_numpy(np.array(outputs_ND[first : first + _BATCH], np.float32))
            values = F.pad(part, (0, 0, 0, _BATCH - len(part))) - weights["offset"]
            bits = F.linear(values, weights["weight"], weights["bias"])[: len(part)] > 0
            codes[first : first + len(part)] = np.packbits(bits.numpy(), axis=1)
    return codes


class _AutoEncoder(nn.Module):
    """Outputs to bits, and back. Both ways are linear, so that each bit of a code tells as much of the outputs wherever they lie."""

    def __init__(self, values: int, bits: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(values, bits), nn.Linear(bits, values)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D)."""
        probabilities = torch.sigmoid(self.encoder(values))
        bits = probabilities + (probabilities.round() - probabilities).detach()
        restored: torch.Tensor = self.decoder(bits)
        return restored


def _train(
    vectors: NDArray[np.float32], bits: int, seed: int, progress: Callable[[int, int], None]
) -> dict[str, NDArray[np.float32]]:
    """The encoder of an autoencoder that was trained to give back its input, by the mean squared error."""
    rng = np.random.default_rng(seed)
    some = vectors[np.sort(rng.choice(len(vectors), min(len(vectors), 10_000), replace=False))]
    offset = some.mean(axis=0, dtype=np.float64).astype(np.float32)
    spread = float(np.sqrt(((some - offset) ** 2).mean(dtype=np.float64))) or 1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _AutoEncoder(vectors.shape[1], bits)
    size = min(_BATCH, len(vectors))
    steps = max(1, min(_SAMPLES, _EPOCHS * len(vectors)) // size)
    optimizer = torch.optim.Adam(net.parameters(), _LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    order, first = rng.permutation(len(vectors)), 0
    for step in range(1, steps + 1):
        if first + size > len(order):
            order, first = rng.permutation(len(vectors)), 0
        part = torch.from_numpy((vectors[np.sort(order[first : first + size])] - offset) / np.float32(spread))
        first += size
        loss = F.mse_loss(net(part), part)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(step * size, steps * size)
    weight, bias = (tensor.detach().numpy().copy() for tensor in (net.encoder.weight, net.encoder.bias))
    return {"offset": offset, "weight": weight / np.float32(spread), "bias": bias}


def _recalls(vectors: NDArray[np.float32], codes: NDArray[np.uint8], seed: int) -> dict[str, float | None]:
    """Which share of the ten exact neighbours of an image are among the ten nearest by its code, and among the hundred.

    The image itself does not count. The mean over 1,000 images, or fewer, drawn with the seed; None where there are not as many others.
    """
    chosen = np.random.default_rng(seed).choice(len(vectors), min(len(vectors), _QUERIES), replace=False)
    most = min(len(vectors), _AMONG[-1] + 1)
    _, exact = nearest(vectors, np.asarray(vectors[chosen]), min(len(vectors), _AMONG[0] + 1))
    _, found = nearest_codes(codes, codes[chosen], most)
    exact, found = _others(exact, chosen), _others(found, chosen)
    return {
        f"recall@10 among {among}": float(
            np.mean([np.isin(*rows).mean() for rows in zip(exact, found[:, :among], strict=True)])
        )
        if len(vectors) > among
        else None
        for among in _AMONG
    }


def _others(rows: NDArray[np.int64], own: NDArray[np.int64]) -> NDArray[np.int64]:
    """Found rows (Q, M) without the query itself, or the last one where it is not among them: (Q, M - 1)."""
    same = rows == own[:, None]
    same[~same.any(axis=1), -1] = True
    others: NDArray[np.int64] = rows[~same].reshape(len(rows), -1)
    return others
