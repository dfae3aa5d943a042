"""The same BYOL step by other packages, as installed, taking turns with ours on the same views.

`python benchmarks/peers.py [--backbone resnet50] [--image-size 224] [--batch-size 256]`

Same backbone, head sizes, batch, precision and views. A peer is shown as its own examples write the
step, then with channels_last, then with torch.compile as well: the last row is the honest one. What
is not installed is named and left out. What differs in kind: byol-pytorch (lucidrains) sends both
views through BatchNorm as one batch and adds its simplicial embedding by default, as shipped.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run in a checkout

import numpy as np
import torch

from benchmarks import commands, hardware, optimizers
from benchmarks.conditions import as_json, conditions, write
from benchmarks.hardware import percentiles
from benchmarks.peer_steps import WAYS, Step, lightly, lucidrains
from benchmarks.stepping import OtherPath, StepBench, StepSettings
from byol_fast import distributed
from byol_fast.device_errors import raise_if_lost
from byol_fast.distributed import World
from byol_fast.errors import CaptureError

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def measure(
    settings: StepSettings,
    world: World,
    *,
    steps: int,
    warm_up: int,
    budget: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    each: Callable[[dict[str, dict[str, Any]]], None] = lambda rows: None,  # sees rows as they come
) -> dict[str, dict[str, Any]]:
    """Images/s of every implementation, and milliseconds of the optimizers alone, by name.

    budget: seconds; once 60 % of them are spent, further implementations are left out.
    clock: without a GPU; `time.process_time` does not count what other processes take.

    Raises:
        OtherPath: our own step does not run by the engine that was asked for.
    """
    ways = WAYS if settings.engine != "eager" else WAYS[:2]
    bench = StepBench(settings, world)
    makers: dict[str, Callable[[], tuple[Step, Step]]] = {"byol_fast": lambda: _ours(bench)}
    # What is most worth knowing first: as it is shipped, and the most that can be made of it.
    for way in (ways[0], *reversed(ways[1:])):
        for name, make in (("lightly", lightly), ("byol-pytorch", lucidrains)):
            makers[f"{name}, {way}"] = lambda make=make, way=way: make(settings, world.device, way)
    table = _Table(settings.batch, world.device, clock, each)
    started = time.monotonic()
    for name, maker in makers.items():
        if time.monotonic() - started > 0.6 * budget:
            table.leave_out(name, "no time")
            continue
        try:
            begun = time.monotonic()
            table.calls[name] = maker()
            for number in range(max(1, warm_up)):
                table.calls[name][0]()
                if number == 0:
                    hardware.wait(world.device)
                    table.first_seconds[name] = time.monotonic() - begun
            if name == "byol_fast":
                bench.check_engine()
        except Exception as error:  # other people's code, and a compiler over it
            raise_if_lost(world.device, error)
            if name == "byol_fast":  # what all others are compared with
                raise
            table.leave_out(name, f"{type(error).__name__}: {str(error)[:120]}")
            continue
        table.turn(list(dict.fromkeys(["byol_fast", name])), min(10, steps))
    part = min(10, steps) if world.device.type == "cuda" else 1
    for _ in range(max(3, steps // part)):  # A B C A B C
        table.turn(list(table.calls), part)
    return table.rows


class _Table:
    """Implementations that take turns, and their rows after every turn."""

    def __init__(
        self,
        batch: int,
        device: torch.device,
        clock: Callable[[], float],
        each: Callable[[dict[str, dict[str, Any]]], None],
    ) -> None:
        self.batch, self.device, self.clock, self.each = batch, device, clock, each
        self.calls: dict[str, tuple[Step, Step]] = {}
        self.first_seconds: dict[str, float] = {}  # until the first step's end, compilation too
        self.rows: dict[str, dict[str, Any]] = {}
        self._seconds: dict[str, list[tuple[list[float], list[float]]]] = {}

    def leave_out(self, name: str, why: str) -> None:
        """Notes why there is no row."""
        self.calls.pop(name, None)
        self.rows[name] = {"text": f"left out: {why}"}
        self.each(self.rows)

    def turn(self, names: list[str], steps: int) -> None:
        """Some steps and updates of each, ours being among them."""
        taken = {
            name: [
                float(np.median(hardware.step_seconds(call, self.device, steps, self.clock)))
                for call in self.calls[name]
            ]
            for name in names
        }
        for name in names:
            self._seconds.setdefault(name, []).append((taken["byol_fast"], taken[name]))
            ours, theirs = (np.array(side).T for side in zip(*self._seconds[name], strict=True))
            row = _row(self.batch, ours, theirs)
            self.rows[name] = {**row, "first_step_seconds": self.first_seconds[name]}
        self.each(self.rows)


def _row(batch: int, ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Seconds `[2, rounds]` of step and update, as a row."""
    ratio, milliseconds = theirs[0] / ours[0], percentiles(1000 * theirs[1])
    low, middle, high = percentiles(batch / theirs[0])
    return {
        "images_per_second_per_gpu": [low, middle, high],
        "ours_over_theirs": percentiles(ratio),
        "update_ms": milliseconds,
        "ours_over_their_update": percentiles(theirs[1] / ours[1]),
        "n": len(ratio),
        "text": (
            f"{middle:.1f} ({low:.1f}-{high:.1f}) images/s, ours {np.median(ratio):.2f}x; "
            f"optimizer and average {milliseconds[1]:.2f} ms"
        ),
    }


def _ours(bench: StepBench) -> tuple[Step, Step]:
    pairs = bench.model.target_ema_params(), bench.model.online_ema_params()
    return bench.step, lambda: bench.optimizer.step_and_average(*pairs, 0.99)


def main(argv: list[str] | None = None) -> int:
    """The command: 0, 1 if another path ran than was asked for, 2 for wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    try:
        return _run(options, argv)
    except ValueError as error:  # a device, network, size or engine
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OtherPath, CaptureError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.stop()


def _run(options: argparse.Namespace, argv: list[str]) -> int:
    world = distributed.start(options.device)
    big = world.device.type == "cuda"
    settings = commands.settings(options, world.device)
    steps, warm_up = options.steps or (50 if big else 5), 20 if big else 1
    budget = options.seconds or math.inf
    result: dict[str, Any] = {
        **conditions("peers", ["python", "benchmarks/peers.py", *argv], world.device),
        "settings": asdict(settings),
        "clock": options.clock,
        "rows": {},
        "optimizers": {},
    }
    clock = CLOCKS[options.clock]

    def save(part: str, rows: dict[str, Any]) -> None:  # a run may be ended from outside
        result[part] = rows
        if world.is_main:
            write(options.json, as_json(result))

    measure(
        settings,
        world,
        steps=steps,
        warm_up=warm_up,
        budget=budget,
        clock=clock,
        each=partial(save, "rows"),
    )
    rows = optimizers.measure(
        settings, world.device, steps=steps, clock=clock, each=partial(save, "optimizers")
    )
    save("optimizers", rows)
    if not world.is_main:
        return 0
    for part in ("rows", "optimizers"):
        print(f"{part}: {settings.backbone}, {settings.image_size} px, batch {settings.batch}")
        for name, row in result[part].items():
            print(f"  {name:36}{row['text']}")
    return 0


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = commands.step_parser(__doc__)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="without a GPU, on a busy machine: processor",
    )
    parser.add_argument("--seconds", type=float, help="leave out what would take longer")
    options = parser.parse_args(argv)
    commands.check(parser, options)
    return options


if __name__ == "__main__":
    sys.exit(main())
