"""The codec in batches: its resize, its order and its fallbacks on the CPU; its pixels and its ledger on a GPU."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError, DeviceLostError
from alexprep.shards.image_codec import Codec, Converted, Target
from alexprep.shards.image_codec_cuda import CudaCodec, Resizer, _batches, _ensure_alive
from alexprep.shards.image_header import MAX_PIXELS, Refused
from alexprep.shards.listing import list_inputs
from alexprep.shards.plan import ShardOptions, draw_up
from alexprep.shards.resample import FILTERS
from alexprep.shards.sample_reader import Samples
from alexprep.shards.sources.layout_detection import find_source

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(375, 500), (500, 331), (301, 1203), (257, 256), (64, 97), (61, 40), (7, 1), (1, 7), (1031, 777)]


@pytest.fixture(scope="module")
def images(photo, encoded) -> list[bytes | NDArray[np.uint8]]:
    """Good and bad, for the GPU and not, in one batch."""
    jpeg = encoded(photo(131, 97, seed=1), quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6
    damaged = bytearray(jpeg)
    damaged[len(jpeg) // 2 :] = bytes(len(jpeg) - len(jpeg) // 2)
    return [
        jpeg,
        jpeg[: len(jpeg) // 2],
        encoded(photo(97, 200, seed=2), quality=90, subsampling=0),
        bytes(damaged) + b"\xff\xd9",
        encoded(photo(64, 64, seed=3)),  # has the target form
        b"",
        encoded(photo(80, 70, seed=4).convert("L")),
        encoded(photo(80, 70, seed=5).convert("CMYK")),
        encoded(photo(90, 60, seed=6), progressive=True, quality=90),
        encoded(photo(131, 97, seed=7), "PNG"),
        encoded(photo(90, 131, seed=8), quality=90, exif=exif),
        b"hello, world",
        np.asarray(photo(40, 33, seed=9)),
        np.asarray(photo(28, 28, seed=10).convert("L")),
        encoded(photo(33, 20, seed=11), quality=90, keep_rgb=True),
        encoded(photo(33, 20, seed=12), quality=90),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FILTERS)
def test_torch_resizes_to_the_same_pixels(name: Any, device: str, seed: int) -> None:
    """Enlarging and shrinking, odd and oblong: not one bit differs from numpy's products of blocks."""
    rng = np.random.default_rng(seed)
    resizer = Resizer(torch.device(device))
    for shape in SHAPES:
        noise = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        for pixels in (noise, (noise > 127).astype(np.uint8) * 255):  # the second overshoots the most
            for size in (64, 96, 227):
                resize = Target(size=size, filter=name).resize(*shape)
                top, left, bottom, right = resize.region
                expected = resize(np.ascontiguousarray(pixels[top:bottom, left:right]))
                got = resizer(torch.tensor(pixels, device=device), resize)
                assert got.is_contiguous()
                np.testing.assert_array_equal(got.cpu().numpy(), expected, err_msg=f"{shape} to {size}")


@pytest.mark.parametrize("orient", [False, True])
@pytest.mark.parametrize("reencode", ["needed", "always"])
@pytest.mark.parametrize("form", ["jpg", "png", "raw"])
def test_a_batch_is_what_the_codec_makes_of_each(form: Any, reencode: Any, orient: bool, images) -> None:
    """The same steps with CPU decoders: byte by byte, in order, refusals included; and no batch at all."""
    target = Target(size=64, format=form, reencode=reencode, orient=orient)
    one, many = Codec(target), CudaCodec(target, "cpu")
    expected = [one.convert(data) for data in images]
    assert {type(result) for result in expected} == {Converted, Refused}
    assert many.convert_many(images) == expected
    assert [many.convert(data) for data in images] == expected
    assert many.convert_many([]) == []


def test_only_plain_jpegs_and_pixels_go_to_the_gpu(images) -> None:
    codec = CudaCodec(Target(size=64), "cpu")
    assert [n for n, data in enumerate(images) if codec._work(data) is not None] == [0, 2, 4, 6, 8, 10, 12, 13, 15]
    assert CudaCodec(Target(size=64, orient=True), "cpu")._work(images[10]) is None  # it is turned on the CPU
    progressive = images[8][:-2].replace(b"\xff\xc0", b"\xff\xc2", 1)
    assert codec._work(progressive + b"\xff\xda" * 257 + b"\xff\xd9") is None


class _Stub:
    """Stands for a decoder or an encoder, and changes what it returns."""

    def __init__(self, inner: Any, change: Callable[[list[Any]], list[Any]]) -> None:
        self._inner, self._change = inner, change

    def decode(self, streams: list[Any], **options: Any) -> list[Any]:
        return self._change(self._inner.decode(streams, **options))

    def encode(self, images: list[Any], *arguments: Any, **options: Any) -> list[Any]:
        return self._change(self._inner.encode(images, *arguments, **options))


def test_what_the_gpu_refuses_falls_back(images) -> None:
    codec = CudaCodec(Target(size=64), "cpu")
    expected = codec.convert_many(images)
    decoder, encoder = codec._gpu_decoder, codec._gpu_encoder
    codec._gpu_decoder = _Stub(decoder, lambda made: [None if n % 2 else image for n, image in enumerate(made)])
    codec._gpu_encoder = _Stub(encoder, lambda made: [None, *made[1:]])
    assert codec.convert_many(images) == expected
    codec._gpu_decoder = _Stub(decoder, lambda made: [None] * len(made))
    assert codec.convert_many(images) == expected


def test_an_error_of_a_batch_is_each_image_s_own(images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory for the batch, and a damaged image in it; then an error that stays with the process."""
    codec = CudaCodec(Target(size=64), "cpu")
    expected = codec.convert_many(images)
    sizes = []

    def scarce(made: list[Any]) -> list[Any]:
        sizes.append(len(made))
        if len(made) > 1:
            raise RuntimeError("CUDA error: out of memory")
        if len(sizes) == 4:
            raise RuntimeError("nvJPEG error: bad JPEG")
        return made

    codec._gpu_decoder = _Stub(codec._gpu_decoder, scarce)
    assert codec.convert_many(images) == expected
    assert sizes == [7, *[1] * 7]

    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock(side_effect=broken))
    with pytest.raises(DeviceLostError, match="out of memory"):
        _ensure_alive(RuntimeError("CUDA error: out of memory"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("cudaErrorMemoryAllocation (2)"),
        RuntimeError("nvJPEG: device allocator failed"),
        None,
    ],
)
def test_an_image_never_goes_to_the_cpu_for_want_of_gpu_memory(error: RuntimeError | None, images) -> None:
    """The pixels would differ. nvImageCodec may raise, or just refuse the image."""
    codec = CudaCodec(Target(size=64), "cpu")
    expected = codec.convert_many(images)
    inner = codec._gpu_decoder

    def full(made: list[Any]) -> list[Any]:
        if error is not None:
            raise error
        return [None] * len(made)

    codec._gpu_decoder = _Stub(inner, full)
    codec._free_memory = lambda: 2**20
    words = r"--device cuda: the GPU has too little free memory for an image of 131 x 97 .* fewer --workers"
    with pytest.raises(AlexprepError, match=words):
        codec.convert_many(images)
    if error is None:  # with memory to spare it was the image
        codec._free_memory = lambda: 2**30
        assert codec.convert_many(images) == expected


def test_a_plan_names_what_decides_bytes_on_a_gpu(photos: Path) -> None:
    for device, names in (("cpu", set()), ("cuda", {"nvjpeg", "torch"})):
        target = Target(size=64, device=device)  # type: ignore[arg-type]
        document, _ = draw_up(list_inputs(find_source(str(photos))), ShardOptions(target))
        assert document["versions"].keys() == {"alexprep", "nvimgcodec", "pillow", "simplejpeg"} | names


def test_batches_are_bounded_by_their_pixels() -> None:
    work = CudaCodec(Target(size=64), "cpu")._work(np.zeros((8, 8, 3), np.uint8))
    assert work is not None
    side = int((MAX_PIXELS / 2) ** 0.5)
    for sides in ([side] * 5, [8, 2 * side // 3, side, 8, side, side // 2, side], [8] * 100, []):
        works = [(n, work._replace(height=side, width=side)) for n, side in enumerate(sides)]
        batches = list(_batches(works))
        assert [pair for batch in batches for pair in batch] == works
        assert all(sum(each.height * each.width for _, each in batch) < 2 * MAX_PIXELS for batch in batches)
        assert len(batches) <= 1 + sum(side**2 for side in sides) // MAX_PIXELS


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AlexprepError, match="--device cuda: torch finds no CUDA device"):
        CudaCodec(Target())


@pytest.mark.parametrize(
    ("words", "told"), [("CUDA error: out of memory", "memory to begin"), ("x", "is it installed")]
)
def test_what_keeps_the_gpu_s_codec_from_opening(words: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = mock.Mock(side_effect=RuntimeError(words))
    codec = CudaCodec(Target(), "cpu")
    codec._device = torch.device("cuda", 0)
    for name, value in (("is_available", lambda: True), ("set_device", lambda number: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr("alexprep.shards.image_codec_cuda.nvimgcodec.Decoder", decoder)
    with pytest.raises(AlexprepError, match=told):
        codec._open()
    assert decoder.call_args.kwargs["max_num_cpu_threads"] == 1


# On a GPU.


def _pixels(data: bytes) -> NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["jpg", "png"])
def test_gpu_pixels_are_within_a_grey_level_of_the_cpu_s(form: Any, images) -> None:
    """The same fates, the same bytes for what never saw the GPU; of the others pixels at most 1 apart in the mean, and JPEGs that lose no more."""
    target = Target(size=64, format=form)
    cpu, gpu, exact = Codec(target), CudaCodec(target), Codec(Target(size=64, format="png"))
    for n, (data, made) in enumerate(zip(images, gpu.convert_many(images), strict=True)):
        expected = cpu.convert(data)
        if n == 3:  # damaged: decoders may differ on what can still be read, not on what it costs the others
            continue
        assert type(made) is type(expected), f"{n}: {made}"
        if isinstance(made, Refused) or isinstance(expected, Refused):
            assert made == expected
            continue
        assert (made.width, made.height, made.kept) == (expected.width, expected.height, expected.kept)
        if gpu._work(data) is None or made.kept:
            assert made == expected
        pixels = exact.convert(data)
        assert isinstance(pixels, Converted)
        lost, lost_by_cpu = (np.abs(_pixels(each.data) - _pixels(pixels.data)).mean() for each in (made, expected))
        assert lost <= lost_by_cpu + (1.0 if form == "png" else 0.25), n


@pytest.mark.gpu
def test_gpu_bytes_do_not_depend_on_the_batch(images) -> None:
    """Alone, in another order, twice, and without the damaged one: the same bytes. The GPU did decode what it should."""
    codec = CudaCodec(Target(size=64))
    sound = [data for n, data in enumerate(images) if n != 3]
    together = codec.convert_many(sound)
    assert [codec.convert(data) for data in sound] == together
    assert codec.convert_many(sound[::-1]) == together[::-1]
    assert codec.convert_many([*sound, *sound]) == [*together, *together]
    beside = codec.convert_many(images)
    assert [*beside[:3], *beside[4:]] == together
    assert None not in codec._encoded([work for data in sound if (work := codec._work(data)) is not None])


@pytest.mark.gpu
@pytest.mark.parametrize("subsampling", ["420", "422", "444"])
def test_gpu_jpeg_options_reach_the_encoder(subsampling: Any, photo, encoded) -> None:
    target = Target(size=64, quality=83, subsampling=subsampling)
    data = encoded(photo(131, 97, seed=20))
    mine, theirs = (codec.convert(data) for codec in (CudaCodec(target), Codec(target)))
    assert isinstance(mine, Converted) and isinstance(theirs, Converted)
    both = [Image.open(io.BytesIO(made.data)) for made in (mine, theirs)]
    assert both[0].quantization == both[1].quantization  # type: ignore[attr-defined]
    assert both[0].layer == both[1].layer  # type: ignore[attr-defined]


@pytest.mark.gpu
def test_gpu_shards_have_the_cpu_s_ledger(photos: Path, tmp_path: Path) -> None:
    """`alexprep shard --device cuda` with a corrupt file among the photos, beside --device cpu."""
    source = tmp_path / "source"
    shutil.copytree(photos, source)
    good = (source / "train/class0/000.JPEG").read_bytes()
    (source / "train/class1/cut.JPEG").write_bytes(good[: len(good) // 2])
    samples = {}
    for device in ("cpu", "cuda"):
        options = ShardOptions(Target(size=64, format="png", device=device), shard_samples=30)
        report = convert(source, tmp_path / device, options, 1)
        assert (report.inputs, report.written) == (69, 68)
        samples[device] = Samples(tmp_path / device, "train")
    for row in range(len(samples["cpu"])):
        cpu, gpu = (_pixels(samples[device].encoded(row).tobytes()) for device in ("cpu", "cuda"))
        assert np.abs(cpu - gpu).mean() <= 1.0, row
