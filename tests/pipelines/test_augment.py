"""`pipelines.augment.reference` against golden values, a reimplementation and torchvision."""

import colorsys
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from pipelines.augment import reference
from pipelines.plan import EpochPlan
from pipelines.spec import JITTER_ORDERS, VIEW1, VIEW2, AugmentSpec, Colour, Semantics, ViewSpec

SEMANTICS: tuple[Semantics, ...] = ("deepmind", "torchvision")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
OFF = ViewSpec(flip=0, jitter=0, grey=0, blur=0, solarize=0)


def make_spec(size: int, semantics: Semantics = "deepmind") -> AugmentSpec:
    """Without normalisation, so that results are colours in [0, 1]."""
    return AugmentSpec(image_size=size, semantics=semantics, mean=(0, 0, 0), std=(1, 1, 1))


def make_crops(views: int, batch: int, size: int, seed: int = 0) -> Tensor:
    """Noise, with a row of colours in which HSV has its corners."""
    generator = np.random.default_rng(seed)
    crops = generator.integers(0, 256, (views, batch, size, size, 3), dtype=np.uint8)
    corners = np.array(np.meshgrid([0, 255], [0, 255], [0, 255])).reshape(3, 8).T
    crops[:, :, 0, :8] = corners
    crops[:, :, 1, :4] = np.array([[1, 1, 1], [128, 128, 128], [200, 200, 7], [7, 200, 200]])
    return torch.from_numpy(crops)


def make_table(views: int, batch: int, **columns: npt.ArrayLike) -> Tensor:
    """A table of nothing to do, but for the given columns (broadcast to `[batch, views]`)."""
    table = np.zeros((batch, views, len(Colour)), dtype=np.float32)
    table[..., [Colour.CONTRAST, Colour.SATURATION]] = 1
    for name, values in columns.items():
        table[..., Colour[name.upper()]] = values
    return torch.from_numpy(table)


def strong_table(views: int, batch: int, semantics: Semantics, seed: int = 0) -> Tensor:
    """Every operation in about half of the rows, the 24 orders in turn, amounts that clip."""
    draw = np.random.default_rng(seed)

    def uniform(low: float, high: float) -> npt.NDArray[np.float64]:
        return draw.uniform(low, high, (batch, views))

    def half() -> npt.NDArray[np.bool_]:
        return uniform(0, 1) < 0.5

    return make_table(
        views,
        batch,
        flip=half(),
        jitter=uniform(0, 1) < 0.9,
        order=(np.arange(batch)[:, None] + 7 * np.arange(views)) % 24,
        brightness=uniform(-0.4, 0.4) if semantics == "deepmind" else uniform(0.4, 1.6),
        contrast=uniform(0.4, 1.8),
        saturation=uniform(0, 3),
        hue=uniform(-0.5, 0.5),
        grey=uniform(0, 1) < 0.2,
        sigma=half() * uniform(0.1, 2),
        solarize=half(),
    )


# ---- Golden values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "taps"), [(224, 23), (192, 19), (160, 17), (128, 13), (96, 9), (32, 3), (19, 1)]
)
def test_blur_taps(size: int, taps: int) -> None:
    radius = make_spec(size).blur_radius
    one_sided = reference.blur_taps(np.array([0.1, 1.0, 2.0], dtype=np.float32), radius)
    assert one_sided.shape == (3, radius + 1) and 2 * radius + 1 == taps
    np.testing.assert_allclose(one_sided[:, 0] + 2 * one_sided[:, 1:].sum(axis=1), 1, atol=1e-6)


def test_blur_taps_of_sigma_one() -> None:
    taps = reference.blur_taps(np.array([1.0], dtype=np.float32), 11)
    np.testing.assert_allclose(taps[0, :2], [0.3989423, 0.2419707], atol=1e-6)


def test_zero_padding_darkens_the_border_and_reflection_does_not() -> None:
    white = torch.full((1, 1, 224, 224, 3), 255, dtype=torch.uint8)
    table = make_table(1, 1, sigma=2)
    zeros = reference.apply(white, table, make_spec(224))[0, 0]
    assert zeros[:, 0, 0].tolist() == pytest.approx([0.359683] * 3, abs=1e-6)
    assert zeros[:, 0, 112].tolist() == pytest.approx([0.599736] * 3, abs=1e-6)
    assert zeros[:, 112, 223].tolist() == pytest.approx([0.599736] * 3, abs=1e-6)
    assert zeros[:, 112, 112].tolist() == pytest.approx([1] * 3, abs=1e-6)
    reflected = reference.apply(white, table, make_spec(224, "torchvision"))
    torch.testing.assert_close(reflected, torch.ones_like(reflected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("semantics", "column", "amount", "first", "second"),
    [
        ("deepmind", "contrast", 1.4, [0.08, 0.4, 0.68], [0.92, 0.4, 0.12]),
        ("torchvision", "contrast", 1.4, [0.10806, 0.38806, 0.66806], None),
        ("deepmind", "saturation", 0.8, [0.28, 0.44, 0.6], None),
        ("torchvision", "saturation", 0.8, [0.232596, 0.392596, 0.552596], None),
        ("deepmind", "hue", 0.1, [0.24, 0.2, 0.6], None),
        ("torchvision", "hue", 0.1, [0.24, 0.2, 0.6], None),
        ("deepmind", "brightness", 0.3, [0.5, 0.7, 0.9], [1.0, 0.7, 0.5]),
        ("torchvision", "brightness", 1.5, [0.3, 0.6, 0.9], [1.0, 0.6, 0.3]),
    ],
)
def test_golden_colours(
    semantics: Semantics,
    column: str,
    amount: float,
    first: list[float],
    second: list[float] | None,
) -> None:
    """A chequerboard of [.2, .4, .6] and [.8, .4, .2]; an order each, as order must not matter."""
    crops = torch.empty((1, 24, 8, 8, 3), dtype=torch.uint8)
    odd = (torch.arange(8)[:, None] + torch.arange(8)) % 2 == 1
    crops[:, :, ~odd] = torch.tensor([51, 102, 153], dtype=torch.uint8)
    crops[:, :, odd] = torch.tensor([204, 102, 51], dtype=torch.uint8)
    neutral = {"brightness": 0.0 if semantics == "deepmind" else 1.0}
    columns = {"jitter": 1, "order": np.arange(24)[:, None], **neutral, column: amount}
    out = reference.apply(crops, make_table(1, 24, **columns), make_spec(8, semantics))
    for colour, where in ((first, ~odd), (second, odd)):
        if colour is not None:
            got = out[0][:, :, where]  # [24, 3, pixels]
            torch.testing.assert_close(
                got, torch.tensor(colour)[:, None].expand_as(got), atol=1e-6, rtol=0
            )


def test_golden_grey_and_solarize() -> None:
    crops = torch.tensor([51, 102, 204], dtype=torch.uint8).expand(1, 2, 8, 8, 3)
    table = make_table(1, 2, grey=[[1], [0]], solarize=[[0], [1]])
    out = reference.apply(crops, table, make_spec(8))[0, :, :, 3, 5]
    grey = 0.2 * 0.2989 + 0.4 * 0.587 + 0.8 * 0.114
    assert out[0].tolist() == pytest.approx([grey] * 3, abs=1e-6)
    assert out[1].tolist() == pytest.approx([0.2, 0.4, 0.2], abs=1e-6)


# ---- Against other implementations --------------------------------------------------------------


def deepmind_image(
    pixels: npt.NDArray[np.uint8], row: npt.NDArray[np.float32], radius: int, threshold: float
) -> npt.NDArray[np.float64]:
    """One image `[S,S,3]` in float64, one pixel at a time, through HSV and a two-way blur."""
    p = {column: float(row[column]) for column in Colour}
    x = pixels / 255.0
    if p[Colour.FLIP]:
        x = x[:, ::-1].copy()  # whole, so that its pixels can be written to below
    if p[Colour.JITTER]:
        for operation in JITTER_ORDERS[int(p[Colour.ORDER])]:
            if operation == 0:
                x = x + p[Colour.BRIGHTNESS]
            elif operation == 1:
                mean = np.average(x.reshape(-1, 3), axis=0)
                x = mean + p[Colour.CONTRAST] * (x - mean)
            else:
                for pixel in x.reshape(-1, 3):
                    h, s, v = colorsys.rgb_to_hsv(*pixel)
                    if operation == 2:
                        s = min(max(s * p[Colour.SATURATION], 0.0), 1.0)
                    else:
                        h = (h + p[Colour.HUE]) % 1.0
                    pixel[:] = colorsys.hsv_to_rgb(h, s, v)
            x = np.clip(x, 0, 1)
    if p[Colour.GREY]:
        x = np.repeat((x @ [0.2989, 0.587, 0.114])[..., None], 3, axis=2)
    x = np.clip(x, 0, 1)
    if p[Colour.SIGMA]:
        distance = np.abs(np.arange(-radius, radius + 1))
        line = np.exp(-(distance**2) / (2 * p[Colour.SIGMA] ** 2))
        kernel = np.outer(line, line) / line.sum() ** 2
        padded = np.pad(x, ((radius, radius), (radius, radius), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape, axis=(0, 1))
        x = np.einsum("yxcij,ij->yxc", windows, kernel)
    if p[Colour.SOLARIZE]:
        x = np.where(x < threshold, x, 1 - x)
    return np.clip(x, 0, 1)


def torchvision_image(crop: Tensor, row: Tensor, radius: int, threshold: float) -> Tensor:
    """One image uint8 `[S,S,3]` through torchvision's own operations: float32 `[3,S,S]`."""
    p = {column: float(row[column]) for column in Colour}
    x = tv.to_dtype(crop.permute(2, 0, 1), torch.float32, scale=True)
    if p[Colour.FLIP]:
        x = tv.horizontal_flip(x)
    if p[Colour.JITTER]:
        for operation in JITTER_ORDERS[int(p[Colour.ORDER])]:
            adjust, column = (
                (tv.adjust_brightness, Colour.BRIGHTNESS),
                (tv.adjust_contrast, Colour.CONTRAST),
                (tv.adjust_saturation, Colour.SATURATION),
                (tv.adjust_hue, Colour.HUE),
            )[operation]
            x = adjust(x, p[column])
    if p[Colour.GREY]:
        x = tv.rgb_to_grayscale(x, num_output_channels=3)
    if p[Colour.SIGMA]:
        x = tv.gaussian_blur(x, [2 * radius + 1] * 2, [p[Colour.SIGMA]] * 2)
    return tv.solarize(x, threshold) if p[Colour.SOLARIZE] else x


# 8: no blur; 21, 45: odd, radii 1 and 2
@pytest.mark.parametrize(("views", "size"), [(1, 21), (2, 8), (2, 21), (1, 45)])
def test_deepmind_semantics(views: int, size: int) -> None:
    spec = make_spec(size)
    crops, table = make_crops(views, 24, size), strong_table(views, 24, "deepmind", seed=size)
    out = reference.apply(crops, table, spec)
    for v in range(views):
        for b in range(24):
            expected = deepmind_image(
                crops[v, b].numpy(), table[b, v].numpy(), spec.blur_radius, 0.5
            )
            got = out[v, b].permute(1, 2, 0).numpy()
            np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6, err_msg=f"{v}, {b}")


@pytest.mark.parametrize(("views", "size"), [(2, 8), (2, 33), (1, 45), (1, 224)])
def test_torchvision_semantics(views: int, size: int) -> None:
    spec, batch = make_spec(size, "torchvision"), 24 if size < 224 else 3
    crops, table = make_crops(views, batch, size), strong_table(views, batch, "torchvision", size)
    out = reference.apply(crops, table, spec)
    for v in range(views):
        for b in range(batch):
            expected = torchvision_image(crops[v, b], table[b, v], spec.blur_radius, 0.5)
            # 1e-5: float32 rounding of a hue, six times the circle, and of sums of 529 products
            torch.testing.assert_close(out[v, b], expected, rtol=0, atol=1e-5, msg=f"{v}, {b}")


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_each_view_has_its_own_solarize_threshold(semantics: Semantics) -> None:
    views = (replace(VIEW1, solarize_threshold=0.3), replace(VIEW2, solarize_threshold=0.7))
    spec = replace(make_spec(8, semantics), views=views)
    crops = torch.full((2, 3, 8, 8, 3), 127, dtype=torch.uint8)
    out = reference.apply(crops, make_table(2, 3, solarize=1), spec)
    torch.testing.assert_close(out[0], torch.full_like(out[0], 128 / 255))
    torch.testing.assert_close(out[1], torch.full_like(out[1], 127 / 255))


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_results_stay_within_zero_and_one(semantics: Semantics) -> None:
    """Taps sum to 1 only within rounding, and solarize turns what is above 1 to below 0."""
    crops = torch.full((2, 64, 64, 64, 3), 255, dtype=torch.uint8)
    sigma = np.linspace(0.1, 2, 64)[:, None]
    table = make_table(2, 64, sigma=sigma, solarize=[[0, 1]])
    out = reference.apply(crops, table, make_spec(64, semantics))
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("level", [0, 77, 255])
def test_pixels_without_colour_stay_so(semantics: Semantics, level: int) -> None:
    """Hue and saturation divide by zero there."""
    crops = torch.full((1, 24, 8, 8, 3), level, dtype=torch.uint8)
    neutral = 0.0 if semantics == "deepmind" else 1.0
    table = make_table(
        1, 24, jitter=1, order=np.arange(24)[:, None], brightness=neutral, saturation=1.7, hue=0.3
    )
    out = reference.apply(crops, table, make_spec(8, semantics))
    # torchvision blends with a grey whose weights sum to .9999: x 1.00007 for a factor of 1.7
    torch.testing.assert_close(out, torch.full_like(out, level / 255), atol=1e-4, rtol=0)


# ---- The plan's probabilities -------------------------------------------------------------------


def through_the_plan(crops: Tensor, view: ViewSpec, semantics: Semantics) -> Tensor:
    views, batch, size = crops.shape[:3]
    spec = replace(make_spec(size, semantics), views=(view, view))
    plan = EpochPlan(spec, seed=3, epoch=1, sizes=np.full((batch, 2), 256))
    colours = torch.from_numpy(plan.colours(np.arange(batch)))[:, :views]
    return reference.apply(crops, colours, spec)


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("views", [1, 2])
def test_probabilities_zero_and_one(semantics: Semantics, views: int) -> None:
    crops = make_crops(views, 12, 24)
    plain = reference.normalise(crops, make_spec(24))
    assert torch.equal(through_the_plan(crops, OFF, semantics), plain)
    flipped = through_the_plan(crops, replace(OFF, flip=1), semantics)
    assert torch.equal(flipped, plain.flip(-1))
    grey = through_the_plan(crops, replace(OFF, grey=1), semantics)
    assert torch.equal(grey[:, :, 0], grey[:, :, 1]) and torch.equal(grey[:, :, 0], grey[:, :, 2])
    solarized = through_the_plan(crops, replace(OFF, solarize=1), semantics)
    assert torch.equal(solarized, torch.where(plain < 0.5, plain, 1 - plain))
    for view in (replace(OFF, jitter=1), replace(OFF, blur=1)):
        changed = through_the_plan(crops, view, semantics)
        assert (changed != plain).flatten(2).any(-1).all(), view
        assert changed.min() >= 0 and changed.max() <= 1


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_rows_that_need_nothing_are_not_touched(semantics: Semantics) -> None:
    """Alternate rows get everything; the others must come out as plain pixels, bit by bit."""
    crops = make_crops(2, 12, 24)
    table = strong_table(2, 12, semantics)
    table[..., [Colour.JITTER, Colour.GREY, Colour.SOLARIZE, Colour.FLIP]] = 1
    table[..., Colour.SIGMA] = 1.5
    table[::2] = make_table(2, 6)
    out, plain = reference.apply(crops, table, make_spec(24, semantics)), crops / 255
    assert torch.equal(out[:, ::2], plain[:, ::2].permute(0, 1, 4, 2, 3))
    assert (out[:, 1::2] != plain[:, 1::2].permute(0, 1, 4, 2, 3)).flatten(2).any(-1).all()


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("size", [8, 19])
def test_blur_below_twenty_pixels_is_no_operation(semantics: Semantics, size: int) -> None:
    crops = make_crops(2, 3, size)
    out = reference.apply(crops, make_table(2, 3, sigma=2), make_spec(size, semantics))
    assert torch.equal(out, reference.normalise(crops, make_spec(size)))


# ---- Memory, dtypes, devices, batches ------------------------------------------------------------


def test_normalisation_is_torchvisions() -> None:
    spec = AugmentSpec(image_size=24)
    crops = make_crops(2, 3, 24)
    expected = tv.normalize(crops.permute(0, 1, 4, 2, 3) / 255, list(spec.mean), list(spec.std))
    torch.testing.assert_close(reference.normalise(crops, spec), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        reference.apply(crops, make_table(2, 3), spec), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("views", [1, 2])
def test_layout_and_dtype(views: int, dtype: torch.dtype, device: str) -> None:
    spec = AugmentSpec(image_size=21)
    crops = make_crops(views, 5, 21).to(device)
    table = strong_table(views, 5, "deepmind")
    for got, full in (
        (reference.apply(crops, table, spec, dtype=dtype), reference.apply(crops, table, spec)),
        (reference.normalise(crops, spec, dtype=dtype), reference.normalise(crops, spec)),
    ):
        assert got.shape == (views, 5, 3, 21, 21) and got.dtype == dtype
        assert got.device == crops.device
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in got)
        assert torch.equal(got, full.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_table_on_either_side_gives_the_same(semantics: Semantics, device: str) -> None:
    spec = make_spec(24, semantics)
    crops, table = make_crops(2, 8, 24), strong_table(2, 8, semantics)
    expected = reference.apply(crops, table, spec)
    for colours in (table, table.to(device)):
        out = reference.apply(crops.to(device), colours, spec).cpu()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_synchronisation_with_a_table_on_the_host() -> None:
    spec, table = AugmentSpec(image_size=32), strong_table(2, 8, "deepmind")
    crops = make_crops(2, 8, 32).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = reference.apply(crops, table, spec), reference.normalise(crops, spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in out)


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("size", [21, 32, 224])
def test_a_row_does_not_depend_on_the_others(semantics: Semantics, size: int) -> None:
    """Bit by bit: alone or in a batch, in whatever order, with one thread or two."""
    batch, spec = (5 if size == 224 else 26), AugmentSpec(image_size=size, semantics=semantics)
    crops, table = make_crops(2, batch, size), strong_table(2, batch, semantics)
    out = reference.apply(crops, table, spec)
    for b in range(0, batch, 4):
        for v in (0, 1):
            alone = reference.apply(crops[v, b][None, None], table[b, v][None, None], spec)
            assert torch.equal(alone[0, 0], out[v, b]), (v, b)
    shuffled = torch.randperm(batch, generator=torch.Generator().manual_seed(1))
    assert torch.equal(reference.apply(crops[:, shuffled], table[shuffled], spec), out[:, shuffled])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(reference.apply(crops, table, spec), out), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("floats", [1, 4000, 1 << 30])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, floats: int) -> None:
    spec, crops, table = make_spec(21), make_crops(2, 30, 21), strong_table(2, 30, "deepmind")
    expected = reference.apply(crops, table, spec)
    monkeypatch.setattr(reference, "_CHUNK_CPU", floats)
    assert torch.equal(reference.apply(crops, table, spec), expected)


def test_inputs_may_be_strided_and_are_not_written_to() -> None:
    spec, crops, table = make_spec(21), make_crops(2, 6, 21), strong_table(2, 6, "deepmind")
    strided = crops.transpose(0, 1).contiguous().transpose(0, 1)
    kept = crops.clone(), table.clone()
    out = reference.apply(crops, table, spec)
    assert torch.equal(reference.apply(strided, table, spec), out)
    assert torch.equal(reference.normalise(strided, spec), reference.normalise(crops, spec))
    assert torch.equal(crops, kept[0]) and torch.equal(table, kept[1])


def test_an_empty_batch_is_allowed() -> None:
    out = reference.apply(make_crops(2, 0, 21), make_table(2, 0), make_spec(21))
    assert out.shape == (2, 0, 3, 21, 21)


@pytest.mark.parametrize(
    "crops",
    [
        torch.zeros(2, 4, 24, 24, 3),
        torch.zeros(2, 4, 3, 24, 24, dtype=torch.uint8),
        torch.zeros(3, 4, 24, 24, 3, dtype=torch.uint8),
        torch.zeros(2, 4, 32, 32, 3, dtype=torch.uint8),
        torch.zeros(4, 24, 24, 3, dtype=torch.uint8),
    ],
    ids=["float", "channels first", "three views", "other size", "one view too few axes"],
)
def test_wrong_crops_are_refused(crops: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[V,B,S,S,3\]"):
        reference.apply(crops, make_table(2, 4), make_spec(24))
    with pytest.raises(ValueError, match=r"uint8 \[V,B,S,S,3\]"):
        reference.normalise(crops, make_spec(24))


def test_a_table_of_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"colours must be .*\[4, 2, 10\]"):
        reference.apply(make_crops(2, 4, 24), make_table(2, 5), make_spec(24))
