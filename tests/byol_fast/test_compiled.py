"""Compiled networks: compiled once, nothing left behind by the trial, and a loud way back.

That compiled steps are the steps is in test_fast_paths.py.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faults.harness import Zygote, run_ranks
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from byol_fast.compiled import as_they_stand, compiled
from byol_fast.distributed import World, data_parallel
from byol_fast.errors import OutOfMemory
from byol_fast.model import BYOL
from byol_fast.optim import LARS, param_groups
from byol_fast.step import train_step

ALONE = World(0, 1, torch.device("cpu"))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.again = nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu_()
        return (x + self.again(x)).mean((2, 3))


class Unclear(Small):
    """A network that cannot become one graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class Forgetful(Small):
    """A network whose compiled backward is wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if torch.compiler.is_compiling():
            x = x.detach() + 0 * x
        return self.norm(x).mean((2, 3))


def make(backbone: type[nn.Module] = Small) -> BYOL:
    torch.manual_seed(0)
    model = BYOL(backbone(), image_size=16, projector=(16, 8), predictor=(16, 8))
    return model.to(memory_format=torch.channels_last)


def prepare(model: BYOL, backend: str = "aot_eager"):
    return compiled(
        model,
        ALONE,
        batch=4,
        image_size=16,
        dtype=torch.float32,
        autocast_dtype=None,
        backend=backend,
    )


def train(model: BYOL, networks, steps: int = 3) -> list[float]:
    optimizer = LARS(param_groups(model.online, 1e-4), lr=0.5)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(2, 4, 16, 16, 3, generator=generator).permute(0, 1, 4, 2, 3)
        output = train_step(model, networks, optimizer, [x], accumulate=1, decay=0.9)
        losses.append(output.loss.item())
    return losses


@pytest.mark.slow
def test_one_compilation_serves_all_steps() -> None:
    networks = prepare(model := make())
    with torch.compiler.set_stance("fail_on_recompile"):
        assert len(train(model, networks)) == 3


def test_the_trial_leaves_nothing_behind() -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    prepare(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_compiled_runs_as_it_stands_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make(Unclear)
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        networks = prepare(model)
    assert "torch.compile failed" in caplog.text
    assert networks.online is model.online
    assert networks.compile_seconds is None
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(loss > 0 for loss in train(model, networks))


class Failing(Small):
    """A network that fails, and may not say why."""

    text = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise RuntimeError(self.text)
        return super().forward(x)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", ""), ("raised:\n\n  why\nwhere", "raised: why"), ("why\nwhere", "why")],
)
def test_a_failure_is_told_in_a_line(
    text: str, said: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "text", text)
    model = make(Failing)
    with caplog.at_level(logging.WARNING), torch.compiler.set_stance("force_eager"):
        assert prepare(model).online is model.online
    assert f"torch.compile failed (RuntimeError: {said})" in caplog.text


def test_a_compiled_backward_without_gradients_is_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make(Forgetful)
    with caplog.at_level(logging.WARNING):
        networks = prepare(model)
    assert "without a gradient" in caplog.text
    assert networks.online is model.online


class Broken:
    """A compiler that breaks on rank 1, at one of its stages."""

    def __init__(self, stage: str, rank: int) -> None:
        self.stage, self.here = stage, rank == 1

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        self.fail("compiling")
        return aot_autograd(fw_compiler=self.forward, bw_compiler=self.backward)(graph, inputs)

    def forward(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        return make_boxed_func(lambda *args: (self.fail("running"), graph(*args))[1])

    def backward(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        self.fail("compiling the backward")
        return make_boxed_func(lambda *args: (self.fail("running the backward"), graph(*args))[1])

    def fail(self, stage: str) -> None:
        if self.here and stage == self.stage:
            raise ZeroDivisionError(f"broken when {stage}")
        if self.here and self.stage == f"memory when {stage}":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


STAGES = ("compiling the backward", "running", "running the backward")
WITHOUT_MEMORY = "memory when running"


def _broken(world: World, stage: str, logged: io.StringIO) -> str:
    """What becomes of compiled networks with shared statistics, and of a step after it."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = BYOL(Small(), image_size=16, projector=(16, 8), predictor=(16, 8), bn_sync=True)
    before = copy.deepcopy(model.state_dict())
    logged.truncate(0)
    options = {"batch": 4, "image_size": 16, "dtype": torch.float32, "autocast_dtype": None}
    try:
        networks = compiled(model, world, **options, backend=Broken(stage, world.rank))
    except OutOfMemory as error:
        return f"out of memory: {error}"
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    kind = "eager" if networks.online is model.online else "compiled"
    networks = dataclasses.replace(networks, online=data_parallel(networks.online, world))
    optimizer = LARS(param_groups(model.online, 1e-4), lr=0.5)
    x = torch.randn(2, 4, 16, 16, 3).permute(0, 1, 4, 2, 3) * (1 + 10 * world.rank)
    train_step(model, networks, optimizer, [x], accumulate=1, decay=0.9)
    mean = model.online.encoder.backbone.norm.running_mean.sum().item()  # of both ranks' images
    return f"{kind} {mean:.4f} {logged.getvalue()}"


def _steps(world: World, way: str) -> list[torch.Tensor]:
    """The state after three steps on half of a fixed batch, with shared statistics."""
    torch.manual_seed(0)
    model = BYOL(Small(), image_size=16, projector=(16, 8), predictor=(16, 8), bn_sync=True)
    networks = as_they_stand(model)
    if way == "compiled":
        options = {"batch": 4, "image_size": 16, "dtype": torch.float32}
        networks = compiled(model, world, **options, autocast_dtype=None, backend="aot_eager")
        assert networks.compile_seconds is not None
    networks = dataclasses.replace(networks, online=data_parallel(networks.online, world))
    optimizer = LARS(param_groups(model.online, 1e-4), lr=0.5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(2, 8, 16, 16, 3, generator=generator).permute(0, 1, 4, 2, 3)
        own = x[:, 4 * world.rank : 4 * world.rank + 4]
        train_step(model, networks, optimizer, [own], accumulate=1, decay=0.9)
    return [t.detach().clone() for t in model.state_dict().values()]


def _rank(rank: int, file: str, folder: str) -> None:
    patience = timedelta(seconds=600)  # only a hang takes longer
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=patience
    )
    world = World(rank, 2, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)
    logged = io.StringIO()
    logging.basicConfig(stream=logged, level=logging.WARNING, format="%(message)s")
    results: dict[str, object] = {}
    for way in ("stands", "compiled"):
        results[way] = _steps(world, way)
    for stage in (*STAGES, WITHOUT_MEMORY):
        results[stage] = _broken(world, stage, logged)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], Any]:
    """What two ranks found, by rank and what they did."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(zygote, folder, _rank, 2, folder / "store", folder)
    return {
        (rank, what): found
        for rank in range(2)
        for what, found in torch.load(folder / f"{rank}.pt").items()
    }


@pytest.mark.dist
@pytest.mark.slow
def test_under_ddp_with_shared_statistics_two_ranks_compile_too(
    two_ranks: dict[tuple[int, str], Any],
) -> None:
    for rank in range(2):
        torch.testing.assert_close(
            two_ranks[rank, "compiled"], two_ranks[rank, "stands"], rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(two_ranks[0, "compiled"], two_ranks[1, "compiled"], rtol=0, atol=0)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_f27_a_compiler_that_fails_on_one_rank_leaves_no_rank_waiting(
    two_ranks: dict[tuple[int, str], Any], stage: str
) -> None:
    """With shared statistics each BatchNorm is a collective that rank 0 would wait in."""
    first, second = two_ranks[0, stage], two_ranks[1, stage]
    assert first == second and first.startswith("eager")
    assert f"torch.compile failed on rank 1 (ZeroDivisionError: broken when {stage})" in first


@pytest.mark.dist
@pytest.mark.slow
def test_f26_too_little_memory_in_the_trial_is_no_failure_of_the_compiler(
    two_ranks: dict[tuple[int, str], Any],
) -> None:
    first, second = two_ranks[0, WITHOUT_MEMORY], two_ranks[1, WITHOUT_MEMORY]
    assert first == second
    assert first.startswith("out of memory: rank 1: ")
    assert "Tried to allocate 2.00 GiB" in first
