"""Gauges against plain NumPy, and at the two ends: an even cloud and a single point."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from byol_fast.watching import gauges


def cloud(n: int = 96, d: int = 24, seed: int = 0) -> torch.Tensor:
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return z * torch.linspace(0.1, 3, d) + 0.3  # neither centred nor even


def unit(z: torch.Tensor) -> np.ndarray:
    x = z.numpy().astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_embedding_std_is_the_mean_column_deviation_of_unit_rows():
    z = cloud()
    assert gauges.embedding_std(z).item() == pytest.approx(unit(z).std(axis=0).mean(), rel=1e-5)


def test_rankme_is_the_exponential_entropy_of_singular_values():
    z = cloud()
    values = np.linalg.svd(z.numpy().astype(np.float64), compute_uv=False)
    share = values / values.sum()
    expected = np.exp(-(share * np.log(share)).sum())
    assert gauges.rankme(z).item() == pytest.approx(expected, rel=1e-4)


def test_alignment_and_uniformity_follow_their_definitions():
    a, b = cloud(seed=1), cloud(seed=2)
    distance = ((unit(a) - unit(b)) ** 2).sum(axis=1).mean()
    assert gauges.alignment(a, b).item() == pytest.approx(distance, rel=1e-5)
    x = unit(a)
    pairs = ((x[:, None] - x[None]) ** 2).sum(-1)[np.triu_indices(len(x), k=1)]
    assert gauges.uniformity(a).item() == pytest.approx(np.log(np.exp(-2 * pairs).mean()), rel=1e-5)


def test_an_even_cloud_is_healthy():
    z = torch.randn(4096, 64, generator=torch.Generator().manual_seed(3))
    assert gauges.embedding_std(z).item() == pytest.approx(1 / math.sqrt(64), rel=0.01)
    assert gauges.rankme(z).item() > 60
    assert gauges.uniformity(z).item() < -3.5


def test_a_single_point_shows_as_collapse():
    z = torch.ones(32, 64)
    assert gauges.embedding_std(z).item() < 1e-6
    assert gauges.rankme(z).item() == pytest.approx(1.0, abs=0.01)
    assert gauges.alignment(z, z).item() == 0.0
    assert gauges.uniformity(z).item() == pytest.approx(0.0, abs=1e-5)


def test_k_directions_have_rank_k():
    z = torch.eye(5).repeat(8, 1)
    assert gauges.rankme(z).item() == pytest.approx(5.0, rel=1e-3)


def test_zeros_give_finite_numbers():
    z = torch.zeros(8, 4)
    values = [gauges.embedding_std(z), gauges.rankme(z), gauges.uniformity(z)]
    assert all(math.isfinite(v.item()) for v in values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_work_is_in_float32_and_without_gradient(dtype: torch.dtype):
    z = cloud().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = [
            gauges.embedding_std(z),
            gauges.rankme(z),
            gauges.alignment(z, z),
            gauges.uniformity(z),
        ]
    assert all(v.dtype == torch.float32 and v.ndim == 0 and not v.requires_grad for v in values)
    reference = z.detach().float()
    assert values[1].item() == pytest.approx(gauges.rankme(reference).item(), rel=1e-6)
    assert values[3].item() == pytest.approx(gauges.uniformity(reference).item(), rel=1e-6)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="n >= 2"):
        gauges.uniformity(torch.ones(1, 4))
    with pytest.raises(ValueError, match="embeddings must be"):
        gauges.embedding_std(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="differ in shape"):
        gauges.alignment(torch.ones(2, 4), torch.ones(3, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_only_rankme_waits():
    z = cloud().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = [gauges.embedding_std(z), gauges.alignment(z, z), gauges.uniformity(z)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    values.append(gauges.rankme(z))
    expected = [
        gauges.embedding_std(cloud()),
        gauges.alignment(cloud(), cloud()),
        gauges.uniformity(cloud()),
        gauges.rankme(cloud()),
    ]
    for found, wanted in zip(values, expected, strict=True):
        assert found.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)
