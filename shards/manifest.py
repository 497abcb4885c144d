"""Records what was written: a sidecar for each shard, and what describes the dataset as a whole.

A shard counts once its sidecar (train-000000.json) is there. From the plan and all sidecars follow the index (index.npy), the ledger
(samples.parquet), _info.json and dataset.json: `alexprep.shards.conversion` publishes them, `alexprep.shards.verification` computes
them again and compares. The names and schemas are in `alexprep.shards.dataset_format`; nothing here reads an image.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alexprep.shards.dataset_card import dataset_card
from alexprep.shards.dataset_format import (
    DATASET_FORMAT,
    FORMATS,
    INDEX,
    INDEX_DTYPES,
    LEDGER,
    data_digest,
    read_json,
    sample_key,
)
from alexprep.shards.errors import AlexprepError, counted
from alexprep.shards.image_codec import Target
from alexprep.shards.image_header import general_reason
from alexprep.shards.ledger import Ledger
from alexprep.shards.plan import Plan, Shard
from alexprep.shards.storage import json_bytes, publish_bytes, publish_first
from alexprep.shards.tar_format import ending, padded

SIDECAR = {"plan": str, "bytes": int, "sha256": str, "samples": int, "members": list, "inputs": list}

Sidecar = dict[str, Any]


def sidecar_of(plan: Plan, inputs: list[dict[str, Any]], members: list[dict[str, Any]], sha256: str) -> Sidecar:
    """The sidecar of a shard: its `inputs` are `input_record`s, `members` has name, offset, size and crc32 of each in the tar."""
    end = members[-1]["offset"] + padded(members[-1]["size"]) if members else 0
    return {
        "plan": plan.digest,
        "bytes": end + len(ending(end)) if members else 0,
        "sha256": sha256,
        "samples": sum(entry["status"] == "written" for entry in inputs),
        "members": members,
        "inputs": inputs,
    }


def input_record(
    row: int, label: int, width: int, height: int, kept: bool, reason: str | None, damage: str | None = None
) -> dict[str, Any]:
    """What a sidecar says of one input: written, with whether its bytes were `kept`, or rejected for a `reason`.

    Of a written one the reason is its `damage`, with which it was taken; a sound one has none.
    """
    record: dict[str, Any] = {"key": sample_key(row), "label": label, "width": width, "height": height}
    if reason is None:
        return record | {"status": "written", "kept": kept} | ({} if damage is None else {"reason": damage})
    return record | {"status": "rejected", "reason": reason}


def stored_record(target: Target, size: tuple[int, int]) -> dict[str, Any]:
    """What a sidecar says besides of a written image of this height and width; nothing where the target gives all the same."""
    return {} if target.common_size else {"stored_width": size[1], "stored_height": size[0]}


def stored_size(target: Target, entry: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a written image, pixels, by its sidecar's entry."""
    return target.common_size or (entry["stored_height"], entry["stored_width"])


def read_sidecar(plan: Plan, shard: Shard) -> Sidecar | None:
    """A shard's sidecar; None where the shard is not finished: no sidecar, another plan's, or a tar of another length."""
    path = plan.file(shard, ".json")
    if not path.exists():
        return None
    again = "delete it and run the same `alexprep shard` again"
    sidecar = read_json(path, again)
    if sidecar.get("plan") != plan.digest:
        return None
    if {key: type(value) for key, value in sidecar.items()} != SIDECAR:
        raise AlexprepError(f"{path} has other fields than it was written with: {again}")
    tar = plan.file(shard, ".tar")
    if sidecar["samples"] and not (
        plan.file(shard, ".idx").exists() and tar.exists() and tar.stat().st_size == sidecar["bytes"]
    ):
        return None
    return sidecar


class Rejects(NamedTuple):
    """How many inputs are rejected, and how many of these are no pictures, even by their header."""

    all: int
    no_pictures: int

    def plus(self, other: Rejects) -> Rejects:
        """Both together."""
        return Rejects(self.all + other.all, self.no_pictures + other.no_pictures)


def rejects_in(sidecar: Sidecar) -> Rejects:
    """The rejects of a shard."""
    left_out = [entry for entry in sidecar["inputs"] if isinstance(entry, dict) and entry.get("status") == "rejected"]
    return Rejects(len(left_out), sum(not entry.get("width") for entry in left_out))


def publish_sidecar(plan: Plan, shard: Shard, sidecar: Sidecar, before: bytes) -> None:
    """Publishes a shard's sidecar, which makes the shard count; of several writers the first one wins.

    `before` is what was in its place before the shard was made, and no longer counts. Where another writer made the shard
    meanwhile, with other bytes, neither counts afterwards, and an AlexprepError says so.
    """
    path, wanted = plan.file(shard, ".json"), json_bytes(sidecar, indent=None)
    found = publish_first(path, wanted)
    if found == wanted:
        return
    if found != before:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged one is no other writer's
            other = json.loads(found)
            if other["plan"] == sidecar["plan"] and other["sha256"] != sidecar["sha256"]:
                path.unlink(missing_ok=True)  # our tar or index may lie over theirs, which it describes
                outcome = "Neither counts, so the next run makes it again"
                raise conflict(shard, str(other["sha256"]), sidecar["sha256"], outcome)
    publish_bytes(path, wanted)  # in place of a stale or damaged one


def conflict(shard: Shard, first: str, second: str, outcome: str) -> AlexprepError:
    """The refusal of a shard that was made with two different sha256; `outcome` says what became of them."""
    return AlexprepError(
        f"shard {shard.name} was made twice with different bytes (sha256 {first[:16]}… and {second[:16]}…): the machines decode "
        f"differently, or an input changed meanwhile. {outcome}. Use a new --out with one kind of machine"
    )


class Manifest:
    """What describes a whole dataset; it takes in one finished shard after the other, in the plan's order."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.reasons: Counter[str] = Counter()  # for rejections; the numbers in them are replaced by "N"
        self.damaged: Counter[str] = Counter()  # the same for images that were written though they are damaged
        self.rejects = Rejects(0, 0)
        self.kept = 0  # images whose bytes are the source's own
        splits = plan.document["splits"]
        # Pictures planned and written, by split and label: (2, classes).
        self._pictures = {split: np.zeros((2, len(plan.document["classes"])), np.int64) for split in splits}
        self._records: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
        self._indexes: dict[str, list[NDArray[Any]]] = {split: [] for split in splits}
        self._ledgers = {split: Ledger() for split in splits}

    def add(self, shard: Shard, planned: pa.Table, sidecar: Sidecar) -> None:
        """Takes in a finished shard, given its rows of plan.parquet; a damaged sidecar raises KeyError, TypeError or ValueError."""
        self._ledgers[shard.split].add(shard, planned, sidecar)
        self._indexes[shard.split].append(_index(self.plan, shard, sidecar))
        labels, pictures = planned["label"].to_numpy(), self._pictures[shard.split]
        known = (labels >= 0) & (labels < pictures.shape[1])
        written = np.array([entry["status"] == "written" for entry in sidecar["inputs"]], bool)
        for row, which in enumerate((known, known & written)):
            np.add.at(pictures[row], labels[which], 1)
        self.rejects = self.rejects.plus(rejects_in(sidecar))
        for entry in sidecar["inputs"]:
            if "reason" in entry:
                counts = self.reasons if entry["status"] == "rejected" else self.damaged
                counts[general_reason(entry["reason"])] += 1
        self.kept += sum(entry.get("kept", False) for entry in sidecar["inputs"])
        if sidecar["samples"]:
            self._records[shard.split].append(
                {"name": shard.name} | {key: sidecar[key] for key in ("samples", "bytes", "sha256")}
            )

    @property
    def warnings(self) -> list[str]:
        """A sentence for each split in which classes are left without a picture, since all of theirs were rejected."""
        words, classes = [], self.plan.document["classes"]
        for split, (planned, written) in self._pictures.items():
            lost = np.flatnonzero((planned > 0) & (written == 0))
            if lost.size:
                words.append(
                    f"no picture left in {split}: {lost.size:,} of {counted(len(classes), 'class')}, such as {classes[lost[0]]!r}; all of "
                    "theirs were rejected"
                )
        absent = sorted((self.plan.metadata_names or set()) - set(self.metadata))
        if absent:
            words.append(f"no picture has metadata named {', '.join(map(repr, absent))}, which --metadata asks for")
        return words

    @property
    def metadata(self) -> list[str]:
        """The names of the metadata that samples have, of all splits; of very many some."""
        return sorted({name for ledger in self._ledgers.values() for name in ledger.names})

    @property
    def samples(self) -> dict[str, int]:
        """Written images by split."""
        return {split: sum(record["samples"] for record in records) for split, records in self._records.items()}

    @property
    def tar_bytes(self) -> int:
        """Of all tars."""
        return sum(record["bytes"] for records in self._records.values() for record in records)

    def files(self) -> dict[str, bytes]:
        """The content of index and ledger of each split, by name below the dataset's folder."""
        contents = {}
        for split in self._records:
            array = io.BytesIO()
            np.save(array, np.concatenate(self._indexes[split]), allow_pickle=False)
            contents[f"{split}/{INDEX}"] = array.getvalue()
            contents[f"{split}/{LEDGER}"] = self._ledgers[split].content(self._reread)
        return contents

    def _reread(self, shard: Shard) -> Sidecar:
        return read_json(self.plan.file(shard, ".json"), "run the same command again")

    def dataset(self, file_digests: dict[str, str]) -> dict[str, Any]:
        """dataset.json, given the sha256 of the files beside it."""
        document = self.plan.document
        keys = ("size", "filter", "format", "quality", "subsampling", "orient", "device")
        # As plan.json has them: an option that it does not have was not there yet.
        image = {key: document["options"][key] for key in keys if key in document["options"]}
        names = ("fit", "only_shrink", "lossless", "webp_method", "pad", "decode")
        added = {key: document["options"].get(key) for key in names}
        image |= {key: value for key, value in added.items() if value is not None}
        if self.plan.target.fit == "none":
            del image["size"]
        return {
            "format": DATASET_FORMAT,
            "format_version": self.plan.format_version,
            "digest": data_digest(self._records, image, document["classes"]),
            "image": image | {"extension": FORMATS[self.plan.options["format"]]},
            "labels": self.plan.options["labels"],
            "classes": document["classes"],
            "splits": {
                split: {
                    "inputs": document["splits"][split]["inputs"],
                    "samples": samples,
                    "rejected": document["splits"][split]["inputs"] - samples,
                    "bytes": sum(record["bytes"] for record in self._records[split]),
                    "shards": self._records[split],
                }
                for split, samples in self.samples.items()
            },
            "files": file_digests,
            "plan": self.plan.digest,
            "options": document["options"],
            "shard_samples": document["shard_samples"],
            "source": {"layout": document["layout"], "inputs": document["inputs"]},
            # Older plans have none.
            **{key: document[key] for key in ("unlabelled", "words", "choices", "account") if key in document},
            "versions": document["versions"],
        }

    def card(self) -> bytes:
        """README.md, as Hugging Face's `load_dataset` wants it."""
        plan = self.plan
        return dataset_card(self.samples, plan.document["classes"], plan.target, plan.labelled, self.metadata)

    def timm_info(self) -> dict[str, Any]:
        """_info.json, as timm's webdataset reader wants it."""
        return {
            "splits": {
                split: {
                    "name": split,
                    "num_samples": samples,
                    "filenames": [f"{split}/{record['name']}.tar" for record in self._records[split]],
                    "shard_lengths": [record["samples"] for record in self._records[split]],
                }
                for split, samples in self.samples.items()
                if samples
            }
        }


def _index(plan: Plan, shard: Shard, sidecar: Sidecar) -> NDArray[Any]:
    """The index records of one shard: (samples,) of the plan's of `INDEX_DTYPES`."""
    written = [entry for entry in sidecar["inputs"] if entry["status"] == "written"]
    images, dtype = image_members(sidecar["members"]), INDEX_DTYPES[plan.format_version]
    records = [
        (shard.number, m["offset"], m["size"], e["label"], *stored_size(plan.target, e))[: len(dtype.names or ())]
        for m, e in zip(images, written, strict=True)
    ]
    return np.array(records, dtype)


def image_members(members: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a sidecar's members those that hold the images: the first of each sample."""
    return [next(sample) for _, sample in itertools.groupby(members, lambda member: member["name"].partition(".")[0])]
