"""Nothing in the hot step makes the host wait for a GPU, and nothing in it piles up."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import make_folder
from torch import Tensor, nn

from benchmarks.host_reads import HostReads
from byol_fast import config as configuration
from byol_fast import pretrain
from byol_fast import trainer as trainer_module
from byol_fast.assemble import assemble
from byol_fast.compiled import Networks, as_they_stand
from byol_fast.distributed import World
from byol_fast.loss import pair_loss
from byol_fast.model import BYOL
from byol_fast.optim import LARS, param_groups
from byol_fast.session.opening import open_data
from byol_fast.session.signals import StopSignal
from byol_fast.step import StepOutput, train_step

HOST = World(0, 1, torch.device("cpu"))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


class Reads(torch.autograd.Function):
    """Reads a value back in backward, where only the engine calls it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1.0 if grad.sum().item() > -1e9 else 0.0)


class Bench:
    """A step that can be taken again and again."""

    def __init__(self, device: torch.device = HOST.device, impl: str = "auto") -> None:
        torch.manual_seed(0)
        model = BYOL(Small(), image_size=16, projector=(16, 8), predictor=(16, 8))
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.optimizer = LARS(param_groups(self.model.online, 1e-4), lr=0.5, impl=impl)
        self.x = torch.randn(2, 8, 16, 16, 3, device=device).permute(0, 1, 4, 2, 3)
        self.networks = as_they_stand(self.model)

    def step(self, dtype: torch.dtype | None = None) -> Tensor:
        options = {"accumulate": 1, "decay": 0.9, "autocast_dtype": dtype}
        return train_step(self.model, self.networks, self.optimizer, [self.x], **options).loss


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_step_reads_nothing_back(dtype: torch.dtype | None) -> None:
    bench = Bench()
    bench.step(dtype)
    with HostReads() as seen:
        bench.step(dtype)
    assert seen.reads == []
    assert seen.operators > 50  # forward, backward and update were watched


def reading_loss(read: Any) -> Any:
    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        read(prediction)
        return pair_loss(prediction, target)

    return loss


READS = {
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t.detach().mean()),
    "bool": lambda t: bool((t > 0).any()),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.detach().numpy(),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu"),
    "to a device": lambda t: t.to(device=torch.device("cpu")),
    "mask": lambda t: t[t > 0],
    "equal": lambda t: t.detach().equal(t),
    "unique": lambda t: t.detach().unique(),
    "backward": lambda t: Reads.apply(t).sum().backward(retain_graph=True),
}


@pytest.mark.parametrize("way", READS)
def test_whoever_reads_back_is_seen(way: str) -> None:
    bench = Bench()
    stands = bench.networks
    bench.networks = Networks(stands.online, stands.target, reading_loss(READS[way]))
    with HostReads() as seen:
        bench.step()
    assert len(seen.reads) == 1


def test_the_plain_optimizer_is_seen_to_read_norms() -> None:
    bench = Bench(impl="reference")
    with HostReads() as seen:
        bench.step()
    adapted = bench.optimizer.param_groups[0]["params"]
    assert len(seen.reads) == 2 * len(adapted)


def tensors() -> set[int]:
    gc.collect()
    return {id(o) for o in gc.get_objects() if issubclass(type(o), Tensor)}  # proxies may be dead


def test_steps_leave_no_tensors_behind() -> None:
    bench, kept = Bench(), []
    for _ in range(2):
        bench.step()
    tensors()  # what earlier tests have left is gone by now, or stays
    before = tensors()
    for _ in range(5):
        bench.step()
    after = tensors()
    assert len(after) <= len(before)
    kept.append(torch.zeros(1))
    assert len(tensors()) == len(after) + 1  # one that stays would be seen


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[Any]]]:
    """A trainer of a tiny run on one process, and views for its steps."""
    root = tmp_path_factory.mktemp("waits")
    small = "--image-size 16 --hidden-size 16 --batch-size 4 --epochs 4 --tracker none"
    data = make_folder(root / "train", images=16)
    config = configuration.parse(
        ["--recipe", "quickstart", "--data", str(data), "--out", str(root / "run"), *small.split()]
    )
    with contextlib.ExitStack() as stack:
        with StopSignal() as signal:
            data = open_data(config, HOST, signal)
        resolved = pretrain._resolve(config, data, HOST)
        trainer, _ = assemble(resolved, data, HOST, stack)
        yield trainer, list(trainer.pipeline.steps(0, 4))


def test_a_trainers_step_reads_nothing_back(
    run: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the guard, which reads its flag on a CPU; on a GPU the kernels of the update do."""
    trainer, views = run

    def unguarded(*args: Any, guard: Any, **kwargs: Any) -> StepOutput:
        return train_step(*args, **kwargs)

    monkeypatch.setattr(trainer_module, "train_step", unguarded)
    monkeypatch.setattr(trainer, "_finite", lambda output: output.loss.isfinite())
    assert trainer.probe is not None  # it steps too
    trainer._one_step(iter(views[:1]))  # the first one saves pairs of views
    with HostReads() as seen:
        trainer._one_step(iter(views[1:2]))
    assert seen.reads == []
    monkeypatch.setattr(trainer, "_finite", lambda output: torch.tensor(bool(output.loss > 0)))
    with HostReads() as seen:
        trainer._one_step(iter(views[2:3]))
    assert len(seen.reads) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gpu_steps_neither_wait_nor_take_more_memory(dtype: torch.dtype | None) -> None:
    bench = Bench(torch.device("cuda"))
    for _ in range(3):
        loss = bench.step(dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    loss = bench.step(dtype)
    held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    blocks = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            loss = bench.step(dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(loss.isfinite())
    assert torch.cuda.memory_allocated() == held
    assert torch.cuda.max_memory_allocated() == peak
    assert torch.cuda.memory_stats()["num_device_alloc"] == blocks  # nothing new from the driver


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_what_the_counter_finds() -> None:
    bench = Bench(torch.device("cuda"))
    twin = copy.copy(bench)
    twin.networks = Networks(
        bench.networks.online, bench.networks.target, reading_loss(lambda t: t.sum().item())
    )
    twin.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            twin.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
