"""Microseconds an image's colours take: the Triton kernels, plain torch, torchvision's operations.

`python benchmarks/augment.py [--batch-size 256] [--image-size 224] [--dtype bf16] [--json FILE]`

- `fused`: `pipelines.augment.fused`, with either semantics. `reference`: the same in plain torch.
- `torchvision`: its own operations, one crop after the other on the same device, as a transform
  applied to each sample runs them; with the same parameters, so with the same work.

Crops are on the device already, uint8; every row makes the same normalised views of them. The rows
take turns, each timed by events on the GPU. One image is one sample, both views. The floor is what
a copy would take that reads the crops and writes the views once, at the rate of a copy measured in
the same run. Without a GPU there are no kernels, all runs small, and the figures are the CPU's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run in a checkout

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from benchmarks import hardware
from benchmarks.conditions import as_json, conditions, write
from pipelines.augment import reference
from pipelines.plan import EpochPlan
from pipelines.spec import JITTER_ORDERS, AugmentSpec, Colour, Semantics

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
LOOP = "torchvision, crop by crop"


def torchvision_loop(
    crops: Tensor,  # uint8 [V,B,S,S,3]
    colours: Tensor,  # float32 [B,V,len(Colour)], on the host
    spec: AugmentSpec,
    dtype: torch.dtype,
) -> Tensor:
    """Every crop by itself through torchvision's operations: `[V,B,3,S,S]`, channels_last."""
    out = [
        torch.stack(
            [
                _torchvision(crop, row, spec, view.solarize_threshold)
                for crop, row in zip(crops[v], colours[:, v].tolist(), strict=True)
            ]
        ).to(dtype, memory_format=torch.channels_last)
        for v, view in enumerate(spec.views[: len(crops)])
    ]
    return torch.stack(out)


def _torchvision(crop: Tensor, row: list[float], spec: AugmentSpec, threshold: float) -> Tensor:
    x = F.to_dtype(crop.permute(2, 0, 1), torch.float32, scale=True)
    if row[Colour.FLIP]:
        x = F.horizontal_flip(x)
    if row[Colour.JITTER]:
        for operation in JITTER_ORDERS[int(row[Colour.ORDER])]:
            x = JITTER[operation](x, row[Colour.BRIGHTNESS + operation])
    if row[Colour.GREY]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if row[Colour.SIGMA] and spec.blur_radius:
        x = F.gaussian_blur(x, [2 * spec.blur_radius + 1] * 2, [row[Colour.SIGMA]] * 2)
    if row[Colour.SOLARIZE]:
        x = F.solarize(x, threshold)
    return F.normalize(x, list(spec.mean), list(spec.std))


def rows(options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """What is compared: each call makes all views of the same crops."""
    crops = torch.randint(
        256,
        (2, options.batch_size, options.image_size, options.image_size, 3),
        dtype=torch.uint8,
        device=options.device,
        generator=torch.Generator(options.device).manual_seed(0),
    )
    calls: dict[str, Callable[[], Tensor]] = {}
    dtype = DTYPES[options.dtype]
    for semantics in ("deepmind", "torchvision"):
        spec, colours = _plan(options, semantics)
        if options.device.type == "cuda":
            from pipelines.augment import fused

            kernels = partial(fused.apply, crops, colours, spec, dtype=dtype)
            calls[f"fused, {semantics}"] = kernels
        plain = partial(reference.apply, crops, colours, spec, dtype=dtype)
        calls[f"reference, {semantics}"] = plain
    calls[LOOP] = partial(torchvision_loop, crops, colours, spec, dtype)
    return calls


def _plan(options: argparse.Namespace, semantics: Semantics) -> tuple[AugmentSpec, Tensor]:
    """The method's own probabilities and ranges, drawn for one batch."""
    spec = AugmentSpec(image_size=options.image_size, semantics=semantics)
    plan = EpochPlan(spec, seed=0, epoch=0, sizes=np.full((options.batch_size, 2), 256))
    return spec, torch.from_numpy(plan.colours(np.arange(options.batch_size)))


def apart(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """The largest distance of each row from the reference of its semantics, on [0, 1]."""
    std = torch.tensor(AugmentSpec().std).view(3, 1, 1)
    distance = {}
    for name, call in calls.items():
        semantics = name.partition(", ")[2] if name != LOOP else "torchvision"
        other = calls[f"reference, {semantics}"]()
        gap = (call().float() - other.float()).abs() * std.to(other.device)
        distance[name] = float(f"{gap.max().item():.2g}")
    return distance


def measure(
    options: argparse.Namespace,
    each: Callable[[dict[str, Any]], None] = lambda result: None,  # sees rows as they come
) -> dict[str, Any]:
    """Turns of every row, one after the other, and what the device could do at best."""
    started = time.perf_counter()
    calls, device = rows(options), options.device
    distance = apart(calls)  # warms up as well
    rate = hardware.copy_bytes(device)
    pixels = 2 * 3 * options.image_size**2  # values of both views
    floor = pixels * (1 + DTYPES[options.dtype].itemsize) / rate * 1e6
    result: dict[str, Any] = {
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "dtype": options.dtype,
        "copy_bytes_per_second": float(f"{rate:.4g}"),
        "floor_us_per_image": float(f"{floor:.3g}"),
        "step_fps": options.step_fps,
        "compile_seconds": time.perf_counter() - started,  # of the kernels, and a call of each row
        "rows": {},
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    counts: dict[str, tuple[int | None, int | None]] = {}
    for turn in range(options.rounds + 1):
        for name, call in calls.items():
            steps = 1 if name == LOOP or device.type != "cuda" else 10
            taken = hardware.step_seconds(call, device, steps)
            if turn:  # the first is to warm up
                seconds[name].extend(taken.tolist())
            else:
                counts[name] = hardware.launches_and_waits(call, device)
        if turn:
            for name in calls:
                row = _row(name, seconds, options, floor)
                launches, waits = counts[name]
                row |= {"launches": launches, "waits": waits, "apart": distance[name]}
                result["rows"][name] = row
            each(result)
    return result


def _row(
    name: str, seconds: dict[str, list[float]], options: argparse.Namespace, floor: float
) -> dict[str, Any]:
    micros = np.array(seconds[name]) / options.batch_size * 1e6
    faster = np.median(seconds[LOOP]) / np.median(seconds[name])
    row = {
        "us_per_image": hardware.percentiles(micros),
        "n": len(micros),
        "share_of_floor": float(f"{floor / np.median(micros):.3g}"),
        "faster_than_torchvision": float(f"{faster:.3g}"),
    }
    if options.step_fps:
        row["share_of_a_step"] = float(f"{float(np.median(micros)) * options.step_fps / 1e6:.3g}")
    return row


def show(result: dict[str, Any]) -> None:
    """The table on stdout."""
    print(
        f"{result['device']}: {result['batch_size']} images of {result['image_size']} pixels, two "
        f"views, {result['dtype']}; a copy takes {result['floor_us_per_image']} µs an image "
        f"({result['copy_bytes_per_second'] / 1e9:.0f} GB/s)"
    )
    if result["device"] == "cpu":
        print("There is no GPU: these figures are the CPU's, and there are no fused kernels.")
    of_step = f"{'of a step':>11}" if result["step_fps"] else ""
    head = f"{'':28}{'µs an image':>24}{'of floor':>10}{'faster':>9}{'launches':>10}{'waits':>7}"
    print(head + of_step)
    for name, row in result["rows"].items():
        low, middle, high = row["us_per_image"]
        launches, waits = (row[k] if row[k] is not None else "-" for k in ("launches", "waits"))
        print(
            f"{name:28}{f'{middle:g} ({low:g}-{high:g})':>24}{row['share_of_floor']:>10.1%}"
            f"{row['faster_than_torchvision']:>8.1f}x{launches:>10}{waits:>7}"
            + (f"{row['share_of_a_step']:>11.2%}" if of_step else "")
        )


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; sizes that were not given depend on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--batch-size", type=int, help="images (256; without a GPU 4)")
    parser.add_argument("--image-size", type=int, help="pixels of a crop (224; without a GPU 96)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the views")
    parser.add_argument("--rounds", type=int, help="turns of every row (20; without a GPU 3)")
    parser.add_argument(
        "--step-fps", type=float, help="images/s of a training step here, to show the share of it"
    )
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args(argv)
    for name in ("batch_size", "image_size", "rounds"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    available = torch.cuda.is_available()
    if options.device == "auto":
        options.device = "cuda" if available else "cpu"
    if options.device not in ("cpu", "cuda") or (options.device == "cuda" and not available):
        parser.error(f"--device {options.device}: there is no such device here")
    options.device = torch.device(options.device)
    small = options.device.type == "cpu"
    options.batch_size = options.batch_size or (4 if small else 256)
    options.image_size = options.image_size or (96 if small else 224)
    options.rounds = options.rounds or (3 if small else 20)
    return options


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns what --json writes."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    command = ["python", "benchmarks/augment.py", *argv]
    where = conditions("augment", command, options.device)

    def save(result: dict[str, Any]) -> None:  # a run may be ended from outside
        write(options.json, as_json({**where, **result}))

    result = {**where, **measure(options, save)}
    show(result)
    return result


if __name__ == "__main__":
    main()
