"""The same BYOL step by other packages, as installed, taking turns with ours on the same views.

`python benchmarks/peers.py [--backbone resnet50] [--image-size 224] [--batch-size 256]`

Same backbone, head sizes, batch, precision and views. A peer is shown as its own examples write the
step, then with channels_last, then with torch.compile as well: the last row is the honest one. What
is not installed is named and left out. What differs in kind: byol-pytorch (lucidrains) sends both
views through BatchNorm as one batch and adds its simplicial embedding by default, as shipped.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run in a checkout

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from benchmarks import commands, hardware, optimizers
from benchmarks.conditions import as_json, conditions, write
from benchmarks.hardware import percentiles
from benchmarks.stepping import StepBench, StepSettings
from byol_fast import distributed
from byol_fast.distributed import World
from byol_fast.step import AUTOCAST

Step = Callable[[], object]
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
WAYS = ("as shipped", "channels_last", "channels_last, compiled")


def measure(
    settings: StepSettings,
    world: World,
    *,
    steps: int,
    warm_up: int,
    budget: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Images/s of every implementation, and milliseconds of the optimizers alone, by name.

    budget: seconds; once 60 % of them are spent, further implementations are left out.
    clock: without a GPU; `time.process_time` does not count what other processes take.
    """
    ways = WAYS if settings.engine != "eager" else WAYS[:2]
    makers: dict[str, Callable[[], tuple[Step, Step]]] = {
        "byol_fast": lambda: _ours(settings, world)
    }
    # What is most worth knowing first: as it is shipped, and the most that can be made of it.
    for way in (ways[0], *reversed(ways[1:])):
        for name, make in (("lightly", _lightly), ("byol-pytorch", _lucidrains)):
            makers[f"{name}, {way}"] = lambda make=make, way=way: make(settings, world.device, way)
    result: dict[str, dict[str, Any]] = {}
    calls: dict[str, tuple[Step, Step]] = {}
    started = time.monotonic()
    for name, maker in makers.items():
        if time.monotonic() - started > 0.6 * budget:
            result[name] = {"text": "left out: no time"}
            continue
        try:
            calls[name] = maker()
            for _ in range(warm_up):
                calls[name][0]()
        except Exception as error:  # other people's code, and a compiler over it
            if name == "byol_fast":  # what all others are compared with
                raise
            calls.pop(name, None)
            result[name] = {"text": f"left out: {type(error).__name__}: {str(error)[:120]}"}
    part = min(10, steps) if world.device.type == "cuda" else 1
    rounds = max(3, steps // part)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    updates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):  # A B C A B C
        for name, (step, update) in calls.items():
            for call, into in ((step, seconds), (update, updates)):
                some = hardware.step_seconds(call, world.device, part, clock)
                into[name].append(float(np.median(some)))
    for name in calls:
        ours, theirs = ((seconds[each], updates[each]) for each in ("byol_fast", name))
        result[name] = _row(settings.batch, np.array(ours), np.array(theirs))
    return result


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


def _ours(settings: StepSettings, world: World) -> tuple[Step, Step]:
    bench = StepBench(settings, world)
    pairs = bench.model.target_ema_params(), bench.model.online_ema_params()
    return bench.step, lambda: bench.optimizer.step_and_average(*pairs, 0.99)


def _views(settings: StepSettings, device: torch.device, way: str) -> tuple[Tensor, Tensor]:
    side = settings.image_size
    views = torch.randn(2, settings.batch, 3, side, side, device=device)
    first, second = views
    if way != WAYS[0]:
        first, second = (v.contiguous(memory_format=torch.channels_last) for v in views)
    return first, second


def _prepared(network: nn.Module, device: torch.device, way: str) -> nn.Module:
    network = network.to(device)
    return network if way == WAYS[0] else network.to(memory_format=torch.channels_last)


def _lightly(settings: StepSettings, device: torch.device, way: str) -> tuple[Step, Step]:
    """As lightly's BYOL example: two passes of each network, its loss, its LARS, its average."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.utils.lars import LARS as TheirLARS

    backbone, width = _torchvision(settings.backbone)
    hidden = settings.hidden_size
    encoder = nn.Sequential(backbone, BYOLProjectionHead(width, hidden, 256))
    encoder = _prepared(encoder, device, way)
    teacher = copy.deepcopy(encoder)
    deactivate_requires_grad(teacher)
    student = nn.Sequential(encoder, _prepared(BYOLPredictionHead(256, hidden, 256), device, way))
    criterion = NegativeCosineSimilarity()
    optimizer = TheirLARS(student.parameters(), lr=0.1, momentum=0.9, weight_decay=1.5e-6)
    views, dtype = _views(settings, device, way), AUTOCAST.get(settings.precision)
    online, target = student, teacher
    if way == WAYS[2]:
        online, target = torch.compile(student), torch.compile(teacher)

    def update() -> None:
        optimizer.step()
        update_momentum(encoder, teacher, m=0.99)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            predictions = [online(view) for view in views]
            with torch.no_grad():
                projections = [target(view) for view in views]
            loss = criterion(predictions[0], projections[1])
            loss = loss + criterion(predictions[1], projections[0])
        loss.backward()
        update()

    return step, update


def _lucidrains(settings: StepSettings, device: torch.device, way: str) -> tuple[Step, Step]:
    """As byol-pytorch's README: its learner, Adam, its average; our views for its augmentations."""
    from byol_pytorch import BYOL as TheirBYOL

    net = torchvision.models.get_model(settings.backbone, weights=None)
    views, dtype = _views(settings, device, way), AUTOCAST.get(settings.precision)
    learner = TheirBYOL(
        _prepared(net, device, way),
        image_size=settings.image_size,
        hidden_layer="avgpool",
        projection_hidden_size=settings.hidden_size,
        augment_fn=lambda x: views[0],
        augment_fn2=lambda x: views[1],
    ).to(device)
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-4)
    call: Any = torch.compile(learner) if way == WAYS[2] else learner

    def update() -> None:
        optimizer.step()
        learner.update_moving_average()

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = call(views[0])
        optimizer.zero_grad()
        loss.backward()
        update()

    return step, update


def _torchvision(name: str) -> tuple[nn.Module, int]:
    net = torchvision.models.get_model(name, weights=None)
    width = net.fc.in_features
    net.fc = nn.Identity()
    return net, width


def main(argv: list[str] | None = None) -> int:
    """The command: 0, or 2 for wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    try:
        return _run(options, argv)
    except ValueError as error:  # a device, network, size or engine
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.stop()


def _run(options: argparse.Namespace, argv: list[str]) -> int:
    world = distributed.start(options.device)
    big = world.device.type == "cuda"
    settings = commands.settings(options, world.device)
    steps, warm_up = options.steps or (50 if big else 5), 20 if big else 1
    budget = options.seconds or math.inf
    result = {
        **conditions("peers", ["python", "benchmarks/peers.py", *argv], world.device),
        "settings": asdict(settings),
        "clock": options.clock,
        "rows": measure(
            settings,
            world,
            steps=steps,
            warm_up=warm_up,
            budget=budget,
            clock=CLOCKS[options.clock],
        ),
        "optimizers": optimizers.measure(
            settings, world.device, steps=steps, clock=CLOCKS[options.clock]
        ),
    }
    if not world.is_main:
        return 0
    for part in ("rows", "optimizers"):
        print(f"{part}: {settings.backbone}, {settings.image_size} px, batch {settings.batch}")
        for name, row in result[part].items():
            print(f"  {name:36}{row['text']}")
    write(options.json, as_json(result))
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
