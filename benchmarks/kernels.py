"""One profiled step on a GPU: its kernels, and each class beside what the model expects of it.

`python benchmarks/kernels.py [--batch-size 256] [--engine compile] [--json FILE]`

For each class: milliseconds and launches a step, the bytes that an estimate of the layers' sizes
expects (`counted.bytes_by_class`), and both together as a share of a copy's bytes/s: the efficiency
that a prediction has to assume. Convolutions also as a share of a matrix product's FLOP/s.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run in a checkout

import torch

from benchmarks import commands, counted, hardware
from benchmarks.conditions import as_json, conditions, write
from benchmarks.stepping import OtherPath, StepBench, StepSettings
from byol_fast import distributed
from byol_fast.errors import CaptureError
from byol_fast.step import AUTOCAST

_STEPS = 3
# The first that matches. Inductor names a kernel by its kind: red and per reduce, poi does not.
CLASSES = (
    ("collectives", r"nccl"),
    ("layout conversions", r"nchwToNhwc|nhwcToNchw|transpose"),
    ("LARS and average", r"^_(norms|trust|apply)\b|multi_tensor|lerp|addcmul"),
    ("reductions", r"^triton_(red|per)|batch_norm|reduce_kernel"),
    ("element-wise", r"^triton_poi|elementwise|pool"),
    ("convolutions", r"cudnn|cutlass|xmma|gemm|nvjet|conv|wgrad|dgrad|fprop|splitK|^sm\d+_"),
    ("copies and fills", r"(?i)memcpy|memset|fill|copy|cat"),
    ("other", r""),
)


def class_of(kernel: str) -> str:
    """Which class a kernel's name puts it in."""
    return next(name for name, pattern in CLASSES if re.search(pattern, kernel))


def table(
    kernels: Iterable[tuple[str, float]],  # name and µs of every launch in `steps` steps
    *,
    steps: int,
    batch: int,
    limits: dict[str, float],  # flops, bytes per second; flop_of_an_image
    expected: dict[str, float],  # bytes of an image by class
) -> dict[str, Any]:
    """Rows by class and by kernel, slowest first, each for one step."""
    each: dict[str, list[float]] = {}
    for name, micros in kernels:
        each.setdefault(name, []).append(micros)
    classes: dict[str, dict[str, Any]] = {}
    for name, times in each.items():
        row = classes.setdefault(class_of(name), {"ms": 0.0, "launches": 0.0})
        row["ms"] += sum(times) / steps / 1000
        row["launches"] += len(times) / steps
    for name, row in classes.items():
        if name in expected:
            moved = expected[name] * batch
            row["expected_mb_per_image"] = expected[name] / 1e6
            row["share_of_copy"] = moved / (row["ms"] / 1000) / limits["bytes"]
        if name == "convolutions":
            done = limits["flop_of_an_image"] * batch
            row["share_of_matmul"] = done / (row["ms"] / 1000) / limits["flops"]
    rows = [
        {"name": name, "class": class_of(name), "us": sum(t) / steps, "launches": len(t) / steps}
        for name, t in each.items()
    ]
    return {
        "classes": dict(sorted(classes.items(), key=lambda pair: -pair[1]["ms"])),
        "kernels": sorted(rows, key=lambda row: -row["us"]),
    }


def profiled(bench: StepBench) -> list[tuple[str, float]]:
    """Name and µs of every kernel, copy and fill of some steps.

    Raises:
        OtherPath: the profiler has seen none of them.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    hardware.wait(bench.device)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(_STEPS):
            bench.step()
        hardware.wait(bench.device)
    on_gpu = torch.autograd.DeviceType.CUDA
    found = [
        (event.name, event.time_range.elapsed_us())
        for event in profile.events()
        if event.device_type == on_gpu and not getattr(event, "is_user_annotation", False)
    ]
    if not found:
        raise OtherPath("the profiler sees no kernels here: it needs access to the GPU's counters")
    return found


def main(argv: list[str] | None = None) -> int:
    """The command: 0, 1 if another path ran or nothing was seen, 2 for wrong usage or no GPU."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    try:
        world = distributed.start(options.device)
        if world.device.type != "cuda":
            raise ValueError("kernels are a GPU's: there is none here")
        settings = commands.settings(options, world.device)
        result = _run(settings, argv, world)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OtherPath, CaptureError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.stop()
    write(options.json, as_json(result))
    show(result)
    return 0


def arguments(argv: list[str]) -> Any:
    """The command line."""
    parser = commands.step_parser(__doc__)
    options = parser.parse_args(argv)
    commands.check(parser, options)
    return options


def _run(settings: StepSettings, argv: list[str], world: distributed.World) -> dict[str, Any]:
    bench = StepBench(settings, world)
    bench.warm_up(20)
    limits = {
        "flops": hardware.matmul_flops(
            world.device, AUTOCAST.get(settings.precision, torch.float32)
        ),
        "bytes": hardware.copy_bytes(world.device),
        "flop_of_an_image": counted.work_of_an_image(settings)[0],
    }
    return {
        **conditions("kernels", ["python", "benchmarks/kernels.py", *argv], world.device),
        "settings": asdict(settings),
        "engine_ran": bench.engine_ran,
        "optimizer": bench.optimizer.impl,
        "compile_seconds": bench.compile_seconds,
        "limits": limits,
        **table(
            profiled(bench),
            steps=_STEPS,
            batch=settings.batch,
            limits=limits,
            expected=counted.bytes_by_class(settings),
        ),
    }


def show(result: dict[str, Any]) -> None:
    """Classes and the slowest kernels, on stdout."""
    print(f"{'class':22}{'ms':>9}{'launches':>10}{'MB/image':>10}{'of copy':>9}{'of matmul':>11}")
    for name, row in result["classes"].items():
        cells = [
            f"{row[key]:{form}}" if key in row else "-"
            for key, form in (
                ("expected_mb_per_image", ".0f"),
                ("share_of_copy", ".0%"),
                ("share_of_matmul", ".0%"),
            )
        ]
        print(
            f"{name:22}{row['ms']:>9.2f}{row['launches']:>10.0f}"
            f"{cells[0]:>10}{cells[1]:>9}{cells[2]:>11}"
        )
    for row in result["kernels"][:30]:
        print(f"{row['us']:>10.1f} us {row['launches']:>6.0f}x  {row['name'][:90]}")


if __name__ == "__main__":
    sys.exit(main())
