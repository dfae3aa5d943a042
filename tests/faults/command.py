"""The pretraining command with a backbone as small as one can be, and with faults put into it.

`python tests/faults/command.py ARGUMENTS` is `python -m byol_fast.pretrain ARGUMENTS`, except that
`--backbone tiny` is known, and that the Python code in the environment variable FAULT is run first.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models._api import register_model

BACKBONE = "tiny"


def tiny(*, weights: Any = None) -> nn.Module:
    """Two convolutions with BatchNorm: a step of 8 images of 8 pixels takes a few milliseconds."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1000)),
    )


tiny.__module__ = "torchvision.models.tiny"  # only torchvision's own names are backbones
if BACKBONE not in torchvision.models.list_models():
    register_model(BACKBONE)(tiny)


def main(argv: list[str]) -> int:
    """What `python -m byol_fast.pretrain` does, after the fault was put in."""
    torch.set_num_threads(1)
    if fault := os.environ.get("FAULT"):
        exec(compile(fault, "<fault>", "exec"), {"__name__": "fault"})
    from byol_fast.pretrain import main as pretrain

    return pretrain(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
