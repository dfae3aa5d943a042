"""Predictors without a gradient: DirectPred and the ridge regression, against NumPy."""

import numpy as np
import pytest
import torch

from byol_fast.networks.predictors import DirectPred, closed_form


def by_hand(correlation: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(correlation)
    strengths = np.sqrt(np.clip(values, 0, None) / values.max()) + 0.01
    return vectors @ np.diag(strengths) @ vectors.T


def batches(count: int = 3, rows: int = 12, dim: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, dim, generator=generator) + 0.3 for _ in range(count)]


def test_directpred_is_the_papers_formula() -> None:
    predictor, correlation = DirectPred(5), None
    for z in batches():
        before = predictor.weight.clone()
        torch.testing.assert_close(predictor(z), z @ before.T)  # this step's inputs act on the next
        predictor.update()
        now = z.double().numpy().T @ z.double().numpy() / len(z)  # not centred, not normalised
        correlation = now if correlation is None else 0.3 * correlation + 0.7 * now
        np.testing.assert_allclose(predictor.correlation.numpy(), correlation, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            predictor.weight.numpy(), by_hand(correlation), rtol=1e-4, atol=1e-5
        )


def test_directpred_starts_as_the_identity_and_has_no_parameters() -> None:
    predictor = DirectPred(4)
    z = torch.randn(6, 4, requires_grad=True)
    torch.testing.assert_close(predictor(z), z)
    predictor(z).sum().backward()
    assert z.grad is not None and not list(predictor.parameters())
    assert {"weight", "correlation", "updates"} <= predictor.state_dict().keys()


def test_micro_batches_are_one_batch() -> None:
    whole, split = DirectPred(5), DirectPred(5)
    for z in batches():
        whole(z)
        for part in z.chunk(3):
            split(part)
        whole.update()
        split.update()
    torch.testing.assert_close(split.weight, whole.weight, rtol=1e-4, atol=1e-5)


def test_evaluation_and_values_that_are_not_finite_change_nothing() -> None:
    predictor = DirectPred(5)
    first, second, _ = batches()
    predictor(first)
    predictor.update()
    before = {name: value.clone() for name, value in predictor.state_dict().items()}
    predictor.eval()(second)
    predictor.update()  # nothing has come
    predictor.train()(second * torch.inf)
    predictor.update()
    for name, value in predictor.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bf16_does_not_reach_the_correlation() -> None:
    plain, low = DirectPred(5), DirectPred(5)
    z = batches()[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert low(z).dtype == torch.bfloat16
    plain(z)
    torch.testing.assert_close(low.moment, plain.moment, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [4, 40])  # fewer than dimensions, too
def test_closed_form_is_the_ridge_regression(rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    t = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    gram = z.numpy().T @ z.numpy()
    penalty = 0.01 * np.trace(gram) / 6
    wanted = np.linalg.solve(gram + penalty * np.eye(6), z.numpy().T @ t.numpy())
    np.testing.assert_allclose(closed_form(z, t, ridge=0.01).numpy(), wanted, rtol=1e-9, atol=1e-12)
    scaled = closed_form(1000 * z, t, ridge=0.01)  # λ follows the scale of z
    np.testing.assert_allclose(1000 * scaled.numpy(), wanted, rtol=1e-9, atol=1e-12)


def test_closed_form_nears_least_squares_and_takes_no_gradient() -> None:
    z = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    t = torch.randn(40, 3, dtype=torch.float64)
    weight = closed_form(z, t, ridge=1e-12)
    torch.testing.assert_close(weight, torch.linalg.lstsq(z.detach(), t).solution)
    assert not weight.requires_grad
    assert closed_form(torch.zeros(3, 2), torch.ones(3, 2)).eq(0).all()
    with pytest.raises(ValueError, match="ridge must be above 0"):
        closed_form(z, t, ridge=0)
