"""The colour table carried out by four Triton kernels; `reference` says what they have to do.

1. `sums`: for rows that are jittered, what their contrast needs the mean of.
2. `colour`: flip, jitter and grey of all rows. A row without blur is finished here.
3. `blur`, twice: along x, then along y, with all that comes after the blur.

Only blurred rows are kept between kernels, as 16-bit fixed point: the bytes of half precision, with
an error of 8e-6 a pass where that has 2e-4. The table is on the host, so which rows those are is
known without asking the GPU, and it goes over in one copy that nobody waits for.

Sums have a fixed order and each row its own programs, so a row comes out the same to the last bit
each time and in any batch. Needs Triton, and a GPU unless Triton interprets (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from pipelines.augment import DTYPES, reference
from pipelines.augment import fused_kernels as kernels
from pipelines.augment.fused_kernels import ROW_COLUMNS, Row
from pipelines.augment.reference import Table, blur_taps, check_crops, host_table
from pipelines.plan import EpochPlan
from pipelines.spec import JITTER_ORDERS, AugmentSpec, Colour

INTERPRETED = bool(triton.knobs.runtime.interpret)

# Pixels of a tile's side. 32 divides 32, 96, 160 and 224; a line of a tile is three sectors of 32
# bytes in the crop and two in the planes.
TILE = 32
# Chosen from the code compiled for sm_90: no spills, at most 64 registers, so 32 to 48 warps on a
# multiprocessor, and 128-bit loads and stores of the planes. Not tuned on a GPU.
_WARPS = {"sums": 8, "colour": 4, "blur": 1}
# Fusing a * b + c is Triton's default up to 3.9, which warns unless it is told; later it is not.
_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}

_ORDER_BITS = np.array([sum(op << 2 * k for k, op in enumerate(o)) for o in JITTER_ORDERS])
_CONTRAST_AT = np.array([order.index(1) for order in JITTER_ORDERS])
_COPIED = {
    Row.BRIGHTNESS: Colour.BRIGHTNESS,
    Row.CONTRAST: Colour.CONTRAST,
    Row.SATURATION: Colour.SATURATION,
    Row.HUE: Colour.HUE,
}
_NEGLIGIBLE = 1e-7  # of taps that sum to 1, so lost in float32; sigma 1 leaves 5 of 11 a side


def apply(
    crops: Tensor,  # uint8 [V,B,S,S,3]
    colours: Tensor,  # float32 [B,V,len(Colour)]
    spec: AugmentSpec,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`reference.apply` in at most four launches: `[V,B,3,S,S]`, every `out[v]` channels_last.

    On [0, 1] it is within 3e-5 of the reference, 1e-5 in rows without blur, before `dtype` rounds
    it. Where `solarize_threshold` is not 0.5, solarize jumps there, and a pixel that close to it
    can fall on the other side. Strided crops are copied first. No synchronisation with the table on
    the host, one with a table on the GPU.

    Raises:
        ValueError: as the reference; crops not on a GPU; a dtype that is none of `DTYPES`.
    """
    check_crops(crops, spec)
    table = host_table(colours, crops)
    if crops.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"crops must be on a GPU, got {crops.device}; use augment.reference there")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is float32, bfloat16 or float16, got {dtype}")
    views, batch, size = crops.shape[:3]
    out = torch.empty((views * batch, size, size, 3), dtype=dtype, device=crops.device)
    if len(out):
        device = torch.cuda.device(crops.device) if crops.is_cuda else contextlib.nullcontext()
        with device:  # Triton launches on the current one
            _run(crops.contiguous(), out, table, spec)
    return out.view(views, batch, size, size, 3).permute(0, 1, 4, 2, 3)


def self_check(spec: AugmentSpec, device: torch.device, dtype: torch.dtype) -> float:
    """Runs the kernels that `spec` and `dtype` need, on noise; how far they are from the reference.

    On [0, 1], beyond what `dtype` rounds, the largest of all values. One call to the reference, one
    synchronisation, and the time of compiling where Triton's cache does not hold the kernels.

    Raises:
        RuntimeError: more than one value in 10,000 is further away than 1/255. (Not none: see
            `apply` about thresholds.)
        Exception: whatever the compiler, its launcher or the driver raise.
    """
    batch, size = len(JITTER_ORDERS) // 2, spec.image_size
    noise = np.random.default_rng(0).integers(0, 256, (2, batch, size, size, 3), dtype=np.uint8)
    plan = EpochPlan(spec, seed=0, epoch=0, sizes=np.full((batch, 2), 256))
    colours = plan.colours(np.arange(batch))
    colours[..., Colour.ORDER] = np.arange(len(JITTER_ORDERS)).reshape(batch, 2)
    crops, table = torch.from_numpy(noise).to(device), torch.from_numpy(colours)
    got = apply(crops, table, spec, dtype=dtype).float()
    expected = reference.apply(crops, table, spec)
    rounding = expected.abs() * (torch.finfo(dtype).eps / 2)
    std = torch.tensor(spec.std, device=device).view(3, 1, 1)
    apart = ((got - expected).abs() - rounding).clamp_min(0) * std
    share = 1 - (apart <= 1 / 255).float().mean().item()  # NaN is not within it
    if share > 1e-4:
        raise RuntimeError(f"{share:.2%} of the values are further than 1/255 from the reference")
    return apart.max().item()


def _run(crops: Tensor, out: Tensor, table: Table, spec: AugmentSpec) -> None:
    size, device = spec.image_size, crops.device
    tiles = triton.cdiv(size, TILE)
    blurred = np.flatnonzero(table[:, Colour.SIGMA] > 0) if spec.blur_radius else np.arange(0)
    jittered = np.flatnonzero(table[:, Colour.JITTER] > 0)
    norm, rows, jittered_rows, blurs = _send(
        [
            _norm(spec),
            _rows(table, blurred, spec, batch=crops.shape[1]),
            jittered.astype(np.float32),
            _blurs(blurred, table[blurred, Colour.SIGMA], spec.blur_radius),
        ],
        device,
    )
    partial = torch.empty(len(rows), tiles, 3, device=device)
    # Two tensors, so that both start at a multiple of 16 bytes for any size and count.
    shape = (len(blurred), 3, size, size)
    first, second = (torch.empty(shape, dtype=torch.uint16, device=device) for _ in range(2))

    sizes = {"SIZE": size, "TILE": TILE, "DEEPMIND": spec.semantics == "deepmind"}
    if len(jittered):
        _launch(kernels.sums, len(jittered) * tiles, crops, rows, jittered_rows, partial, **sizes)
    _launch(
        kernels.colour, len(rows) * tiles**2, crops, norm, rows, partial, first, out,
        BANDS=triton.next_power_of_2(tiles), **sizes,
    )  # fmt: skip
    if len(blurred):
        grid, sizes = len(blurred) * 3 * tiles**2, {**sizes, "WIDTH": blurs.shape[1]}
        _launch(kernels.blur, grid, first, second, norm, rows, blurs, LAST=False, **sizes)
        _launch(kernels.blur, grid, second, out, norm, rows, blurs, LAST=True, **sizes)


def _launch(kernel: Any, programs: int, *arguments: Tensor, **sizes: int) -> None:
    kernel[programs,](*arguments, **sizes, **_OPTIONS, num_warps=_WARPS[kernel.__name__])


def _norm(spec: AugmentSpec) -> Table:
    """x * scale + shift instead of (x - mean) / std: three scales, then three shifts."""
    mean, std = np.array(spec.mean), np.array(spec.std)
    return np.concatenate([1 / std, -mean / std]).astype(np.float32)


def _rows(table: Table, blurred: npt.NDArray[np.int64], spec: AugmentSpec, batch: int) -> Table:
    """The columns of `Row` for every row; row v * B + b belongs to view v."""
    rows = np.zeros((len(table), ROW_COLUMNS), dtype=np.float32)
    order = table[:, Colour.ORDER].astype(np.int64)
    jitter = table[:, Colour.JITTER] > 0
    thresholds = np.array([view.solarize_threshold for view in spec.views], dtype=np.float32)
    rows[:, Row.FLIP] = table[:, Colour.FLIP] > 0
    rows[:, Row.GREY] = table[:, Colour.GREY] > 0
    rows[:, Row.BLUR] = -1
    rows[blurred, Row.BLUR] = np.arange(len(blurred))
    limits = thresholds[np.arange(len(table)) // batch]
    rows[:, Row.LIMIT] = np.where(table[:, Colour.SOLARIZE] > 0, limits, np.inf)
    rows[:, Row.ORDER] = _ORDER_BITS[order]
    rows[:, Row.STEPS] = 4 * jitter
    rows[:, Row.BEFORE] = _CONTRAST_AT[order]
    for to, column in _COPIED.items():
        rows[:, to] = table[:, column]
    return rows


def _blurs(blurred: npt.NDArray[np.int64], sigma: Table, radius: int) -> Table:
    """Which row, how far its taps reach, and the taps from the centre outwards."""
    taps = blur_taps(sigma, radius)
    width = triton.cdiv(2 + taps.shape[1], 4) * 4  # a few sizes of crops, one alignment
    blurs = np.zeros((len(taps), width), dtype=np.float32)
    blurs[:, 0] = blurred
    blurs[:, 1] = (taps > _NEGLIGIBLE).sum(axis=1) - 1
    blurs[:, 2 : 2 + taps.shape[1]] = taps
    return blurs


def _send(arrays: list[Table], device: torch.device) -> list[Tensor]:
    """The arrays on the device, in one copy.

    Each starts at a multiple of 16 bytes whatever the batch: Triton compiles a kernel anew for a
    pointer that is aligned otherwise.
    """
    starts = np.cumsum([0, *(-(-array.size // 4) * 4 for array in arrays)])
    host = torch.empty(int(starts[-1]), pin_memory=device.type == "cuda")
    flat = host.numpy()
    for start, array in zip(starts, arrays, strict=False):
        flat[start : start + array.size] = array.ravel()
    sent = host.to(device, non_blocking=True)
    return [
        sent[start : start + array.size].view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]
