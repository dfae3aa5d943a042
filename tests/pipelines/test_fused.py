"""`pipelines.augment.fused` against the reference. Without a GPU Triton's interpreter runs it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines import augment
from pipelines.augment import reference
from pipelines.plan import EpochPlan
from pipelines.spec import VIEW1, VIEW2, AugmentSpec, Colour, Semantics, ViewSpec
from tests.pipelines.test_augment import (
    OFF,
    SEMANTICS,
    make_crops,
    make_spec,
    make_table,
    strong_table,
)

fused = pytest.importorskip("pipelines.augment.fused", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On [0, 1]. In float32 a hue's quotient is off by two units in the last place at most, 1e-6 of its
# six sixths, and a contrast and a saturation after it make that five times as much. The planes'
# fixed point adds 1 / 131070 = 7.6e-6 in each of two passes. (The interpreter: 1.3e-6 and 1.5e-5.)
PLAIN, BLURRED = 1e-5, 3e-5
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run(
    crops: Tensor, table: Tensor, spec: AugmentSpec, dtype: torch.dtype = torch.float32
) -> Tensor:
    out: Tensor = fused.apply(crops.to(DEVICE), table, spec, dtype=dtype)
    return out.cpu()


def check(crops: Tensor, table: Tensor, spec: AugmentSpec) -> Tensor:
    """Every row within its bound of the reference; the result."""
    got, expected = run(crops, table, spec), reference.apply(crops, table, spec)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    apart = (got - expected).abs().flatten(2).amax(-1)  # [V,B]
    blurred = (table[..., Colour.SIGMA].T > 0) & (spec.blur_radius > 0)
    bound = torch.where(blurred, BLURRED, PLAIN)
    assert (apart <= bound).all(), f"{apart[~blurred]} {apart[blurred]}"
    return got


def large_tiles(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """The interpreter takes its time for every instruction, hardly more for a large tile."""
    if DEVICE == "cpu":
        monkeypatch.setattr(fused, "TILE", tile)


# ---- Every operation, order, size ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_every_order(semantics: Semantics) -> None:
    table = strong_table(2, 12, semantics)
    table[..., Colour.ORDER] = torch.arange(24.0).view(12, 2)
    table[..., Colour.JITTER] = 1
    table[3:, :, Colour.SIGMA] = 0  # which takes the interpreter longest, and knows no order
    check(make_crops(2, 12, 32), table, make_spec(32, semantics))


# 8, 19: no blur; 21, 33: odd, one pixel beyond a tile; 160, 224: 17 and 23 taps
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize(
    ("views", "batch", "size", "tile"),
    [
        (2, 2, 8, 32),
        pytest.param(1, 3, 19, 32, marks=pytest.mark.slow),
        (2, 1, 21, 32),
        pytest.param(1, 2, 33, 32, marks=pytest.mark.slow),
        pytest.param(1, 1, 96, 64, marks=pytest.mark.slow),
        pytest.param(1, 1, 160, 256, marks=pytest.mark.slow),
        (1, 1, 224, 256),
    ],
)
def test_sizes(
    monkeypatch: pytest.MonkeyPatch,
    views: int,
    batch: int,
    size: int,
    tile: int,
    semantics: Semantics,
) -> None:
    large_tiles(monkeypatch, tile)
    table = strong_table(views, batch, semantics, seed=size)
    table[0, :, Colour.JITTER] = 1
    table[0, :, Colour.FLIP] = 1
    table[0, :, Colour.SIGMA] = 1.7
    check(make_crops(views, batch, size), table, make_spec(size, semantics))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("size", [20, 21, 31, 32, 33, 96, 127, 160, 224, 225, 384])
def test_sizes_with_every_order_on_a_gpu(size: int, semantics: Semantics) -> None:
    table = strong_table(2, 48, semantics, seed=size)
    check(make_crops(2, 48, size), table, make_spec(size, semantics))


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("name", ["flip", "jitter", "grey", "blur", "solarize", "nothing", "all"])
def test_probabilities_zero_and_one(name: str, semantics: Semantics) -> None:
    names = ["flip", "jitter", "grey", "blur", "solarize"] if name == "all" else [name]
    view: ViewSpec = OFF if name == "nothing" else replace(OFF, **dict.fromkeys(names, 1))
    spec, crops = replace(make_spec(20, semantics), views=(view, view)), make_crops(2, 1, 20)
    plan = EpochPlan(spec, seed=3, epoch=1, sizes=np.full((1, 2), 256))
    got = check(crops, torch.from_numpy(plan.colours(np.arange(1))), spec)
    changed = ((got - reference.normalise(crops, spec)).abs() > 1e-3).flatten(2).any(-1)
    assert changed.all() if name != "nothing" else not changed.any()


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_each_view_has_its_own_solarize_threshold(semantics: Semantics) -> None:
    views = (replace(VIEW1, solarize_threshold=0.3), replace(VIEW2, solarize_threshold=0.7))
    spec = replace(make_spec(8, semantics), views=views)
    crops = torch.full((2, 2, 8, 8, 3), 127, dtype=torch.uint8)
    out = run(crops, make_table(2, 2, solarize=1), spec)
    torch.testing.assert_close(out[0], torch.full_like(out[0], 128 / 255))
    torch.testing.assert_close(out[1], torch.full_like(out[1], 127 / 255))


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_results_stay_within_zero_and_one(semantics: Semantics) -> None:
    crops = torch.full((1, 2, 24, 24, 3), 255, dtype=torch.uint8)
    table = make_table(1, 2, sigma=[[0.9], [2]], solarize=[[0], [1]])
    out = run(crops, table, make_spec(24, semantics))
    assert out.min() >= 0 and out.max() <= 1


# ---- Golden values ------------------------------------------------------------------------------

GOLDEN = {
    ("deepmind", "contrast", 1.4): ([0.08, 0.4, 0.68], [0.92, 0.4, 0.12]),
    ("torchvision", "contrast", 1.4): ([0.10806, 0.38806, 0.66806], None),
    ("deepmind", "saturation", 0.8): ([0.28, 0.44, 0.6], None),
    ("torchvision", "saturation", 0.8): ([0.232596, 0.392596, 0.552596], None),
    ("deepmind", "hue", 0.1): ([0.24, 0.2, 0.6], None),
    ("torchvision", "hue", 0.1): ([0.24, 0.2, 0.6], None),
    ("deepmind", "brightness", 0.3): ([0.5, 0.7, 0.9], [1.0, 0.7, 0.5]),
    ("torchvision", "brightness", 1.5): ([0.3, 0.6, 0.9], [1.0, 0.6, 0.3]),
}


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_golden_colours(semantics: Semantics) -> None:
    """A chequerboard of [.2, .4, .6] and [.8, .4, .2]; a row for each of the four operations."""
    wanted = [(key, value) for key, value in GOLDEN.items() if key[0] == semantics]
    crops = torch.empty((1, 4, 8, 8, 3), dtype=torch.uint8)
    odd = (torch.arange(8)[:, None] + torch.arange(8)) % 2 == 1
    crops[:, :, ~odd] = torch.tensor([51, 102, 153], dtype=torch.uint8)
    crops[:, :, odd] = torch.tensor([204, 102, 51], dtype=torch.uint8)
    neutral = 0.0 if semantics == "deepmind" else 1.0
    table = make_table(1, 4, jitter=1, order=[[3], [9], [14], [20]], brightness=neutral)
    for row, ((_, column, amount), _) in enumerate(wanted):
        table[row, 0, Colour[column.upper()]] = amount
    out = run(crops, table, make_spec(8, semantics))[0]
    for row, (_, colours) in enumerate(wanted):
        for colour, where in zip(colours, (~odd, odd), strict=True):
            if colour is not None:
                got = out[row][:, where]
                torch.testing.assert_close(
                    got, torch.tensor(colour)[:, None].expand_as(got), atol=1e-6, rtol=0
                )


def test_golden_grey_and_solarize() -> None:
    crops = torch.tensor([51, 102, 204], dtype=torch.uint8).expand(1, 2, 8, 8, 3)
    out = run(crops, make_table(1, 2, grey=[[1], [0]], solarize=[[0], [1]]), make_spec(8))
    grey = 0.2 * 0.2989 + 0.4 * 0.587 + 0.8 * 0.114
    assert out[0, 0, :, 3, 5].tolist() == pytest.approx([grey] * 3, abs=1e-6)
    assert out[0, 1, :, 3, 5].tolist() == pytest.approx([0.2, 0.4, 0.2], abs=1e-6)


def test_zero_padding_darkens_the_border_and_reflection_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large_tiles(monkeypatch, 256)
    white = torch.full((1, 1, 224, 224, 3), 255, dtype=torch.uint8)
    table = make_table(1, 1, sigma=2)
    zeros = run(white, table, make_spec(224))[0, 0]
    for (y, x), value in {
        (0, 0): 0.359683,
        (0, 112): 0.599736,
        (112, 223): 0.599736,
        (112, 112): 1.0,
    }.items():
        assert zeros[:, y, x].tolist() == pytest.approx([value] * 3, abs=BLURRED)
    reflected = run(white, table, make_spec(224, "torchvision"))
    torch.testing.assert_close(reflected, torch.ones_like(reflected), atol=BLURRED, rtol=0)


# ---- Memory, dtypes, batches --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_and_dtype(dtype: torch.dtype) -> None:
    spec = AugmentSpec(image_size=21)
    crops, table = make_crops(2, 2, 21), strong_table(2, 2, "deepmind", seed=2)
    assert 0 < (table[..., Colour.SIGMA] > 0).sum() < 4
    got = fused.apply(crops.to(DEVICE), table, spec, dtype=dtype)
    assert got.shape == (2, 2, 3, 21, 21) and got.dtype == dtype and got.device.type == DEVICE
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in got)
    full = reference.apply(crops, table, spec)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        rounding *= 2  # the interpreter cuts off
    apart = (got.cpu().float() - full).abs() - rounding * full.abs()
    assert apart.max() * 0.225 <= 2 * BLURRED  # 0.225 undoes the normalisation


def test_a_row_does_not_depend_on_the_others() -> None:
    """Bit by bit: alone or in a batch, in whatever order."""
    spec = AugmentSpec(image_size=21)
    crops, table = make_crops(2, 3, 21), strong_table(2, 3, "deepmind", seed=5)
    assert (table[..., Colour.SIGMA] > 0).any() and (table[..., Colour.JITTER] > 0).any()
    out = run(crops, table, spec)
    alone = run(crops[1, 2][None, None], table[2, 1][None, None], spec)
    assert torch.equal(alone[0, 0], out[1, 2])
    shuffled = torch.tensor([2, 0, 1])
    assert torch.equal(run(crops[:, shuffled], table[shuffled], spec), out[:, shuffled])


def test_inputs_may_be_strided_and_are_not_written_to() -> None:
    spec, crops, table = make_spec(21), make_crops(2, 2, 21), strong_table(2, 2, "deepmind")
    strided = crops.transpose(0, 1).contiguous().transpose(0, 1)
    kept = crops.clone(), table.clone()
    assert torch.equal(run(strided, table, spec), run(crops, table, spec))
    assert torch.equal(crops, kept[0]) and torch.equal(table, kept[1])


def launches(
    monkeypatch: pytest.MonkeyPatch, crops: Tensor, table: Tensor, spec: AugmentSpec
) -> list[tuple[str, int, dict[str, Tensor]]]:
    """Kernel, programs and tensors of every launch, none of which is made."""
    made: list[tuple[str, int, dict[str, Tensor]]] = []

    def record(kernel: Any, programs: int, *arguments: Tensor, **sizes: int) -> None:
        names = kernel.arg_names[: len(arguments)]
        made.append((kernel.__name__, programs, dict(zip(names, arguments, strict=True))))

    monkeypatch.setattr(fused, "_launch", record)
    run(crops, table, spec)
    return made


def test_launches_and_the_blurs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    crops, spec = make_crops(2, 3, 33), make_spec(33)
    table = make_table(2, 3, jitter=[[1, 0]] * 3, sigma=[[0, 1], [0, 0], [2, 0]])
    sums, colour, first, last = launches(monkeypatch, crops, table, spec)
    assert [made[0] for made in (sums, colour, first, last)] == ["sums", "colour", "blur", "blur"]
    assert sums[1] == 3 * 2 and sums[2]["jittered"].tolist() == [0, 1, 2]
    assert colour[1] == 6 * 4
    for made in (first, last):
        assert made[1] == 2 * 3 * 4
        assert made[2]["source"].shape == (2, 3, 33, 33)  # of the rows that are blurred
        assert made[2]["source"].dtype == torch.uint16
        assert made[2]["blurs"][:, 0].tolist() == [2, 3]  # view 0 of the third, view 1 of the first
    for made in (sums, colour, first, last):
        assert all(tensor.data_ptr() % 16 == 0 for tensor in made[2].values())


def test_nothing_is_launched_for_what_no_row_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        made[0]
        for made in launches(monkeypatch, make_crops(2, 3, 33), make_table(2, 3), make_spec(33))
    ]
    assert names == ["colour"]
    below_twenty = launches(
        monkeypatch, make_crops(2, 3, 19), make_table(2, 3, sigma=2), make_spec(19)
    )
    assert [made[0] for made in below_twenty] == ["colour"]


def test_an_empty_batch_is_allowed() -> None:
    out = run(make_crops(2, 0, 21), make_table(2, 0), make_spec(21))
    assert out.shape == (2, 0, 3, 21, 21)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    crops, table, spec = make_crops(2, 4, 24), make_table(2, 4), make_spec(24)
    with pytest.raises(ValueError, match=r"uint8 \[V,B,S,S,3\]"):
        run(crops.float(), table, spec)
    with pytest.raises(ValueError, match=r"image_size = 32"):
        run(crops, table, make_spec(32))
    with pytest.raises(ValueError, match=r"colours must be .*\[4, 2, 10\]"):
        run(crops, make_table(2, 5), spec)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        run(crops, table, spec, torch.float64)
    monkeypatch.setattr(fused, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"on a GPU, got cpu"):
        fused.apply(crops, table, spec)


# ---- On a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
def test_no_synchronisation_and_the_same_bits_each_time() -> None:
    spec, table = AugmentSpec(image_size=96), strong_table(2, 32, "deepmind")
    crops = make_crops(2, 32, 96).cuda()
    first = fused.apply(crops, table, spec, dtype=torch.bfloat16)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [fused.apply(crops, table, spec, dtype=torch.bfloat16) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, other) for other in again)
    assert torch.equal(fused.apply(crops, table.cuda(), spec, dtype=torch.bfloat16), first)


@pytest.mark.gpu
@needs_gpu
def test_offsets_past_two_to_the_31_on_a_gpu() -> None:
    """A batch of 2.2 GB of crops, all blurred, of which the last rows are looked at."""
    rows = 2**31 // (3 * 224**2) + 40
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    spec = AugmentSpec(image_size=224)
    crops = torch.zeros((1, rows, 224, 224, 3), dtype=torch.uint8, device="cuda")
    table = make_table(1, rows, jitter=1, contrast=1.3, sigma=1)
    crops[:, -4:] = make_crops(1, 4, 224).cuda()
    out = fused.apply(crops, table, spec, dtype=torch.float16)[:, -4:].float()
    expected = reference.apply(crops[:, -4:], table[-4:], spec)
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=1e-3)


# Compiles what `apply` would launch, as on a machine with an H100 or H200.
COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipelines.augment import fused
from tests.pipelines.test_augment import make_crops, make_spec, make_table

KINDS = {
    torch.uint8: "*u8", torch.uint16: "*u16", torch.float32: "*fp32",
    torch.bfloat16: "*bf16", torch.float16: "*fp16",
}

def compile(kernel, programs, *arguments, **sizes):
    names = kernel.arg_names
    signature = {n: KINDS[t.dtype] for n, t in zip(names, arguments)}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arguments))}
    signature |= dict.fromkeys(names[len(arguments):], "constexpr")
    source = ASTSource(kernel, signature, constexprs=sizes, attrs=aligned)
    options = {**fused._OPTIONS, "num_warps": fused._WARPS[kernel.__name__]}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, len(built.asm["cubin"]))

fused.INTERPRETED, fused._launch = True, compile
for size, semantics, dtype in (
    (224, "deepmind", torch.bfloat16), (33, "torchvision", torch.float16),
):
    table = make_table(1, 1, jitter=1, sigma=1)
    fused.apply(make_crops(1, 1, size), table, make_spec(size, semantics), dtype=dtype)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_an_h200(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does: shapes, types, what Python allows."""
    import triton

    if not list(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):
        pytest.skip("this Triton has no ptxas")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == ["sums", "colour", "blur", "blur"] * 2
    assert all(int(size) > 1000 for _, size in lines)


# ---- Which augmentation a run takes -------------------------------------------------------------

GPU = torch.device("cuda")


def test_a_cpu_takes_the_reference() -> None:
    spec, crops, table = make_spec(24), make_crops(2, 2, 24), strong_table(2, 2, "deepmind")
    chosen = augment.choose(spec, torch.device("cpu"), torch.bfloat16)
    expected = reference.apply(crops, table, spec, dtype=torch.bfloat16)
    assert torch.equal(chosen(crops, table), expected)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch\.int8"):
        augment.choose(spec, torch.device("cpu"), torch.int8)


def test_a_gpu_takes_the_kernels_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused, "self_check", lambda *_: 1.2e-5)
    with caplog.at_level(logging.INFO):
        chosen = augment.choose(make_spec(24), GPU, torch.float16)
    assert chosen.func is fused.apply and chosen.keywords["dtype"] == torch.float16
    (record,) = caplog.records
    assert record.levelname == "INFO" and "Triton kernels" in record.message
    assert "1e-05" in record.message


@pytest.mark.parametrize("cause", ["missing", "failing"])
def test_without_working_kernels_a_gpu_takes_the_reference_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("no C compiler found")

    if cause == "missing":
        monkeypatch.delattr(augment, "fused")
        monkeypatch.setitem(sys.modules, "pipelines.augment.fused", None)
    else:
        monkeypatch.setattr(fused, "self_check", fail)
    with caplog.at_level(logging.INFO):
        chosen = augment.choose(make_spec(24), GPU)
    assert chosen.func is reference.apply
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "plain torch" in record.message
    assert ("pip install triton" if cause == "missing" else "no C compiler") in record.message


def test_the_self_check_passes_and_sees_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, device = AugmentSpec(image_size=8), torch.device(DEVICE)
    results: list[Tensor] = []
    whole = fused.apply

    def kept(*arguments: Any, **options: Any) -> Tensor:
        results.append(whole(*arguments, **options))
        return results[0].clone()

    monkeypatch.setattr(fused, "apply", kept)
    assert fused.self_check(spec, device, torch.float16) < PLAIN
    one_pixel_wrong, not_a_number = results[0].clone(), results[0].clone()
    one_pixel_wrong[0, 3, :, 7, 7] += 0.05
    not_a_number[1, 5, 0] = float("nan")
    for result in (one_pixel_wrong, not_a_number):
        monkeypatch.setattr(fused, "apply", lambda *_, result=result, **__: result)
        with pytest.raises(RuntimeError, match="further than 1/255"):
            fused.self_check(spec, device, torch.float16)


def test_build_gives_views_in_the_dtype_asked_for() -> None:
    import pipelines

    options: dict[str, Any] = {"spec": AugmentSpec(image_size=24), "batch_size": 4}
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = pipelines.build("synthetic:8", **options, dtype=dtype)
        (views,) = pipeline.steps(0, 1)
        pipeline.close()
        assert views.x.dtype == dtype and views.x.isfinite().all()
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        pipelines.build("synthetic:8", **options, dtype=torch.float64)


@pytest.mark.gpu
@needs_gpu
def test_a_pipeline_on_a_gpu_augments_with_the_kernels(caplog: pytest.LogCaptureFixture) -> None:
    import pipelines

    with caplog.at_level(logging.INFO):
        pipeline = pipelines.build(
            "synthetic:16",
            spec=AugmentSpec(image_size=64),
            batch_size=8,
            device="cuda",
            dtype=torch.bfloat16,
        )
    (views,) = pipeline.steps(0, 1)
    pipeline.close()
    assert views.x.is_cuda and views.x.dtype == torch.bfloat16 and views.x.isfinite().all()
    assert any("Triton kernels" in record.message for record in caplog.records)
