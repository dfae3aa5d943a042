"""Gauges of the embeddings: is the network spreading images out, or mapping them to one point?

Every function takes embeddings of any floating type, works in float32 whatever the autocast state,
and returns a 0-d tensor on the same device without a gradient. None reads a value back to the host;
only `rankme` waits for a CUDA device, because `torch.linalg.svdvals` itself does.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANKME_EPS = 1e-7  # the RankMe paper's epsilon for float32, section 3.1


def _rows(z: Tensor, least: int) -> Tensor:
    if z.ndim != 2 or z.shape[0] < least:
        raise ValueError(f"embeddings must be [n >= {least}, d], got {list(z.shape)}")
    return z.detach().float()


def normalise(z: Tensor) -> Tensor:
    """Rows of `z` [n, d] scaled to length 1 (float32), with the loss's own floor for zero rows."""
    z = z.detach().float()
    return z * z.square().sum(dim=1, keepdim=True).clamp_min(1e-12).rsqrt()


def embedding_std(z: Tensor) -> Tensor:
    """Standard deviation of each coordinate over the batch after l2 normalisation, averaged.

    `z` is [n, d]. 1/sqrt(d) when the embeddings fill the sphere evenly, 0 when all are the same.
    Source: SimSiam (Chen & He 2021), section 4.1.
    """
    return normalise(_rows(z, 1)).std(dim=0, correction=0).mean()


def rankme(z: Tensor) -> Tensor:
    """Effective rank of `z` [n, d]: exp of the entropy of its normalised singular values.

    Between 1 (all embeddings on one line) and min(n, d), so values compare only at equal n and d;
    NaN where an embedding is not finite.
    Source: RankMe (Garrido et al. 2023), equation 1.
    """
    rows = _rows(z, 1)
    finite = rows.isfinite().all()
    values = torch.linalg.svdvals(torch.where(finite, rows, 0.0))  # it raises on NaN
    share: Tensor = values / values.sum().clamp_min(RANKME_EPS) + RANKME_EPS
    return torch.where(finite, share.mul(share.log()).sum().neg().exp(), torch.nan)


def alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean squared distance of the two views' normalised embeddings [n, d]; 0 is best, at most 4.

    Source: Wang & Isola 2020, equation 6 with alpha = 2.
    """
    if z1.shape != z2.shape:
        raise ValueError(f"views differ in shape: {list(z1.shape)} and {list(z2.shape)}")
    return (normalise(_rows(z1, 1)) - normalise(_rows(z2, 1))).square().sum(dim=1).mean()


def uniformity(z: Tensor) -> Tensor:
    """Log of the mean Gaussian potential over all pairs of normalised embeddings [n >= 2, d].

    0 when all are the same, towards -4 when they are spread evenly; lower is better. Makes
    n(n-1)/2 distances: 33 MB at n = 4096. Source: Wang & Isola 2020, equation 7 with t = 2.
    """
    points = normalise(_rows(z, 2))
    return torch.pdist(points).square().mul(-2.0).exp().mean().log()


def of(projections: Tensor) -> dict[str, Tensor]:
    """All gauges of a step's projections [2B, d], view 1 then view 2, by their names in the log."""
    z = projections.float()
    return {
        "embedding_std": embedding_std(z),
        "rankme": rankme(z),
        "alignment": alignment(*z.chunk(2)),
        "uniformity": uniformity(z),
    }
