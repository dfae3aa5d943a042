"""A prediction of BYOL's speed on many GPUs from one GPU's step: what is sent, and what it costs.

`python benchmarks/scaling.py [--gpus 8] [--nodes 4] [--step-ms 102] [--bn-sync world]`
`python benchmarks/fps.py --project 8 [--nodes 4]` takes the step that it has measured

What is sent in a step is counted, and a test compares it with what two ranks do send. What sending
costs is assumed: every assumption is printed and can be changed. A prediction is not a measurement.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run in a checkout

import torch
from torch import nn

from benchmarks.conditions import as_json, conditions, write
from benchmarks.stepping import StepSettings
from byol_fast.model import BYOL
from byol_fast.norm import ViewBatchNorm

VIEWS = 2
# DistributedDataParallel's buckets: a first small one, so that sending begins early.
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes
BACKWARD_SHARE = 0.5  # of the networks' work: 2 of 4 forward passes' worth (stepping.py)


@dataclass(frozen=True)
class Messages:
    """What a rank puts into all-reduces in one step, in bytes, one number a call."""

    buckets: list[int]  # of gradients, fp32
    statistics: list[int]  # BatchNorm forward, target and online: means and squares, fp64
    sums: list[int]  # BatchNorm backward, online: two sums, fp32

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(self.buckets) + sum(self.statistics) + sum(self.sums)


def messages(model: BYOL, *, bn_sync: bool) -> Messages:
    """Counted over the layers of a model."""
    sizes = [p.numel() * p.element_size() for p in model.online.parameters() if p.requires_grad]
    online, target = _channels(model.online), _channels(model.target)
    both = VIEWS * 2  # two numbers for each view and channel
    return Messages(
        _buckets(sizes),
        [both * 8 * channels for channels in target + online] if bn_sync else [],
        [both * 4 * channels for channels in online] if bn_sync else [],
    )


def _channels(network: nn.Module) -> list[int]:
    return [m.num_features for m in network.modules() if isinstance(m, ViewBatchNorm)]


def _buckets(sizes: list[int]) -> list[int]:
    """Bytes of each bucket: filled in the order of backward, closed once they are full."""
    buckets, size, limit = list[int](), 0, FIRST_BUCKET
    for more in reversed(sizes):
        size += more
        if size >= limit:
            buckets.append(size)
            size, limit = 0, BUCKET
    return buckets + [size] * (size > 0)


@dataclass(frozen=True)
class Assumptions:
    """What is not counted but assumed; each is a flag of scaling.py."""

    link_gb_s: float = 300.0  # an all-reduce's bus bandwidth within a node (NVLink 4: 450 at most)
    network_gb_s: float = 40.0  # each GPU's share of the network (400 Gbit/s: 50 at most)
    link_us: float = 20.0  # a small all-reduce within a node, from call to result
    network_us: float = 25.0  # what a further node adds to that
    overlap: float = 0.9  # of backward that sending gradients can hide behind
    contention: float = 0.02  # by how much backward is slower while gradients are sent
    cores: float = 16.0  # of the processor, for each GPU
    images_per_core: float = 544.0  # torch source, folder: RESULTS.md, 2026-11-22, an AMD EPYC


def predict(
    sent: Messages,
    *,
    step_ms: float,  # of one GPU alone
    batch: int,  # images on each GPU
    gpus: int,  # of a node
    nodes: int,
    bn_sync: str,  # none, group or world
    given: Assumptions,
) -> dict[str, Any]:
    """Milliseconds of each part, and images/s."""

    def cost_ms(size: int, over: int) -> float:
        """One all-reduce among the GPUs of `over` nodes: a latency, and a ring in each stage."""
        latency = (given.link_us * (gpus > 1) + given.network_us * (over > 1)) * 1e-3
        inside = 2 * (gpus - 1) / gpus * size / (given.link_gb_s * 1e6)
        between = 2 * (over - 1) / over * size / gpus / (given.network_gb_s * 1e6)
        return latency + inside + between

    alone = gpus * nodes == 1
    gradients = [] if alone else [cost_ms(size, nodes) for size in sent.buckets]
    backward = BACKWARD_SHARE * step_ms
    hidden = min(sum(gradients[:-1]), given.overlap * backward)  # nothing is left to hide the last
    exposed = sum(gradients) - hidden
    over = nodes if bn_sync == "world" else 1
    shared = bn_sync != "none" and (gpus > 1 or over > 1)
    calls = sent.statistics + sent.sums if shared else []
    synchronising = sum(cost_ms(size, over) for size in calls)
    slower = 0.0 if alone else min(sum(gradients), backward) * given.contention
    total = step_ms + exposed + synchronising + slower
    loader = given.cores * given.images_per_core
    rate = min(1000 * batch / total, loader)
    ranks = gpus * nodes
    return {
        "ranks": ranks,
        "step_alone_ms": step_ms,
        "gradients_ms": sum(gradients),
        "gradients_exposed_ms": exposed,
        "contention_ms": slower,
        "bn_sync_ms": synchronising,
        "bn_sync_messages": len(calls),
        "step_ms": total,
        "loader_images_per_second_per_gpu": loader,
        "cores_needed_per_gpu": 1000 * batch / total / given.images_per_core,
        "loader_limits": loader < 1000 * batch / total,
        "images_per_second_per_gpu": rate,
        "images_per_second": rate * ranks,
        "efficiency": rate * step_ms / (1000 * batch),
    }


def project(
    settings: StepSettings,
    *,
    gpus: int,
    nodes: int,
    bn_sync: str = "world",
    step_ms: float,
    source: str,  # where that came from
    given: Assumptions | None = None,
) -> dict[str, Any]:
    """The prediction with all that it rests on, for JSON and `lines`."""
    given = given or Assumptions()
    hidden = settings.hidden_size
    model = BYOL(
        settings.backbone,
        image_size=settings.image_size,
        projector=(hidden, 256),
        predictor=(hidden, 256),
    )
    sent = messages(model, bn_sync=True)
    rows = [
        predict(
            sent, step_ms=step_ms, batch=settings.batch, gpus=g, nodes=n, bn_sync=bn_sync,
            given=given,
        )
        for g, n in dict.fromkeys([(1, 1), (gpus, 1), (gpus, nodes)])
    ]  # fmt: skip
    return {
        "prediction": True,
        "settings": asdict(settings),
        "gpus": gpus,
        "nodes": nodes,
        "bn_sync": bn_sync,
        "step_source": source,
        "messages": asdict(sent),
        "assumptions": asdict(given),
        "rows": rows,
    }


def lines(projection: dict[str, Any]) -> list[str]:
    """The prediction as text, its assumptions first."""
    p, given, sent = projection, projection["assumptions"], projection["messages"]
    first, last = p["rows"][0], p["rows"][-1]
    shape = f"{p['settings']['backbone']}, {p['settings']['image_size']} px"
    out = [
        f"Prediction, not a measurement: {shape}, {p['settings']['batch']} images a GPU, "
        f"{p['gpus']} GPUs a node, {p['nodes']} node(s), BatchNorm shared over: {p['bn_sync']}",
        f"  one GPU's step: {first['step_alone_ms']:.1f} ms, {p['step_source']}",
        f"  counted: {sum(sent['buckets']) / 1e6:.1f} MB of gradients in {len(sent['buckets'])} "
        f"buckets; {len(sent['statistics']) + len(sent['sums'])} BatchNorm messages of "
        f"{(sum(sent['statistics']) + sum(sent['sums'])) / 1e6:.2f} MB",
        f"  assumed: {given['link_gb_s']:g} GB/s and {given['link_us']:g} µs a message within a "
        f"node; {given['network_gb_s']:g} GB/s a GPU and {given['network_us']:g} µs more between "
        "nodes",
        f"  assumed: gradients hide behind {given['overlap']:.0%} of backward (half of the step), "
        f"all but the last bucket, and slow it by {given['contention']:.0%}; BatchNorm's messages "
        "hide behind nothing; ranks are equally fast",
        f"  assumed: {given['cores']:g} cores a GPU, {given['images_per_core']:g} images/s a core",
    ]
    for row in p["rows"]:
        out.append(
            f"  {row['ranks']:4d} GPU(s): {row['images_per_second']:9,.0f} images/s in all, "
            f"{row['images_per_second_per_gpu']:7,.0f} a GPU ({row['efficiency']:.1%}); step "
            f"{row['step_ms']:.1f} ms = {row['step_alone_ms']:.1f} + gradients not hidden "
            f"{row['gradients_exposed_ms']:.2f} + contention {row['contention_ms']:.2f} + "
            f"BatchNorm {row['bn_sync_ms']:.2f}; {row['cores_needed_per_gpu']:.1f} cores a GPU"
            + (" and there are fewer" if row["loader_limits"] else "")
        )
    costs = {
        "BatchNorm's messages (--model.bn-sync group sends none between nodes)": last["bn_sync_ms"],
        "gradients that backward does not hide": last["gradients_exposed_ms"],
    }
    if last["loader_limits"]:
        out.append("  What would limit: the loader's cores.")
    elif last["ranks"] > 1:
        name, most = max(costs.items(), key=lambda item: item[1])
        out.append(f"  What would cost most: {name}, {most / last['step_ms']:.1%} of a step.")
    return out


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each assumption."""
    for field in fields(Assumptions):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=float, default=field.default)


def main(argv: list[str] | None = None) -> int:
    """The command: 0, or 2 for wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    usual = StepSettings()
    parser.add_argument("--gpus", type=int, default=8, help="of a node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--step-ms", type=float, help="of one GPU alone")
    parser.add_argument("--backbone", default=usual.backbone)
    parser.add_argument("--image-size", type=int, default=usual.image_size)
    parser.add_argument("--batch-size", type=int, default=usual.batch, help="images per GPU")
    parser.add_argument("--bn-sync", choices=["none", "group", "world"], default="world")
    parser.add_argument("--json", type=Path)
    add_flags(parser)
    options = parser.parse_args(argv)
    given = Assumptions(**{f.name: getattr(options, f.name) for f in fields(Assumptions)})
    step_ms = 1.0 if options.step_ms is None else options.step_ms
    positive = (options.gpus, options.nodes, options.batch_size, options.image_size, step_ms)
    if min(*positive, *(v for k, v in asdict(given).items() if k != "contention")) <= 0:
        parser.error("GPUs, nodes, sizes, times and rates are above 0")
    settings = StepSettings(options.backbone, options.image_size, options.batch_size)
    step_ms, source = (options.step_ms, "given") if options.step_ms else assumed_step(settings)
    projection = project(
        settings,
        gpus=options.gpus,
        nodes=options.nodes,
        bn_sync=options.bn_sync,
        step_ms=step_ms,
        source=source,
        given=given,
    )
    print("\n".join(lines(projection)))
    command = ["python", "benchmarks/scaling.py", *argv]
    head = conditions("scaling", command, torch.device("cpu"))
    write(options.json, as_json({**head, "projection": projection}))
    return 0


GOAL = 2500.0  # images/s of one H200, ResNet-50 at 224 pixels, 256 images: docs/speed.md


def assumed_step(settings: StepSettings) -> tuple[float, str]:
    """A stand-in for a measured step: the goal's rate."""
    return 1000 * settings.batch / GOAL, f"assumed from the goal of {GOAL:.0f} images/s"


if __name__ == "__main__":
    sys.exit(main())
