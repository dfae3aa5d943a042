"""What the commands that take training steps have in common: their flags, and sizes by device."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.stepping import StepSettings


def step_parser(doc: str | None, *, engine: bool = True) -> argparse.ArgumentParser:
    """A parser with the flags of a step; what is not given depends on the device."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--backbone", help="of torchvision (resnet50; without a GPU resnet18)")
    parser.add_argument("--image-size", type=int, help="pixels (224; without a GPU 32)")
    parser.add_argument("--batch-size", type=int, help="images per GPU (256; without a GPU 16)")
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"])
    if engine:
        parser.add_argument("--engine", choices=["eager", "compile", "graph"])
    else:
        parser.set_defaults(engine=None)
    parser.add_argument("--steps", type=int, help="measured steps")
    parser.add_argument(
        "--grouped",
        type=int,
        default=0,
        metavar="RANKS",
        help="BatchNorm's kernels as of one rank among so many, without messages",
    )
    parser.add_argument("--json", type=Path, help="where the result is written")
    return parser


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command with exit code 2 for sizes below 1."""
    for name in ("image_size", "batch_size", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    if options.grouped == 1 or options.grouped < 0:
        parser.error("--grouped is at least 2")


def settings(options: argparse.Namespace, device: torch.device) -> StepSettings:
    """The sizes of a GPU run, or of a small one."""
    big = device.type == "cuda"
    return StepSettings(
        backbone=options.backbone or ("resnet50" if big else "resnet18"),
        image_size=options.image_size or (224 if big else 32),
        batch=options.batch_size or (256 if big else 16),
        precision=options.precision or ("bf16" if big else "fp32"),
        engine=options.engine or ("compile" if big else "eager"),
        grouped=options.grouped,
    )
