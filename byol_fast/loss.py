"""The BYOL loss: squared distance of l2-normalised vectors (paper, equation 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def _unit(x: Tensor) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    # The authors' l2norm: rsqrt of the clamped square sum, so a zero vector stays zero.
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp_min(1e-12))


def regression_loss(
    prediction: Tensor,  # [B, D]
    target: Tensor,  # [B, D]
) -> Tensor:  # [B]
    """2 − 2·cos(prediction, target) per row, in [0, 4], in fp32 for bf16 and fp16 input too.

    Gradients flow to both arguments: detach the target. Source: `byol/utils/helpers.py`.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {list(prediction.shape)} and target {list(target.shape)} must have "
            "the same shape"
        )
    return 2 - 2 * (_unit(prediction) * _unit(target)).sum(-1)


def pair_loss(
    prediction: Tensor,  # [2B, D] online predictions, view 1 first
    target: Tensor,  # [2B, D] target projections in the same order; no gradient flows to them
) -> Tensor:  # scalar
    """Both directions *summed*, then the batch mean: range 0–8.

    Averaging the directions instead would halve the gradient of biases and norms, which bypass
    LARS, and is known to cost accuracy.
    """
    if prediction.shape[0] % 2:
        raise ValueError(f"need two views of equal size, got {prediction.shape[0]} rows")
    first, second = target.detach().chunk(2)
    return 2 * regression_loss(prediction, torch.cat((second, first))).mean()
