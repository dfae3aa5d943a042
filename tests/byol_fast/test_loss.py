import pytest
import torch

from byol_fast.loss import pair_loss, regression_loss


def test_golden_value():
    loss = regression_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))
    torch.testing.assert_close(loss, torch.tensor([0.08]), rtol=0, atol=1e-6)


def test_range_and_cosine():
    torch.manual_seed(0)
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    want = 2 - 2 * torch.nn.functional.cosine_similarity(a, b)
    torch.testing.assert_close(regression_loss(a, b), want)
    torch.testing.assert_close(regression_loss(a, 3 * a), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(regression_loss(a, -a), torch.full((5,), 4.0))


def test_zero_vector_gives_two_and_finite_gradient():
    a = torch.zeros(1, 4, requires_grad=True)
    loss = regression_loss(a, torch.ones(1, 4))
    loss.sum().backward()
    assert loss.item() == 2
    assert torch.isfinite(a.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_is_computed_in_fp32(dtype):
    torch.manual_seed(0)
    a = (torch.randn(3, 256) * 100).to(dtype)  # the square sum overflows fp16
    b = torch.randn(3, 256).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = regression_loss(a, b)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, regression_loss(a.float(), b.float()), rtol=0, atol=0)


def test_pair_sums_directions_and_stops_the_target():
    torch.manual_seed(0)
    p, z = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss = pair_loss(p, z)
    want = (regression_loss(p[:3], z[3:]) + regression_loss(p[3:], z[:3])).mean()
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert z.grad is None and p.grad.abs().sum() > 0
    one = torch.ones(2, 4)
    assert pair_loss(one, -one).item() == pytest.approx(8)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        regression_loss(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="two views"):
        pair_loss(torch.ones(3, 3), torch.ones(3, 3))
