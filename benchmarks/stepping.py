"""The BYOL step alone, on views that are on the device already."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import hardware
from benchmarks.hardware import percentiles
from byol_fast.compiled import as_they_stand, compiled
from byol_fast.distributed import World, data_parallel
from byol_fast.graphed import GraphedStep, refusal, side_stream
from byol_fast.guard import Guard
from byol_fast.model import BYOL
from byol_fast.networks.small_maps import trim
from byol_fast.optim import LARS, param_groups
from byol_fast.step import AUTOCAST, StepOutput, train_step

# One image is two views; each takes a target forward, an online forward, and a backward of twice
# that: 2 · (1 + 1 + 2) forward passes of the encoder. Linear evaluation takes one.
FORWARDS_OF_AN_IMAGE = 8


@dataclass(frozen=True)
class StepSettings:
    """What is measured. The last eight can be taken away or tried."""

    backbone: str = "resnet50"
    image_size: int = 224
    batch: int = 256  # images on this GPU
    precision: str = "bf16"
    engine: str = "compile"  # eager, compile or graph
    optimizer: str = "auto"
    channels_last: bool = True
    one_pass: bool = True  # both views in one forward, statistics apart
    cudnn_benchmark: bool = True
    guarded: bool = True  # a step that is not finite changes nothing
    trimmed: bool = True  # on a CPU: convolutions without the taps that see padding alone
    conv_1x1_as_mm: bool = False  # Inductor's: forward 1x1 convolutions with stride 1 as products

    @property
    def hidden_size(self) -> int:
        """Of projector and predictor: the paper's, or that of small images' recipes."""
        return 4096 if self.image_size > 64 else 512


class StepBench:
    """A model that takes one and the same step again and again."""

    def __init__(self, settings: StepSettings, world: World) -> None:
        self.settings, self.world, self.device = settings, world, world.device
        self.dtype = AUTOCAST.get(settings.precision)
        reason = refusal(self.device, accumulate=1, precision=settings.precision)
        if settings.engine == "graph" and reason:
            raise ValueError(f"no graph: {reason}")
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = settings.cudnn_benchmark
        hidden = settings.hidden_size
        model = BYOL(
            settings.backbone,
            image_size=settings.image_size,
            projector=(hidden, 256),
            predictor=(hidden, 256),
            bn_sync=world.size > 1,
        ).to(self.device)
        side = settings.image_size
        views = torch.randn(2, settings.batch, side, side, 3, device=self.device)
        self.views = views.to(self.dtype or torch.float32).permute(0, 1, 4, 2, 3)
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last)
        else:
            self.views = self.views.contiguous()
        if settings.trimmed and self.device.type == "cpu":
            trim(model)
        self.model = model
        networks = as_they_stand(model)
        if settings.engine != "eager":
            networks = compiled(
                model,
                world,
                batch=settings.batch,
                image_size=side,
                dtype=self.views.dtype,
                autocast_dtype=self.dtype,
                options={"conv_1x1_as_mm": True} if settings.conv_1x1_as_mm else None,
            )
        self.compile_seconds = networks.compile_seconds
        if not settings.one_pass:
            networks = replace(
                networks, online=_TwoPasses(networks.online), target=_TwoPasses(networks.target)
            )
            _one_view(model)
        with side_stream(self.device) if settings.engine == "graph" else nullcontext():
            networks = replace(networks, online=data_parallel(networks.online, world))
        self.optimizer = LARS(param_groups(model.online, 1.5e-6), 0.1, impl=settings.optimizer)
        self.guard = Guard(model, window=1) if settings.guarded else None
        self.networks, self.graphed = networks, None
        if settings.engine == "graph":
            self.graphed = GraphedStep(
                model, networks, self.optimizer, autocast_dtype=self.dtype, guard=self.guard
            )
        self.scaler = torch.amp.GradScaler("cuda") if settings.precision == "fp16" else None

    def step(self) -> StepOutput:
        """One update."""
        if self.graphed is not None:
            return self.graphed(self.views, lr=0.1, decay=0.99)
        return train_step(
            self.model,
            self.networks,
            self.optimizer,
            [self.views],
            accumulate=1,
            decay=0.99,
            autocast_dtype=self.dtype,
            scaler=self.scaler,
            guard=self.guard,
        )


class _TwoPasses(nn.Module):
    """Each view through the network by itself, as other implementations do it."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> Any:
        first, second = (self.network(view) for view in x.chunk(2))
        if isinstance(first, torch.Tensor):
            return torch.cat((first, second))
        return tuple(torch.cat(pair) for pair in zip(first, second, strict=True))


def _one_view(model: BYOL) -> None:
    from byol_fast.norm import set_views

    set_views(model, 1)


def work_of_an_image(settings: StepSettings) -> tuple[float, float]:
    """FLOPs of one image's step, and the bytes that an uncompiled forward keeps for backward.

    Counted over the operations of a step on the CPU; what is kept in floats counts with the bytes
    of `settings.precision`, and nothing twice.
    """
    small = replace(
        settings, batch=2, precision="fp32", engine="eager", optimizer="reference", trimmed=False
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
    """Estimate: bytes that activations of one image move if BatchNorm, ReLU and the sum after it
    are one kernel each way, in 2-byte numbers (4 in fp32).

    For a convolution from `in` to `out` values a forward reads `in`, writes `out`, reads it for the
    statistics, and reads and writes it once more; a backward reads the gradient and the activation
    for the sums, both again to write a gradient, and takes that and `in` twice through the
    convolution. Weights and heads are left out.
    """
    moved = 0.0

    def count(module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal moved
        before, after = given[0].numel(), out.numel()
        forward = before + 4 * after
        backward = 5 * after + 2 * (after + before)
        moved += 2 * forward + backward  # online and target forward, online backward

    net = BYOL(
        settings.backbone, image_size=settings.image_size, projector=(8, 8), predictor=(8, 8)
    )
    backbone = net.online.encoder.backbone.eval()
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        backbone(torch.zeros(1, 3, settings.image_size, settings.image_size))
    return 2 * moved * (4 if settings.precision == "fp32" else 2)  # two views


def measure(
    settings: StepSettings, world: World, *, steps: int, warm_up: int, limits: dict[str, float]
) -> dict[str, Any]:
    """A row: rate, spread, memory, launches, and the shares of what the hardware could do."""
    on_gpu = world.device.type == "cuda"
    bench = StepBench(settings, world)
    for _ in range(warm_up):
        loss = bench.step().loss
    if on_gpu:  # not before: cuDNN's search takes workspaces that steps do not need
        torch.cuda.reset_peak_memory_stats(world.device)
        between = torch.cuda.memory_allocated(world.device)  # weights, gradients, momentum, views
    seconds = hardware.step_seconds(bench.step, world.device, steps)
    middle = float(np.median(seconds))
    rate = settings.batch / middle
    guard = bench.guard
    if not on_gpu:  # there alone it reads its flag on the host
        bench.guard = None
    launches, waits = hardware.launches_and_waits(bench.step, world.device)
    bench.guard = guard
    row: dict[str, Any] = {
        "settings": asdict(settings),
        "optimizer": bench.optimizer.impl,
        "images_per_second_per_gpu": percentiles(settings.batch / seconds),
        "images_per_second": float(f"{rate * world.size:.5g}"),
        "step_ms": percentiles(1000 * seconds),
        "forwards_per_second": float(f"{rate * FORWARDS_OF_AN_IMAGE:.5g}"),
        "compile_seconds": bench.compile_seconds,
        "launches": launches,
        "host_waits": waits,
        "host_share": hardware.host_share(bench.step, world.device),
        "flop_share": rate * limits["flop_of_an_image"] / limits["flops"],
        "byte_share_estimate": rate * limits["bytes_of_an_image"] / limits["bytes"],
        "loss_is_finite": math.isfinite(float(loss)),
        "n": steps,
    }
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(world.device)
        row["peak_gb"] = float(f"{peak / 2**30:.3g}")
        row["mb_per_image"] = float(f"{peak / 2**20 / settings.batch:.3g}")
        if settings.engine != "graph":  # a graph holds its memory between steps too
            row["activation_mb_per_image"] = float(
                f"{(peak - between) / 2**20 / settings.batch:.3g}"
            )
    row["kept_mb_per_image_counted"] = float(f"{limits['kept_of_an_image'] / 2**20:.3g}")
    return row


def measure_linear(
    settings: StepSettings, world: World, *, steps: int, warm_up: int
) -> dict[str, Any]:
    """Linear evaluation on images that are on the device: a frozen backbone in evaluation mode, one
    view, 1000 classes, the linear layer's forward, backward and update."""
    device, dtype = world.device, AUTOCAST.get(settings.precision)
    torch.manual_seed(0)
    net = BYOL(
        settings.backbone, image_size=settings.image_size, projector=(8, 8), predictor=(8, 8)
    )
    width, backbone = net.feature_dim, net.online.encoder.backbone.eval().requires_grad_(False)
    backbone = backbone.to(device).to(memory_format=torch.channels_last)
    if settings.engine != "eager":
        backbone = torch.compile(backbone, dynamic=False)
    head = nn.Linear(width, 1000).to(device)
    optimizer = LARS(param_groups(head, 0.0), 0.1)
    side = settings.image_size
    images = torch.randn(settings.batch, side, side, 3, device=device).to(dtype or torch.float32)
    images = images.permute(0, 3, 1, 2)
    labels = torch.randint(0, 1000, (settings.batch,), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            with torch.no_grad():
                features = backbone(images)
            loss = nn.functional.cross_entropy(head(features.float()), labels)
        loss.backward()
        optimizer.step()

    for _ in range(warm_up):
        step()
    seconds = hardware.step_seconds(step, device, steps)
    rate = settings.batch / float(np.median(seconds))
    return {
        "images_per_second_per_gpu": percentiles(settings.batch / seconds),
        "images_per_second": float(f"{rate * world.size:.5g}"),
        "step_ms": percentiles(1000 * seconds),
        "forwards_per_second": float(f"{rate:.5g}"),
        "n": steps,
    }
