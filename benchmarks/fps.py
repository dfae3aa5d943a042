"""Images per second per GPU of BYOL pretraining, against an FPS target.

`python benchmarks/fps.py [--mode all | step loader e2e linear-eval optim peers] [--target-fps 676]
 [--data DIR] [--batch-size 256] [--project 8 [--nodes 4]] [--json FILE] [--chart FILE.svg]`
`torchrun --nproc_per_node=8 benchmarks/fps.py --mode step`

- `step`: the whole update (target, online, backward, LARS, moving average) on views that are on the
  device already. `loader`: files to views on the device, nothing else. `e2e`: both together.
- `linear-eval`: a frozen backbone's forward and a linear layer's training step: what the target's
  figure was measured on. `optim`: LARS and moving average alone. `peers`: see peers.py.
- `--project 8`: what eight such GPUs, and nodes of them, would do: a prediction, see scaling.py.

One image is one sample, that is two views, except in linear-eval. Without a GPU everything runs
small, to show that it runs; such figures say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run in a checkout

import torch

from benchmarks import chart_fps, commands, counted, hardware, optimizers, scaling, stepping
from benchmarks.conditions import as_json, conditions, write
from benchmarks.stepping import OtherPath, StepSettings
from benchmarks.verdict import TARGET, bottleneck, verdict
from byol_fast import distributed
from byol_fast.distributed import World
from byol_fast.errors import CaptureError
from pipelines.errors import DataError, MissingBackend

MODES = ("step", "loader", "e2e", "linear-eval", "optim", "peers")


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; sizes that were not given depend on the device."""
    parser = commands.step_parser(__doc__)
    parser.add_argument("--mode", nargs="+", choices=["all", *MODES], default=["step"])
    parser.add_argument("--target-fps", type=float, default=TARGET, help="images/s per GPU")
    parser.add_argument("--data", help="a folder of images; without it JPEGs are generated")
    parser.add_argument("--backend", default="auto", help="of the loader: auto, torch, dali, ffcv")
    parser.add_argument("--project", type=int, metavar="GPUS", help="predict for nodes of so many")
    parser.add_argument("--nodes", type=int, default=1, help="of --project")
    parser.add_argument("--chart", type=Path, help="where a picture of it is written, as .svg")
    options = parser.parse_args(argv)
    options.argv = argv
    if "all" in options.mode:
        options.mode = list(MODES)
    if not 0 < options.target_fps < math.inf:
        parser.error("--target-fps is above 0")
    commands.check(parser, options)
    if min(options.nodes, 1 if options.project is None else options.project) < 1:
        parser.error("--project and --nodes are at least 1")
    if options.nodes > 1 and options.project is None:
        parser.error("--nodes is of --project GPUS, which is not given")
    return options


def run(
    options: argparse.Namespace,
    world: World,
    scratch: Path,
    each: Callable[[dict[str, Any]], None],  # sees the result as far as it is there
) -> dict[str, Any]:
    """Every mode that was asked for, and what they mean together."""
    settings = commands.settings(options, world.device)
    options.steps = options.steps or (50 if world.device.type == "cuda" else 5)
    flop, kept = counted.work_of_an_image(settings)
    limits = {
        "flops": hardware.matmul_flops(
            world.device,
            {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision, torch.float32),
        ),
        "bytes": hardware.copy_bytes(world.device),
        "flop_of_an_image": flop,
        "kept_of_an_image": kept,
        "bytes_of_an_image": counted.bytes_of_an_image(settings),
    }
    result: dict[str, Any] = {
        **conditions("fps", ["python", "benchmarks/fps.py", *options.argv], world.device),
        "ranks": world.size,
        "target_fps": options.target_fps,
        "limits": limits,
        "modes": {},
    }
    if world.is_main:
        print(f"{result['device']}, {world.size} rank(s), torch {result['versions']['torch']}")
    modes = result["modes"]
    each(result)  # so that a run ended while it compiles leaves its conditions
    for mode in options.mode:
        modes[mode] = _measure(mode, options, settings, world, scratch, limits)
        if world.is_main:
            show_mode(mode, modes[mode])
        each(result)
    if options.project is not None:
        result["projection"] = projection(options, settings, world, modes.get("step"))
    result["verdict"] = verdict(result)
    result["bottleneck"] = bottleneck(result)
    each(result)
    return result


def _measure(
    mode: str,
    options: argparse.Namespace,
    settings: StepSettings,
    world: World,
    scratch: Path,
    limits: dict[str, float],
) -> dict[str, Any]:
    warm_up, steps = (20 if world.device.type == "cuda" else 1), options.steps
    match mode:
        case "step":
            return stepping.measure(settings, world, steps=steps, warm_up=warm_up, limits=limits)
        case "loader" | "e2e":
            from benchmarks import feeding  # the pipelines' packages are needed only here

            return feeding.measure(
                options.data or feeding.generated(scratch, settings.batch * world.size),
                settings,
                world,
                backend=options.backend,
                steps=steps,
                warm_up=min(5, warm_up),
                train=mode == "e2e",
            )
        case "linear-eval":
            return stepping.measure_linear(settings, world, steps=steps, warm_up=warm_up)
        case "optim":
            return optimizers.measure(settings, world.device, steps=steps)
        case _:
            from benchmarks import peers

            return peers.measure(settings, world, steps=steps, warm_up=warm_up)


def projection(
    options: argparse.Namespace, settings: StepSettings, world: World, step: dict[str, Any] | None
) -> dict[str, Any]:
    """What more GPUs would do, from the step of one GPU where that has been measured."""
    if world.device.type == "cuda" and world.size == 1 and step is not None:
        step_ms, source = step["step_ms"][1], "measured in this run"
    else:  # a processor's step says nothing about a GPU's
        settings = StepSettings()
        step_ms, source = scaling.assumed_step(settings)
    return scaling.project(
        settings, gpus=options.project, nodes=options.nodes, step_ms=step_ms, source=source
    )


def show_mode(mode: str, row: dict[str, Any]) -> None:
    """One mode's part of the table."""
    print(f"\n{mode}", flush=True)
    if mode in ("optim", "peers"):
        for name, one in row.items():
            print(f"  {name:34}{one['text']}", flush=True)
        return
    low, middle, high = row["images_per_second_per_gpu"]
    facts = [f"{middle:.1f} ({low:.1f}-{high:.1f}) images/s per GPU"]
    facts.append(f"{row['images_per_second']:.1f} in all")
    facts.append("{1:.1f} ({0:.1f}-{2:.1f}) ms a step".format(*row["step_ms"]))
    shares = (
        ("wait_share", "waiting for data"),
        ("flop_share", "of a matrix product's FLOP/s"),
        ("byte_share_estimate", "of a copy's bytes/s (estimate)"),
    )
    numbers = (
        ("forwards_per_second", "forwards/s"),
        ("launches", "launches a step"),
        ("host_waits", "waits of the host a step"),
        ("peak_gb", "GiB at most"),
        ("mb_per_image", "MiB an image, weights and all"),
        ("activation_mb_per_image", "MiB of activations an image"),
        ("kept_mb_per_image_counted", "MiB an image kept for backward if not compiled (counted)"),
        ("compile_seconds", "s to compile"),
    )
    ran = ("engine_ran", "optimizer", "source", "decoder", "augmentation")
    facts += [f"{name.replace('_', ' ')}: {row[name]}" for name in ran if row.get(name)]
    facts += [f"{row[name]:.1%} {unit}" for name, unit in shares if name in row]
    facts += [f"{row[name]:g} {unit}" for name, unit in numbers if row.get(name) is not None]
    print("  " + "\n  ".join(facts), flush=True)


def show_end(result: dict[str, Any]) -> None:
    """The prediction, the verdict and the sentence."""
    if "projection" in result:
        print("\n" + "\n".join(scaling.lines(result["projection"])))
    print("\n" + "\n".join(result["verdict"]))
    print(result["bottleneck"])


def main(argv: list[str] | None = None) -> int:
    """The command: 0, 1 if another path ran than was asked for, 2 for wrong usage, 4 if the data
    cannot be used."""
    options = arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # why a path does not run
    try:
        world = distributed.start(options.device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def save(result: dict[str, Any]) -> None:  # after each mode: a run may be ended from outside
        if world.is_main:
            write(options.json, as_json(result))

    try:
        with tempfile.TemporaryDirectory() as scratch:
            result = run(options, world, Path(scratch), save)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except (ValueError, MissingBackend) as error:  # a network, size, engine or backend
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OtherPath, CaptureError) as error:  # not a figure of what was asked for
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.stop()
    if world.is_main:
        show_end(result)
        if options.chart:
            write(options.chart, chart_fps.draw(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
