"""The BYOL step alone, on views that are on the device already."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import hardware
from benchmarks.hardware import percentiles
from byol_fast.compiled import as_they_stand, compiled
from byol_fast.distributed import World, data_parallel
from byol_fast.graphed import WARM_UP, GraphedStep, refusal, side_stream
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
    """What is measured. The last nine can be taken away or tried."""

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
    grouped: int = 0  # BatchNorm as of one rank among so many, without messages
    conv_1x1_as_mm: bool = False  # Inductor's: forward 1x1 convolutions with stride 1 as products

    @property
    def hidden_size(self) -> int:
        """Of projector and predictor: the paper's, or that of small images' recipes."""
        return 4096 if self.image_size > 64 else 512


class OtherPath(RuntimeError):
    """A figure was asked for of a path that did not run."""


class StepBench:
    """A model that takes one and the same step again and again."""

    def __init__(self, settings: StepSettings, world: World) -> None:
        self.settings, self.world, self.device = settings, world, world.device
        self.dtype = AUTOCAST.get(settings.precision)
        reason = refusal(self.device, accumulate=1, precision=settings.precision)
        if settings.engine == "graph" and reason:
            raise ValueError(f"no graph: {reason}")
        if settings.grouped:
            _pretend_group(settings.grouped)
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = settings.cudnn_benchmark
        hidden = settings.hidden_size
        model = BYOL(
            settings.backbone,
            image_size=settings.image_size,
            projector=(hidden, 256),
            predictor=(hidden, 256),
            bn_sync=world.size > 1 or settings.grouped > 1,
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

    @property
    def engine_ran(self) -> str:
        """What the steps so far were: eager, compile, graph, or a graph of eager networks."""
        networks = "eager" if self.compile_seconds is None else "compile"
        if self.graphed is None or not self.graphed.captured:
            return networks
        return "graph" if networks == "compile" else "graph of eager networks"

    def check_engine(self) -> None:
        """After the warm-up.

        Raises:
            OtherPath: steps do not run by the engine that was asked for.
        """
        if self.engine_ran != self.settings.engine:
            raise OtherPath(
                f"engine {self.settings.engine} was asked for and {self.engine_ran} ran: the log "
                "says why"
            )

    def warm_up(self, steps: int) -> StepOutput:
        """At least one step, and as many as a graph needs before it is one.

        Raises:
            OtherPath: see `check_engine`.
        """
        for _ in range(max(1, steps, WARM_UP + 2 if self.graphed is not None else 0)):
            output = self.step()
        self.check_engine()
        return output

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


def _pretend_group(ranks: int) -> None:
    """This process as rank 0 of so many whose messages go nowhere: the kernels are those of many
    ranks, the statistics are not."""
    if dist.is_initialized():
        if dist.get_backend() != "fake":
            raise ValueError("--grouped is for one process, not under torchrun")
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())


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


def measure(
    settings: StepSettings, world: World, *, steps: int, warm_up: int, limits: dict[str, float]
) -> dict[str, Any]:
    """A row: rate, spread, memory, launches, and the shares of what the hardware could do."""
    on_gpu = world.device.type == "cuda"
    bench = StepBench(settings, world)
    loss = bench.warm_up(warm_up).loss
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
        "engine_ran": bench.engine_ran,
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

    started = time.perf_counter()
    step()
    hardware.wait(device)
    first = time.perf_counter() - started
    for _ in range(warm_up - 1):
        step()
    seconds = hardware.step_seconds(step, device, steps)
    rate = settings.batch / float(np.median(seconds))
    return {
        "engine_ran": "eager" if settings.engine == "eager" else "compile",
        "compile_seconds": None if settings.engine == "eager" else first,
        "images_per_second_per_gpu": percentiles(settings.batch / seconds),
        "images_per_second": float(f"{rate * world.size:.5g}"),
        "step_ms": percentiles(1000 * seconds),
        "forwards_per_second": float(f"{rate:.5g}"),
        "n": steps,
    }
