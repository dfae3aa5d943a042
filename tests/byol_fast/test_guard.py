"""A step that is not finite changes nothing, and watching for it changes nothing either."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from byol_fast.compiled import as_they_stand
from byol_fast.guard import Guard
from byol_fast.model import BYOL
from byol_fast.optim import LARS, ema_, param_groups
from byol_fast.step import train_step
from tests.byol_fast.networks import Small


def make(impl: str = "auto") -> tuple[BYOL, LARS]:
    torch.manual_seed(0)
    model = BYOL(Small(), image_size=16, projector=(16, 8), predictor=(16, 8))
    return model, LARS(param_groups(model.online, 1e-4), lr=0.5, impl=impl)


def views(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def everything(model: BYOL, optimizer: LARS) -> dict[str, torch.Tensor]:
    momentum = {
        str(i): optimizer.state[p]["momentum_buffer"]
        for i, p in enumerate(model.online.parameters())
        if p in optimizer.state
    }
    return {k: v.clone() for k, v in {**model.state_dict(), **momentum}.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def step(model: BYOL, optimizer: LARS, x: torch.Tensor, guard: Guard | None):
    networks = as_they_stand(model)
    return train_step(model, networks, optimizer, [x], accumulate=1, decay=0.9, guard=guard)


def test_a_guarded_run_is_bitwise_the_unguarded_one() -> None:
    guarded, one = make()
    plain, other = make()
    guard = Guard(guarded, window=8)
    for seed in range(5):
        a = step(guarded, one, views(seed), guard)
        b = step(plain, other, views(seed), None)
        assert torch.equal(a.loss, b.loss)
        gradients = [p.grad for p in plain.online.parameters()]
        torch.testing.assert_close(a.gradient_norm, nn.utils.get_total_norm(gradients))
    assert same(everything(guarded, one), everything(plain, other))


@pytest.mark.parametrize("impl", ["reference", "foreach", "fused"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(impl: str, bad: float) -> None:
    if impl == "fused" and not torch.cuda.is_available():
        pytest.importorskip("triton")
    model, optimizer = make(impl)
    guard = Guard(model, window=4)
    step(model, optimizer, views(), guard)
    before = everything(model, optimizer)
    x = views(2)
    x[1, 3, 0, 2, 2] = bad
    output = step(model, optimizer, x, guard)
    assert not output.gradient_norm.isfinite()
    assert same(before, everything(model, optimizer))
    step(model, optimizer, views(3), guard)
    after = everything(model, optimizer)
    assert not same(before, after) and all(v.isfinite().all() for v in after.values())


def test_the_seed_is_one_or_not_a_number() -> None:
    guard = Guard(make()[0], window=1)
    for loss, finite in ((3.5, True), (float("nan"), False), (float("inf"), False)):
        seed = guard.seed(torch.tensor(loss))
        assert (float(seed) == 1.0) is finite and bool(seed.isnan()) is not finite


def test_the_outcomes_are_read_once_and_in_order() -> None:
    guard = Guard(make()[0], window=4)
    yes, no, loss = torch.tensor(True), torch.tensor(False), torch.tensor(1.0)
    for number, finite in enumerate([yes, no, yes, no], start=10):
        guard.note(number, finite, loss if number < 13 else loss / 0)
    assert guard.read() == ([11, 13], [13], 4)
    assert guard.read() == ([], [], 0)


@pytest.mark.parametrize("decay", [0.9, torch.tensor(0.9, dtype=torch.float64)])
def test_a_moving_average_can_be_held(decay: float | torch.Tensor) -> None:
    target, online = [torch.zeros(3)], [torch.ones(3)]
    ema_(target, online, decay, finite=torch.tensor(False))
    assert torch.equal(target[0], torch.zeros(3))
    ema_(target, online, decay, finite=torch.tensor(True))
    torch.testing.assert_close(target[0], torch.full((3,), 0.1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_guard_never_waits_for_the_gpu() -> None:
    model, _ = make()
    model = copy.deepcopy(model).cuda()
    optimizer = LARS(param_groups(model.online, 1e-4), lr=0.5)
    guard = Guard(model, window=4)
    x, bad = views().cuda(), torch.full_like(views(), float("nan")).cuda()
    step(model, optimizer, x, guard)
    before = everything(model, optimizer)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = step(model, optimizer, bad, guard)
        guard.note(1, output.gradient_norm.isfinite(), output.loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(before, everything(model, optimizer))
    assert guard.read()[0] == [1]
