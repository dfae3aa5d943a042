"""A step as one CUDA graph: the same steps, without waiting; what cannot be captured is said."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from byol_fast.compiled import as_they_stand
from byol_fast.graphed import WARM_UP, GraphedStep, refusal
from byol_fast.model import BYOL
from byol_fast.optim import LARS, param_groups, set_lr
from byol_fast.step import train_step

GPU = torch.device("cuda")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


@pytest.mark.parametrize(
    ("device", "accumulate", "precision", "word"),
    [
        ("cpu", 1, "bf16", "no GPU"),
        ("cuda", 2, "bf16", "accumulate"),
        ("cuda", 1, "fp16", "fp16"),
        ("cuda", 1, "bf16", ""),
        ("cuda", 1, "fp32", ""),
    ],
)
def test_what_cannot_be_one_graph(device: str, accumulate: int, precision: str, word: str) -> None:
    reason = refusal(torch.device(device), accumulate=accumulate, precision=precision)
    assert bool(reason) == bool(word)
    assert word in reason


def steps(count: int):
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        x = torch.randn(2, 8, 16, 16, 3, generator=generator).permute(0, 1, 4, 2, 3)
        yield x.to(GPU), 0.1 * number, 1 - 0.1 / (number + 1)


def pair() -> tuple[BYOL, LARS, BYOL, LARS]:
    torch.manual_seed(0)
    one = BYOL(Small(), image_size=16, projector=(16, 8), predictor=(16, 8)).to(GPU)
    two = copy.deepcopy(one)
    return (
        *(one, LARS(param_groups(one.online, 1e-4), lr=0.0)),
        *(two, LARS(param_groups(two.online, 1e-4), lr=0.0)),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_replayed_steps_are_the_steps(dtype: torch.dtype | None) -> None:
    plain, usual, fast, optimizer = pair()
    step = GraphedStep(fast, as_they_stand(fast), optimizer, autocast_dtype=dtype)
    options = {"accumulate": 1, "autocast_dtype": dtype}
    for x, lr, decay in steps(WARM_UP + 8):
        set_lr(usual, lr)
        wanted = train_step(plain, as_they_stand(plain), usual, [x], decay=decay, **options)
        got = step(x, lr=lr, decay=decay)
        torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-3, atol=1e-3)
    assert step._graph is not None
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_replay_waits_for_nothing() -> None:
    _, _, fast, optimizer = pair()
    step = GraphedStep(fast, as_they_stand(fast), optimizer, autocast_dtype=None)
    for number, (x, lr, decay) in enumerate(steps(WARM_UP + 3)):
        if number > WARM_UP:
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(x, lr=lr, decay=decay)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert step._graph is not None  # a wait in a replay would have raised above


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_that_reads_back_is_not_captured_and_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, _, fast, optimizer = pair()
    networks = as_they_stand(fast)
    waiting = type(networks)(
        networks.online, networks.target, lambda a, b: (a - b).square().mean() * float(a[0, 0] < 9)
    )
    step = GraphedStep(fast, waiting, optimizer, autocast_dtype=None)
    with caplog.at_level(logging.WARNING):
        losses = [step(x, lr=lr, decay=decay).loss for x, lr, decay in steps(WARM_UP + 3)]
    assert "not captured" in caplog.text
    assert all(loss.isfinite() for loss in losses)
