"""What a step has to do at least, counted: FLOPs and bytes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stepping import StepBench, StepSettings
from byol_fast.distributed import World
from byol_fast.model import BYOL


def work_of_an_image(settings: StepSettings) -> tuple[float, float]:
    """FLOPs of one image's step, and the bytes that an uncompiled forward keeps for backward.

    Counted over the operations of a step on the CPU; what is kept in floats counts with the bytes
    of `settings.precision`, and nothing twice.
    """
    small = replace(
        settings,
        batch=2,
        precision="fp32",
        engine="eager",
        optimizer="reference",
        trimmed=False,
        grouped=0,
    )
    bench = StepBench(small, World(0, 1, torch.device("cpu")))
    weights = {p.untyped_storage().data_ptr() for p in bench.model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # tensors, so that no address is used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        bench.step()
    float_bytes = 4 if settings.precision == "fp32" else 2
    size = sum(
        tensor.numel() * (float_bytes if tensor.is_floating_point() else tensor.element_size())
        for address, tensor in kept.items()
        if address not in weights
    )
    return counter.get_total_flops() / small.batch, size / small.batch


def bytes_of_an_image(settings: StepSettings) -> float:
    """The sum of `bytes_by_class`."""
    return sum(bytes_by_class(settings).values())


def bytes_by_class(settings: StepSettings) -> dict[str, float]:
    """Estimate: bytes that activations of one image move if BatchNorm, ReLU and the sum after it
    are one kernel each way, in 2-byte numbers (4 in fp32), by the class of kernel that moves them.

    For a convolution from `in` to `out` values a forward reads `in`, writes `out`, reads it for the
    statistics, and reads and writes it once more; a backward reads the gradient and the activation
    for the sums, both again to write a gradient, and takes that and `in` twice through the
    convolution. There are two forwards, online and target. Weights and heads are left out.
    """
    moved = dict.fromkeys(("convolutions", "reductions", "element-wise"), 0.0)

    def count(module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        before, after = given[0].numel(), out.numel()
        moved["convolutions"] += 4 * (before + after)  # two forwards, two ways back
        moved["reductions"] += 2 * after + 2 * after  # statistics, sums
        moved["element-wise"] += 2 * 2 * after + 3 * after

    heads = {"projector": (8, 8), "predictor": (8, 8)}
    net = BYOL(settings.backbone, image_size=settings.image_size, **heads).to("meta")
    backbone = net.online.encoder.backbone.eval()
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        backbone(torch.zeros(1, 3, settings.image_size, settings.image_size, device="meta"))
    views, size = 2, 4 if settings.precision == "fp32" else 2
    return {name: views * size * values for name, values in moved.items()}
