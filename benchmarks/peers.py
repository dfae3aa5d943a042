"""The same BYOL step by other packages, as installed, taking turns with ours on the same views.

`python benchmarks/peers.py [--device cuda] [--batch-size 256] [--json FILE]`

Same backbone, head sizes, batch, precision and views. A peer is shown as its own examples write the
step, then with channels_last, then with torch.compile as well: the last row is the honest one. What
is not installed is named and left out. What differs in kind: byol-pytorch (lucidrains) sends both
views through BatchNorm as one batch and adds its simplicial embedding by default, as shipped.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run in a checkout

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from benchmarks import hardware
from benchmarks.conditions import as_json, conditions, write
from benchmarks.hardware import percentiles
from benchmarks.stepping import StepBench, StepSettings
from byol_fast import distributed
from byol_fast.distributed import World
from byol_fast.step import AUTOCAST

Step = Callable[[], object]
WAYS = ("as shipped", "channels_last", "channels_last, compiled")


def measure(
    settings: StepSettings, world: World, *, steps: int, warm_up: int
) -> dict[str, dict[str, Any]]:
    """Images/s of every implementation, and milliseconds of the optimizers alone, by name."""
    makers: dict[str, Callable[[], tuple[Step, Step]]] = {
        "byol_fast": lambda: _ours(settings, world)
    }
    for name, make in (("lightly", _lightly), ("byol-pytorch", _lucidrains)):
        for way in WAYS[: 3 if settings.engine != "eager" else 2]:
            makers[f"{name}, {way}"] = lambda make=make, way=way: make(settings, world.device, way)
    result: dict[str, dict[str, Any]] = {}
    calls: dict[str, tuple[Step, Step]] = {}
    for name, maker in makers.items():
        try:
            calls[name] = maker()
            for _ in range(warm_up):
                calls[name][0]()
        except Exception as error:  # other people's code, and a compiler over it
            calls.pop(name, None)
            result[name] = {"text": f"left out: {type(error).__name__}: {str(error)[:120]}"}
    rounds, part = max(3, steps // 10), min(10, steps)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    updates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):  # A B C A B C
        for name, (step, update) in calls.items():
            seconds[name].append(float(np.median(hardware.step_seconds(step, world.device, part))))
            updates[name].append(
                float(np.median(hardware.step_seconds(update, world.device, part)))
            )
    for name in calls:
        rate = settings.batch / np.array(seconds[name])
        ratio = np.array(seconds[name]) / np.array(seconds["byol_fast"])
        milliseconds = percentiles(1000 * np.array(updates[name]))
        low, middle, high = percentiles(rate)
        result[name] = {
            "images_per_second_per_gpu": [low, middle, high],
            "ours_over_theirs": percentiles(ratio),
            "update_ms": milliseconds,
            "n": rounds,
            "text": (
                f"{middle:.1f} ({low:.1f}-{high:.1f}) images/s, ours {np.median(ratio):.2f}x; "
                f"optimizer and average {milliseconds[1]:.2f} ms"
            ),
        }
    return result


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
    hidden = 4096 if settings.image_size > 64 else 512
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
        projection_hidden_size=4096 if settings.image_size > 64 else 512,
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    world = distributed.start(options.device)
    if world.device.type == "cuda":
        settings, steps, warm_up = StepSettings(batch=options.batch_size or 256), 50, 20
    else:
        batch = options.batch_size or 16
        settings = StepSettings("resnet18", 32, batch, precision="fp32", engine="eager")
        steps, warm_up = 5, 1
    rows = measure(settings, world, steps=options.steps or steps, warm_up=warm_up)
    result = {
        **conditions("peers", ["python", "benchmarks/peers.py", *argv], world.device),
        "settings": asdict(settings),
        "rows": rows,
    }
    for name, row in rows.items():
        print(f"{name:36}{row['text']}")
    write(options.json, as_json(result))
    distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
