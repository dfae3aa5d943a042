"""Each optimisation of the step taken away alone, beside what was predicted of it.

`python benchmarks/ablation.py [--batch-size 256] [--steps 20] [--only compiled] [--json FILE]`

Rows take turns with the full step, A B A B. A gain is the time without the optimisation over the
time with it, on the same engine: `compiled` and `captured` compare engines, most others run
eagerly, as compiling each would take minutes. Predictions were written down before anything was
measured. Without a GPU only what means something there is measured, and what `--only` names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run in a checkout

import numpy as np

from benchmarks import commands, hardware
from benchmarks.conditions import as_json, conditions, write
from benchmarks.hardware import percentiles
from benchmarks.stepping import StepBench, StepSettings
from byol_fast import distributed
from byol_fast.device_errors import raise_if_lost
from byol_fast.distributed import World


class Change(NamedTuple):
    """An optimisation: the settings with it and without it, and the gain predicted."""

    name: str
    with_it: dict[str, Any]
    without: dict[str, Any]
    predicted: str  # on an H200 at 256 images; in brackets at 64
    devices: tuple[str, ...] = ("cuda",)  # where it means something


_ANY = ("cuda", "cpu")

_EAGER = {"engine": "eager"}
CHANGES = (
    Change("channels_last", _EAGER, {**_EAGER, "channels_last": False}, "1.45-1.7", _ANY),
    Change("compiled", {"engine": "compile"}, _EAGER, "1.2-1.35"),
    Change("captured", {"engine": "graph"}, {"engine": "compile"}, "1.01-1.03 (1.2-1.5)"),
    Change("fused LARS and EMA, not foreach", _EAGER, {**_EAGER, "optimizer": "foreach"}, "1.01"),
    Change(
        "multi-tensor LARS, not a loop",
        {**_EAGER, "optimizer": "foreach"},
        {**_EAGER, "optimizer": "reference"},
        "1.04-1.08 (1.15-1.35)",
        _ANY,
    ),
    Change(
        "both views in one pass",
        _EAGER,
        {**_EAGER, "one_pass": False},
        "1.01-1.03 (1.1-1.3)",
        _ANY,
    ),
    Change("bf16, not fp16", _EAGER, {**_EAGER, "precision": "fp16"}, "below 1: eager BatchNorm"),
    Change(
        "1x1 convolutions as products",
        {"engine": "compile", "conv_1x1_as_mm": True},
        {"engine": "compile"},
        "0.95-1.05: cuDNN does such convolutions as products too",
    ),
    Change(
        "the guard against non-finite steps, a cost",
        _EAGER,
        {**_EAGER, "guarded": False},
        "0.98-1.0",
        _ANY,
    ),
    Change(
        "convolutions trimmed",
        _EAGER,
        {**_EAGER, "trimmed": False},
        "not on a GPU; on a CPU up to 2 below 64 pixels, none at 224",
        ("cpu",),
    ),
    Change("cuDNN's search", _EAGER, {**_EAGER, "cudnn_benchmark": False}, "1.0-1.1"),
)


def measure(
    settings: StepSettings,
    world: World,
    *,
    steps: int,
    warm_up: int,
    only: list[str] | None = None,
    each: Callable[[dict[str, Any]], None] = lambda gains: None,  # sees them as they come
) -> dict[str, Any]:
    """Gains by name: p20, p50, p80 of the ratio within each round."""
    gains: dict[str, Any] = {}
    for change in CHANGES:
        if only is not None and change.name not in only:
            continue
        if world.device.type not in change.devices and not only:
            why = f"only on {' and '.join(change.devices)}"
            gains[change.name] = {"left_out": why, "predicted": change.predicted}
        else:
            try:
                pair = [
                    StepBench(replace(settings, **options), world)
                    for options in (change.with_it, change.without)
                ]
                gains[change.name] = _gain(pair, change, steps, warm_up)
            except (ValueError, RuntimeError) as error:  # another path, memory, a compiler
                raise_if_lost(world.device, error)
                gains[change.name] = {"failed": str(error)[:200], "predicted": change.predicted}
        each(gains)
    return gains


def _gain(pair: list[StepBench], change: Change, steps: int, warm_up: int) -> dict[str, Any]:
    for bench in pair:
        bench.warm_up(warm_up)
    rounds = [
        [np.median(hardware.step_seconds(b.step, b.device, max(2, steps // 4))) for b in pair]
        for _ in range(5)
    ]
    seconds = np.array(rounds)
    return {
        "gain": percentiles(seconds[:, 1] / seconds[:, 0]),
        "ms": percentiles(1000 * seconds[:, 0]),
        "predicted": change.predicted,
        "engine_ran": [bench.engine_ran for bench in pair],  # with it, without
        "optimizer": [bench.optimizer.impl for bench in pair],
        "compile_seconds": [bench.compile_seconds for bench in pair],
        "n": len(rounds),
    }


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = commands.step_parser(__doc__, engine=False)  # each change has its own
    names = [change.name for change in CHANGES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args(argv)
    commands.check(parser, options)
    return options


def main(argv: list[str] | None = None) -> int:
    """The command: 0, 1 if a row failed or none could be measured, 2 for wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    try:
        world = distributed.start(options.device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    big = world.device.type == "cuda"
    if not big:
        options.batch_size = options.batch_size or 8
    settings = commands.settings(options, world.device)
    result = {
        **conditions("ablation", ["python", "benchmarks/ablation.py", *argv], world.device),
        "settings": asdict(settings),
    }

    def each(gains: dict[str, Any]) -> None:  # a run may be ended from outside
        if not world.is_main:
            return
        name, row = list(gains.items())[-1]
        if "gain" in row:
            measured = "{1:.3f} ({0:.3f}-{2:.3f})".format(*row["gain"])
        else:
            kind = "failed" if "failed" in row else "left_out"
            measured = f"{kind.replace('_', ' ')}: {row[kind][:60]}"
        print(f"{name:43}{measured:26} predicted {row['predicted']}", flush=True)
        write(options.json, as_json({**result, "gains": gains}))

    steps, warm_up = options.steps or (40 if big else 2), 20 if big else 1
    gains = measure(settings, world, steps=steps, warm_up=warm_up, only=options.only, each=each)
    distributed.stop()
    failed = [name for name, row in gains.items() if "failed" in row]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 0 if not failed and any("gain" in row for row in gains.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
