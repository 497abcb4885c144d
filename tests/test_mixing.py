"""Mixup and CutMix: what is drawn, the pairs of a step on any ranks and after a resume, the loss; and the same promises of all augmentations."""

from __future__ import annotations

import math
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F

from alexprep.pipeline import mixing
from alexprep.pipeline.augmentation import Augmentation, draw
from alexprep.pipeline.batch import Batch, MixedBatch
from alexprep.pipeline.colour import Blur, Jitter
from alexprep.pipeline.geometry import Affine, Erasing
from alexprep.pipeline.loader import Loader
from alexprep.pipeline.mixing import Mixing, draw_mixing, partners
from alexprep.pipeline.policies import RandAugment
from alexprep.pipeline.sampler import StepPlan
from alexprep.shards.errors import AlexprepError
from alexprep.shards.sample_reader import Samples
from alexprep.train import recipes
from alexprep.train.data import Examples, MixedExamples
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.world import World
from alexprep.train.losses import mixed_loss
from alexprep.train.trainer import train
from tests import training_ranks as ranks
from tests.made_up import BATCH, MadeUpLoader, small_recipe
from tests.support.chances import check_as_often
from tests.training_ranks import small_config as config

BOTH = Mixing(mixup=0.4, cutmix=1.0)
PLAIN = Augmentation(crop=51, mean="imagenet", std="imagenet", noise="none")
EVERYTHING = replace(
    PLAIN,
    crop=37,
    scale=(0.2, 1.0),
    affine=Affine(rotate=20),
    policy=RandAugment(),
    jitter=Jitter(0.4, 0.4, 0.4, 0.1),
    grey=0.2,
    blur=Blur(),
    erasing=Erasing(),
    mixing=BOTH,
)


def test_weights_have_beta_s_distribution(seed: int) -> None:
    """λ ~ Beta(alpha, alpha), one a pair; and with both on, half of the pairs get each."""
    places = np.arange(40_000)
    edges = np.linspace(0, 1, 21)
    for alpha in (0.2, 1.0, 8.0):
        drawn = draw_mixing(Mixing(mixup=alpha), seed, 0, places, 224, 224)
        assert (drawn["weight"][::2] == drawn["weight"][1::2]).all() and not drawn["exchanged"].any()
        check_as_often(
            np.histogram(drawn["weight"][::2], edges)[0], np.diff(scipy.special.betainc(alpha, alpha, edges)) + 1e-300
        )
    drawn = draw_mixing(replace(BOTH, share=0.5), seed, 0, places, 224, 224)
    cut = drawn["exchanged"][::2, 2:].prod(axis=1) > 0
    plain = ~cut & (drawn["weight"][::2] < 1)
    assert abs(cut.mean() - 0.25) < 0.01 + 4 * math.sqrt(0.25 * 0.75 / 20_000)  # some rectangles are empty
    assert abs(plain.mean() - 0.25) < 0.01 + 4 * math.sqrt(0.25 * 0.75 / 20_000)


def test_cutmix_follows_the_paper_s_rule(seed: int) -> None:
    """A centre uniform over the image, sides √(1 - λ) of the image's, cut off at its edges; λ is what is left of the area."""
    height, width = 120, 200
    drawn = draw_mixing(Mixing(cutmix=1.0), seed, 0, np.arange(40_000), height, width)
    box, weight = drawn["exchanged"][::2], drawn["weight"][::2]
    assert (box >= 0).all() and (box[:, 0] + box[:, 2] <= height).all() and (box[:, 1] + box[:, 3] <= width).all()
    np.testing.assert_allclose(weight, 1 - box[:, 2] * box[:, 3] / (height * width))
    inside = (box[:, :2] > 0).all(axis=1) & (box[:, 0] + box[:, 2] < height) & (box[:, 1] + box[:, 3] < width)
    sides = box[inside, 2:] / [height, width]
    assert np.abs(sides[:, 0] - sides[:, 1]).max() <= 2 / height + 2 / width
    # λ uniform and a side √(1 - λ): before edges cut anything off, sides squared are uniform. Rows whose centre is far from the edges tell.
    middle = (box[:, 0] + box[:, 2] / 2 - height / 2) / height
    small = inside & (np.abs(middle) < 0.2) & (box[:, 2] < 0.55 * height)
    columns = (box[:, 1] + box[:, 3] / 2 - width / 2) / width
    small &= np.abs(columns) < 0.2
    areas = (box[small, 2] / height) ** 2
    check_as_often(np.histogram(areas, np.linspace(0.04, 0.3, 5))[0], [1] * 4)


def test_partners_and_ranks() -> None:
    """Pairs stay together on any number of ranks; a sample whose partner is gone stays alone."""
    assert partners(np.array([7, 8, 8, 9, 10, 10])).tolist() == [0, 2, 1, 3, 5, 4]
    for count, world_size in ((46, 3), (47, 4), (5, 4), (48, 1)):
        plans = [
            StepPlan(np.zeros(count, int), 20, "shuffle", 1, 0, rank, world_size, together=2)
            for rank in range(world_size)
        ]
        for step in range(len(plans[0])):
            parts = [plan.part(1, step) for plan in plans]
            whole = StepPlan(np.zeros(count, int), 20, "shuffle", 1, 0, 0, 1).part(1, step)
            for n in range(2):
                np.testing.assert_array_equal(np.concatenate([part[n] for part in parts]), whole[n])
            assert all(len(part[0]) <= plan.largest_part for part, plan in zip(parts, plans, strict=True))
            assert all(part[1][0] % 2 == 0 for part in parts if len(part[1]))


@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC", "channels_last"])
@pytest.mark.parametrize("kind", [Mixing(mixup=0.4), Mixing(cutmix=1.0), replace(BOTH, share=0.8)])
def test_the_loader_mixes_as_defined(kind: Mixing, memory_format: Any, data: Path) -> None:
    """The pairs of a step of a loader without mixing, by the definition; the last of 47 has no partner."""
    options: Any = {"batch_size": 18, "seed": 4, "memory_format": memory_format}
    with (
        Loader(data, augmentation=replace(PLAIN, mixing=kind), **options) as loader,
        Loader(data, augmentation=PLAIN, **options) as plain,
    ):
        for step, (found, batch) in enumerate(zip(loader, plain, strict=True)):
            assert isinstance(found, MixedBatch) and isinstance(batch, Batch)
            places = 18 * step + np.arange(len(batch.labels))
            more = draw_mixing(kind, 4, 0, places, 51, 51)
            partner = partners(more["pair"])
            last = [
                np.asarray(each.images if memory_format == "NHWC" else each.images.movedim(1, -1))
                for each in (found, batch)
            ]
            for n, other in enumerate(partner.tolist()):
                expected = mixing.mixed(
                    last[1][n].astype(float), last[1][other], more["weight"][n], more["exchanged"][n]
                )
                np.testing.assert_allclose(last[0][n], expected, atol=1e-5)
            assert torch.equal(found.partner_labels, batch.labels[partner]) and torch.equal(
                found.indices, batch.indices
            )
            np.testing.assert_allclose(found.weights, more["weight"], rtol=1e-6)
            assert found.images.stride() == batch.images.stride()


class Seen(NamedTuple):
    images: torch.Tensor
    others: list[torch.Tensor]


def _seen(loader: Any) -> Iterator[Seen]:
    for images, *others in loader:
        yield Seen(images, others)


def test_all_of_it_is_exact_on_resume_and_over_ranks(data: Path) -> None:
    """With every augmentation at once: from any step, on two and three ranks, pickled, the same pixels to the last bit."""
    options: Any = {"augmentation": EVERYTHING, "batch_size": 20, "seed": 2, "drop_last": True}
    with Loader(data, **options) as loader:
        assert len(loader) == 2
        first = list(_seen(loader))
        state = loader.state_dict()
        second = list(_seen(loader))
        copy = pickle.loads(pickle.dumps(loader))
    with copy:
        copy.load_state_dict(state | {"step": 1})
        for found, expected in zip(_seen(copy), second[1:], strict=True):
            assert torch.equal(found.images, expected.images)
    assert not torch.equal(first[0].images, second[0].images)
    for world_size in (2, 3):
        loaders = [Loader(data, rank=rank, world_size=world_size, threads=2, **options) for rank in range(world_size)]
        for parts, whole in zip(zip(*map(_seen, loaders), strict=True), first, strict=True):
            assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
            for n, values in enumerate(whole.others):
                assert torch.equal(torch.cat([part.others[n] for part in parts]), values)
        for each in loaders:
            each.close()


def test_the_loss_is_that_of_soft_labels(seed: int) -> None:
    torch.manual_seed(seed)
    output, labels, others = torch.randn(12, 5), torch.randint(5, (12,)), torch.randint(5, (12,))
    weights = torch.rand(12)
    soft = weights[:, None] * F.one_hot(labels, 5) + (1 - weights)[:, None] * F.one_hot(others, 5)
    assert torch.allclose(mixed_loss(output, labels, others, weights), F.cross_entropy(output, soft))
    assert torch.allclose(mixed_loss(output, labels, labels, weights), F.cross_entropy(output, labels))
    counted = MixedExamples(output, labels, others, weights).counted_labels
    assert torch.equal(counted, torch.where(weights >= 0.5, labels, others))


class MixedUpLoader(MadeUpLoader):
    """Pairs of made-up images, mixed half and half as a `Loader` does it."""

    def __iter__(self) -> Iterator[Any]:
        for images, labels in super().__iter__():
            if self.split != "train":
                yield Batch(images, labels, labels)
                continue
            other = torch.from_numpy(partners(np.arange(len(labels)) // 2))
            weights = torch.full((len(labels),), 0.75)
            yield MixedBatch(0.75 * images + 0.25 * images[other], labels, labels, labels[other], weights)


def test_training_uses_both_labels_and_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ranks.registered(tmp_path, monkeypatch, MixedUpLoader)
    whole = train(config(data, name="whole", epochs=2), MixedUpLoader)
    train(config(data, name="parts", steps=8), MixedUpLoader)
    resumed = train(config(data, name="parts", resume=True, epochs=2), MixedUpLoader)
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    plain = train(config(data, name="plain", epochs=2), MadeUpLoader)
    assert plain["weights_sha256"] != whole["weights_sha256"]
    floor = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # nobody is surer than the labels, where they differ
    assert whole["train_loss"] > 0.5 * floor


def test_the_loop_gets_the_pairs_of_any_loader() -> None:
    world = World.alone(torch.device("cpu"))
    parallel = Parallel(torch.nn.Linear(2, 2), "single", world)
    images, labels = torch.zeros(4, 2), torch.arange(4)
    others = MixedBatch(images, labels, labels, labels.flip(0), torch.full((4,), 0.3))
    mixed, plain = parallel.batches([others, Batch(images, labels, labels)])
    assert isinstance(mixed, MixedExamples) and torch.equal(mixed.partner_labels, labels.flip(0))
    assert isinstance(plain, Examples) and plain.counted_labels is plain.labels


def test_a_recipe_with_mixing_is_part_of_a_run_s_identity() -> None:
    recipe = small_recipe(augmentation=replace(small_recipe().augmentation, mixing=BOTH), batch_size=BATCH)
    told = recipe.describe()["augmentation"]["mixing"]
    assert told == {"mixup": 0.4, "cutmix": 1.0, "cutmix_share": 0.5, "share": 1.0}
    assert recipes.recipe("alexnet").describe()["augmentation"]["mixing"] is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda data: Mixing(), "mixup and cutmix are both 0"),
        (lambda data: Mixing(mixup=-1), "mixing: mixup -1"),
        (lambda data: Mixing(cutmix=1, share=1.1), "mixing: share 1.1"),
        (lambda data: Loader(data, batch_size=5, augmentation=replace(PLAIN, mixing=BOTH)), "batch_size 5 is odd"),
        (lambda data: Loader(data, batch_size=50, augmentation=PLAIN, drop_last=True), "48 samples make no step"),
        (lambda data: draw(EVERYTHING, 0, 0, np.arange(2), np.full((2, 2), 64)), "mixing needs the places"),
        (
            lambda data: Loader(
                data,
                batch_size=4,
                augmentation=Augmentation(crop=9, mean="none", noise="none", mixing=BOTH),
                dtype="uint8",
            ),
            "dtype uint8",
        ),
    ],
)
def test_what_is_out_of_bounds_is_named(make: Any, words: str, data: Path) -> None:
    with pytest.raises(AlexprepError, match=words):
        make(data)


def test_a_missing_partner_leaves_a_sample_as_it_is(data: Path, tmp_path: Path) -> None:
    """Where one image of a pair is damaged, the other is not mixed and keeps its label; every other pair is as before."""
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    record = Samples(copy, "train").index[5]
    with (copy / "train" / f"train-{record['shard']:06d}.tar").open("r+b") as shard:
        shard.seek(int(record["offset"]))
        shard.write(bytes(int(record["size"])))
    options: Any = {"batch_size": 8, "order": "sequential", "seed": 2}
    mixed: Any = options | {"augmentation": replace(PLAIN, mixing=Mixing(mixup=1.0))}
    with (
        Loader(copy, on_bad="skip", **mixed) as loader,
        Loader(data, **mixed) as sound,
        Loader(data, augmentation=PLAIN, **options) as plain,
    ):
        found, whole, alone = (next(iter(each)) for each in (loader, sound, plain))
    assert found.indices.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert torch.equal(found.images[:4], whole.images[:4]) and torch.equal(found.images[5:], whole.images[6:])
    assert torch.equal(found.images[4], alone.images[4]) and found.partner_labels is not None
    assert found.partner_labels[4] == found.labels[4]


def test_numbers_types_and_the_last_step(data: Path) -> None:
    """Means and deviations by name or as numbers, torch's types, and steps that are whole."""
    options: Any = {"batch_size": 18, "seed": 1}
    images = {}
    for name, mean, std in (
        ("inception", "inception", "inception"),
        ("numbers", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
        ("clip", "clip", "clip"),
        ("none", "none", "none"),
    ):
        augmentation = Augmentation(crop=51, mean=mean, std=std, noise="none")  # type: ignore[arg-type]
        with Loader(data, augmentation=augmentation, drop_last=True, **options) as loader:
            assert len(loader) == 2 and [len(batch.labels) for batch in loader] == [18, 18]
            images[name] = next(iter(loader)).images.movedim(1, -1)
        with Loader(data, augmentation=augmentation, **options) as loader:
            assert len(loader) == 3
    levels = images["none"].double()
    assert torch.equal(images["inception"], images["numbers"]) and images["inception"].abs().max() <= 1
    torch.testing.assert_close(images["inception"].double(), levels / 127.5 - 1, atol=1e-6, rtol=0)
    clip_mean, clip_std = (
        torch.tensor(values) for values in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    torch.testing.assert_close(images["clip"].double(), (levels / 255 - clip_mean) / clip_std, atol=1e-5, rtol=0)
    for dtype, memory_format in ((torch.bfloat16, "channels_last"), ("bfloat16", "NHWC"), (torch.float16, "NCHW")):
        both = []
        for kind in (dtype, "float32"):
            with Loader(data, augmentation=PLAIN, dtype=kind, memory_format=memory_format, **options) as loader:  # type: ignore[arg-type]
                both.append(next(iter(loader)).images)
        assert both[0].dtype == (torch.bfloat16 if dtype == "bfloat16" else dtype)
        assert both[0].stride() == both[1].stride()
        torch.testing.assert_close(both[0].float(), both[1].to(both[0].dtype).float(), atol=2**-8, rtol=2**-8)
    for arguments, words in (
        ({"mean": (1, 2)}, r"mean \(1, 2\) is neither one of crop, .* nor three grey levels"),
        ({"std": (1, 0, 1)}, "std 0 is not a number"),
        ({"std": "clips"}, "std 'clips' is not one of"),
    ):
        with pytest.raises(AlexprepError, match=words):
            Augmentation(**arguments)
    with pytest.raises(AlexprepError, match="dtype 'float64' is not one of"):
        Loader(data, batch_size=2, augmentation=PLAIN, dtype=torch.float64)
