"""Logistic regression on frozen features by L-BFGS, its penalty chosen on validation images.

The linear transfer protocol of the BYOL paper (appendix D), of Kornblith et al. 2019 and Chen et
al. 2020: 45 penalties between 1e-6 and 1e5, the best of them fitted again on training and
validation images together. The loss is the sum over images and the penalty λ‖W‖² without the bias,
as in `linear_eval` of google-research.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byol_fast.evaluate.ap import mean_precision
from byol_fast.evaluate.parts import Parts
from pipelines.progress import Progress

PENALTIES = tuple(torch.logspace(-6, 5, 45, dtype=torch.float64).tolist())
QUICK_PENALTIES = PENALTIES[::6]
MOST_STEPS = 1000  # of L-BFGS, for one penalty

Metric = Callable[[Tensor, Tensor], float]  # logits [n, C] and targets to a share of 1


@dataclass(frozen=True, kw_only=True)
class LogisticResult:
    """The classifier, and how its penalty was found."""

    head: nn.Linear  # on the CPU
    penalty: float
    validation: dict[float, float]  # penalty -> metric on the validation images


def search(
    train: Tensor,  # [n, F]
    train_targets: Tensor,  # [n] class numbers, or [n, C] of 1, 0 and -1: neither
    validation: Tensor,  # [v, F]
    validation_targets: Tensor,
    *,
    classes: int,
    metric: Metric,
    penalties: tuple[float, ...] = PENALTIES,
    device: torch.device | str = "cpu",
    parts: Parts | None = None,
    progress: bool = False,
) -> LogisticResult:
    """The penalty with the best `metric` on the validation images, fitted again on both parts.

    Each fit starts from that of the next larger penalty. Among equals the largest penalty wins.

    Raises:
        ValueError: a loss that is not finite.
    """
    parts, device = parts or Parts(None, {}), torch.device(device)
    x, y = train.to(device), train_targets.to(device)
    unseen = validation.to(device)
    head = nn.Linear(train.shape[1], classes, device=device, dtype=train.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    found: dict[float, float] = {}
    with Progress("penalties", len(penalties), unit="fits", enabled=progress) as meter:
        for number, penalty in enumerate(sorted(penalties, reverse=True)):
            name = f"penalty-{number:03d}"
            if (part := parts.read(name)) is not None:
                head.load_state_dict(part[0])
            else:
                fit(head, x, y, penalty=penalty)
                state = {key: value.detach().cpu() for key, value in head.state_dict().items()}
                parts.write(name, state, {"penalty": penalty})
            with torch.no_grad():
                found[penalty] = metric(head(unseen).cpu(), validation_targets)
            meter.advance()
    best = max(found, key=lambda penalty: (found[penalty], penalty))
    fit(head, torch.cat([x, unseen]), torch.cat([y, validation_targets.to(device)]), penalty=best)
    return LogisticResult(head=head.cpu(), penalty=best, validation=found)


def fit(head: nn.Linear, x: Tensor, targets: Tensor, *, penalty: float) -> None:
    """Minimise the penalised loss over `head`'s weights, from where they are.

    Class numbers give one softmax, `[n, C]` targets a sigmoid for each class.

    Raises:
        ValueError: a loss that is not finite.
    """
    optimizer = torch.optim.LBFGS(
        head.parameters(),
        max_iter=MOST_STEPS,
        history_size=10,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        # Over n: the same minimum, in numbers that the tolerances are made for.
        loss = (_loss(head(x), targets) + penalty * head.weight.square().sum()) / len(x)
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"logistic regression diverged at penalty {penalty:g}: the features are too "
                "large; check the weights"
            )
        loss.backward()
        return loss

    optimizer.step(closure)


def top1(logits: Tensor, targets: Tensor) -> float:
    """Share of images whose largest logit is their class."""
    return (logits.argmax(dim=1) == targets).double().mean().item()


def per_class(logits: Tensor, targets: Tensor) -> float:
    """Mean over the classes that occur of the share of their images that are right."""
    right = (logits.argmax(dim=1) == targets).double()
    return torch.stack([right[targets == c].mean() for c in targets.unique()]).mean().item()


def eleven_point_map(logits: Tensor, targets: Tensor) -> float:
    """VOC07's mean average precision, see `ap.eleven_point`."""
    return mean_precision(targets.numpy(), logits.double().numpy(), eleven=True)[0]


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, summed over images (and classes)."""
    if targets.dim() == 1:
        return F.cross_entropy(logits, targets, reduction="sum")
    counted = (targets >= 0).to(logits.dtype)
    truth = (targets == 1).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, truth, weight=counted, reduction="sum")
