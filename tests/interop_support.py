"""Small networks and made-up weights, shared by the tests of interop."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

SIZE = 32
HEADS = {"projector": (24, 12), "predictor": (20, 12)}


def shake(module: nn.Module, seed: int = 1) -> nn.Module:
    """Weights and running statistics that are not the first ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.state_dict().values():
            noise = torch.rand(value.shape, generator=generator)
            if value.dim() > 1:
                value.mul_(1 + 0.2 * noise)
            elif value.is_floating_point():
                value.add_(0.05 * noise)
    return module


def features_of(net: nn.Module, size: int = SIZE) -> torch.Tensor:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return net.eval()(images).flatten(1)


def keys(name: str) -> dict:
    """Keys and shapes that `check_peers.py` wrote down from another project's real module."""
    return json.loads(
        (Path(__file__).parent / "byol_fast" / "interop" / "keys" / f"{name}.json").read_text()
    )["shapes"]


def made_up(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of those shapes, with numbers a network can have."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        if key.endswith(("num_batches_tracked", "steps")):
            state[key] = torch.zeros(shape, dtype=torch.int64)
        else:
            values = torch.rand(shape, generator=generator)
            state[key] = values * 0.1 if len(shape) > 1 else values + 0.5
    return state
