"""LARS and moving average in one pass, against the plain loops; without a GPU interpreted."""

import copy

import pytest
import torch
from torch import nn

from byol_fast.optim import LARS, ema_, set_lr

fused = pytest.importorskip("byol_fast.updates.fused_update", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Tensors that end within a block, at its end, within a piece, at its end, and in a further piece.
SHAPES = [(3, 5), (4, 128), (32, 64), (2, 57, 3, 3)]
VARIANTS = [
    pytest.param(100, {}, marks=pytest.mark.slow),
    (15, {}),
    (15, {"norm": "sum"}),
    (15, {"norm": "sum", "lr_in_momentum": True}),
    (15, {"lr_in_momentum": True}),
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that small tensors have several pieces and blocks."""
    monkeypatch.setattr(fused, "_PIECE", 1024)
    monkeypatch.setattr(fused, "_BLOCK", 512)


def networks(seed=0):
    """Two groups for each of two optimizers, and a target that follows some of the parameters."""
    torch.manual_seed(seed)
    groups = [
        {"params": [nn.Parameter(torch.randn(s, device=DEVICE) * 0.05) for s in SHAPES]},
        {
            "params": [nn.Parameter(torch.randn(n, device=DEVICE)) for n in (512, 5)],
            "weight_decay": 0.0,
            "adapt": False,
        },
    ]
    online = [*groups[0]["params"][1:], groups[1]["params"][1]]
    return groups, online, [torch.randn_like(p).requires_grad_(False) for p in online]


def parameters(groups):
    return [p for group in groups for p in group["params"]]


@pytest.mark.parametrize(("steps", "variant"), VARIANTS, ids=str)
def test_it_equals_the_reference_step_after_step(steps, variant):
    as_tensors = variant.get("lr_in_momentum", False)  # lr and τ as numbers, or on the device
    groups, online, target = networks()
    twins, follower = copy.deepcopy(groups), [t.clone() for t in target]
    names = {p: i for i, p in enumerate(parameters(groups))}
    online_twins = [parameters(twins)[names[p]] for p in online]
    options = {"weight_decay": 1e-4, **variant}
    lr = torch.zeros((), device=DEVICE) if as_tensors else 0.0
    fast = LARS(groups, lr=lr, impl="fused", **options)
    plain = LARS(twins, lr=0.0, impl="reference", **options)
    start = [p.detach().clone() for p in parameters(groups)]
    for step in range(steps):
        for p, q in zip(parameters(groups), parameters(twins), strict=True):
            p.grad = torch.randn_like(p) * 1e-3
            q.grad = p.grad.clone()
        rate, decay = 2.0 * min(step / 10, 1), 1 - 0.05 / (step + 1)
        set_lr(fast, rate)
        set_lr(plain, rate)
        tau = torch.tensor(decay, dtype=torch.float64, device=DEVICE) if as_tensors else decay
        fast.step_and_average(target, online, tau)
        plain.step()
        ema_(follower, online_twins, decay)
    close = {"rtol": 0, "atol": 1e-6}
    for p, q, was in zip(parameters(groups), parameters(twins), start, strict=True):
        assert (p - was).abs().max() > 1e-4
        torch.testing.assert_close(p, q, **close)
        momentum = fast.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"]
        torch.testing.assert_close(*momentum, **close)
    for mine, other in zip(target, follower, strict=True):
        torch.testing.assert_close(mine, other, **close)


def test_two_runs_are_equal_to_the_last_bit():
    ends = []
    for _ in range(2):
        groups, online, target = networks()
        optimizer = LARS(groups, lr=1.0, weight_decay=1e-4, impl="fused")
        for p in parameters(groups):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        for _ in range(3):
            optimizer.step_and_average(target, online, 0.9)
        ends.append([*parameters(groups), *target])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("norm", ["update", "sum"])
def test_zero_norms_mean_ratio_one(norm):
    none, still = (nn.Parameter(torch.full((2, 2), v, device=DEVICE)) for v in (0.0, 1.0))
    none.grad, still.grad = torch.full_like(none, 0.5), torch.zeros_like(still)
    LARS([none, still], lr=1.0, impl="fused", norm=norm).step()
    assert none.tolist() == [[-0.5] * 2] * 2
    assert still.tolist() == [[1.0] * 2] * 2


def test_gradients_of_another_layout_and_memory_that_moves():
    torch.manual_seed(0)
    p = nn.Parameter(
        torch.randn(8, 4, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    )
    q = nn.Parameter(p.detach().clone())
    fast = LARS([p], lr=1.0, weight_decay=0.1, impl="fused")
    plain = LARS([q], lr=1.0, weight_decay=0.1, impl="reference")
    for layout in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        p.grad = torch.randn(p.shape, device=DEVICE).contiguous(memory_format=layout)
        q.grad = p.grad.clone()
        fast.step()
        plain.step()
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    fast.load_state_dict(copy.deepcopy(plain.state_dict()))  # new buffers, at new addresses
    p.grad = q.grad = torch.ones_like(p)
    fast.step()
    plain.step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_who_has_no_gradient_stays_but_its_follower_moves():
    used, unused = (nn.Parameter(torch.ones(2, 2, device=DEVICE)) for _ in range(2))
    target = [torch.zeros(2, 2, device=DEVICE) for _ in range(2)]
    optimizer = LARS([used, unused], lr=0.1, weight_decay=0.1, impl="fused")
    used.grad = torch.ones_like(used)
    optimizer.step_and_average(target, [used, unused], 0.75)
    assert (unused == 1).all() and unused not in optimizer.state
    torch.testing.assert_close(target[0], 0.25 * used.detach())
    torch.testing.assert_close(target[1], torch.full((2, 2), 0.25, device=DEVICE))


def test_step_alone_leaves_no_average_behind():
    p = nn.Parameter(torch.ones(3, 3, device=DEVICE))
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    assert LARS([p], lr=0.1, impl="fused").step() is None
    assert (p < before).all()


def test_memory_that_is_not_aligned():
    base = torch.randn(65, device=DEVICE)
    p = nn.Parameter(base[1:])
    q = nn.Parameter(p.detach().clone())
    for parameter, impl in ((p, "fused"), (q, "reference")):
        parameter.grad = torch.ones_like(parameter)
        LARS([parameter], lr=0.5, weight_decay=0.1, impl=impl).step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        (torch.ones(2, 2, dtype=torch.float64, device=DEVICE), "float32"),
        (torch.ones(4, 4, device=DEVICE)[:, ::2], "gaps"),
    ],
    ids=["float64", "gaps"],
)
def test_what_it_cannot_take_is_refused(parameter, reason):
    with pytest.raises(ValueError, match=reason):
        LARS([nn.Parameter(parameter)], lr=0.1, impl="fused")


def test_a_group_that_is_added_later():
    first, second = (nn.Parameter(torch.ones(2, 2, device=DEVICE)) for _ in range(2))
    optimizer = LARS([first], lr=0.1, impl="fused")
    optimizer.add_param_group({"params": [second], "adapt": False})
    second.grad = torch.ones_like(second)
    optimizer.step()
    torch.testing.assert_close(second.detach(), torch.full_like(second, 0.9))
    with pytest.raises(ValueError, match="float32"):
        optimizer.add_param_group({"params": [nn.Parameter(second.detach().double())]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_auto_is_foreach_on_a_cpu():
    assert LARS([nn.Parameter(torch.ones(2))], lr=0.1).impl == "foreach"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_auto_is_fused_on_a_gpu_and_waits_for_nothing():
    groups, online, target = networks()
    optimizer = LARS(groups, lr=0.1, weight_decay=1e-4)
    assert optimizer.impl == "fused"
    for p in parameters(groups):
        p.grad = torch.randn_like(p)
    optimizer.step_and_average(target, online, 0.99)  # compiles, and makes the buffers
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step_and_average(target, online, 0.99)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_addresses_that_could_not_be_sent_are_sent_by_settle(monkeypatch):
    p = nn.Parameter(torch.ones(4, 4, device=DEVICE))
    optimizer = LARS([p], lr=0.5, impl="fused")
    p.grad = torch.ones_like(p)
    optimizer.step()
    group = optimizer._dispatch.fused[0]
    first = group._table.clone()
    group._addresses = [*group._addresses[:1], 16, *group._addresses[2:]]  # as a capture leaves it
    optimizer.settle()
    assert group._table[1] == 16
    assert (group._table != first).sum() == 1
