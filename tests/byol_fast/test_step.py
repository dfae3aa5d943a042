"""One update: its order, its accumulation, its precisions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from byol_fast.compiled import as_they_stand
from byol_fast.guard import Guard
from byol_fast.loss import pair_loss
from byol_fast.model import BYOL
from byol_fast.optim import LARS, param_groups
from byol_fast.step import train_step
from tests.byol_fast.networks import Small


def make(seed: int = 0) -> tuple[BYOL, LARS]:
    torch.manual_seed(seed)
    model = BYOL(Small(), image_size=16, projector=(16, 8), predictor=(16, 8))
    return model, LARS(param_groups(model.online, 1e-4), lr=0.5)


def views(batch: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def step(model: BYOL, optimizer: LARS, batches: list[torch.Tensor], **options):
    options = {"accumulate": len(batches), "decay": 0.9, **options}
    return train_step(model, as_they_stand(model), optimizer, batches, **options)


def test_a_step_is_target_online_backward_lars_ema() -> None:
    model, optimizer = make()
    by_hand = copy.deepcopy(model)
    output = step(model, optimizer, [x := views()])

    other = LARS(param_groups(by_hand.online, 1e-4), lr=0.5)
    flat = x.flatten(0, 1)
    with torch.no_grad():
        target = by_hand.target(flat)
    prediction, _, _ = by_hand.online(flat)
    loss = pair_loss(prediction, target)
    loss.backward()
    other.step()
    with torch.no_grad():  # with the *updated* online weights
        pairs = zip(by_hand.target_ema_params(), by_hand.online_ema_params(), strict=True)
        for follower, leader in pairs:
            follower.copy_(0.9 * follower + 0.1 * leader)

    assert float(output.loss) == float(loss.detach())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], atol=1e-6, rtol=1e-6)


def test_no_gradient_reaches_the_target_or_stays_from_before() -> None:
    model, optimizer = make()
    step(model, optimizer, [views()])
    once = [p.grad.clone() for p in model.online.parameters()]
    assert all(p.grad is None for p in model.target.parameters())
    fresh, again = make()
    for p in fresh.online.parameters():
        p.grad = torch.full_like(p, 7.0)
    step(fresh, again, [views()])
    for p, expected in zip(fresh.online.parameters(), once, strict=True):
        assert torch.equal(p.grad, expected)


def freeze_norms(model: BYOL) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def test_accumulating_n_batches_is_one_step_of_n_times_the_images() -> None:
    """With BatchNorm frozen, as its statistics are a micro-batch's by definition."""
    whole, one = make()
    parts, many = make()
    x = views(12)
    for model in (whole, parts):
        freeze_norms(model)
    first = step(whole, one, [x])
    second = step(parts, many, list(x.split(4, dim=1)))
    torch.testing.assert_close(first.loss, second.loss, atol=1e-6, rtol=1e-6)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(
            value, parts.state_dict()[name], atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_accumulation_moves_the_target_once() -> None:
    model, optimizer = make()
    before = [p.clone() for p in model.target_ema_params()]
    step(model, optimizer, [views(4, seed) for seed in range(5)], decay=0.5)
    pairs = zip(before, model.target_ema_params(), model.online_ema_params(), strict=True)
    for old, new, leader in pairs:
        torch.testing.assert_close(new, 0.5 * old + 0.5 * leader, atol=1e-6, rtol=1e-6)


def test_the_targets_running_statistics_are_its_own() -> None:
    model, optimizer = make()
    step(model, optimizer, [views()], decay=1.0)
    assert isinstance(model.target.backbone.norm, nn.modules.batchnorm._BatchNorm)
    for mine, leader in zip(
        model.target.parameters(), model.online.encoder.parameters(), strict=True
    ):
        assert mine.data_ptr() != leader.data_ptr()
    assert not torch.equal(model.target.backbone.norm.running_mean, torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_fp32_and_weights_stay_fp32(dtype: torch.dtype) -> None:
    exact, one = make()
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if dtype == torch.float16 else None
    try:
        low = step(model, optimizer, [views()], autocast_dtype=dtype, scaler=scaler)
    except RuntimeError as error:
        pytest.skip(f"this processor or torch has no {dtype} kernels: {error}")
    full = step(exact, one, [views()])
    # Outputs carry 8 (bf16) or 11 (fp16) bits; a loss near 4 is a mean of 16 such cosines.
    assert float(low.loss) == pytest.approx(float(full.loss), abs=0.05)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    gradient, expected = (
        torch.cat([p.grad.flatten() for p in m.online.parameters()]) for m in (model, exact)
    )
    # BatchNorm over 8 images magnifies rounding: 27 % off in bf16, but the same direction.
    assert float(torch.cosine_similarity(gradient, expected, dim=0)) > 0.9


def test_the_gradients_norm_is_told_without_the_scale() -> None:
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)  # grows in the step
    low = step(model, optimizer, [views()], scaler=scaler, guard=Guard(model, window=1))
    assert scaler.get_scale() == 2048
    exact, other = make()
    full = step(exact, other, [views()], guard=Guard(exact, window=1))
    assert float(low.gradient_norm) == pytest.approx(float(full.gradient_norm), rel=1e-5)


def test_an_overflow_under_fp16_skips_the_update() -> None:
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = [p.clone() for p in model.online.parameters()]
    x = views()
    x[0, 0, 0, 0, 0] = float("inf")
    step(model, optimizer, [x], scaler=scaler)
    for p, old in zip(model.online.parameters(), before, strict=True):
        assert torch.equal(p, old)
    assert scaler.get_scale() < 2.0**127


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_simsiam_has_no_ema_and_still_steps(dtype: torch.dtype | None) -> None:
    """In low precision too, where autocast keeps the weights that the target has cast."""
    torch.manual_seed(0)
    model = BYOL(Small(), image_size=16, projector=(16, 8), predictor=(16, 8), momentum=False)
    optimizer = LARS(param_groups(model.online, 0.0), lr=0.5)
    before = {name: p.clone() for name, p in model.online.named_parameters()}
    step(model, optimizer, [views()], autocast_dtype=dtype)
    for name, p in model.online.named_parameters():
        assert not torch.equal(p, before[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_step_never_waits_for_the_gpu() -> None:
    model, _ = make()
    model = model.cuda()
    optimizer = LARS(param_groups(model.online, 1e-4), lr=0.5)
    x = views().cuda()
    step(model, optimizer, [x])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = step(model, optimizer, [x], autocast_dtype=torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(output.loss.isfinite())
