"""The classifier of linear evaluation: its training step, its schedule, its accuracy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byol_fast.errors import CheckpointError
from byol_fast.evaluate.features import Features
from byol_fast.evaluate.protocols import Protocol
from byol_fast.export import write_atomically
from byol_fast.optim import LARS


class HeadTrainer:
    """The classifier, its optimizer and its schedule; losses stay on the device."""

    def __init__(
        self,
        width: int,
        classes: int,
        protocol: Protocol,
        total: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self.head = nn.Linear(width, classes)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.head.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.head.bias)
        self.head.to(device)
        self._optimizer = _optimizer(self.head, protocol)
        self._protocol, self._total, self._step = protocol, total, 0
        self._losses: list[Tensor] = []

    def step(self, features: Tensor, labels: Tensor) -> None:
        rate = self._protocol.learning_rate(self._step, self._total)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(self.head(features.float()), labels)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._losses.append(loss.detach())
        self._step += 1

    def state(self, last: int) -> dict[str, Any]:
        """What goes on from here: weights, optimizer, step, and the newest `last` losses."""
        losses = self._losses[-max(1, last) :]
        return {
            "head": self.head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "done": self._step,
            "losses": torch.stack(losses) if losses else torch.empty(0),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._step = state["done"]
        self._losses = list(state["losses"].to(self.head.weight.device))

    def mean_loss(self, last: int) -> float:
        return torch.stack(self._losses[-max(1, last) :]).mean().item() if self._losses else 0.0

    def finish(self) -> nn.Linear:
        """The trained head on the CPU."""
        if not all(bool(torch.isfinite(p).all()) for p in self.head.parameters()):
            raise ValueError(
                f"the classifier's weights are not finite after {self._step} steps at lr "
                f"{self._protocol.peak_lr:g}: use a lower --base-lr"
            )
        return self.head.cpu()


def top_k(head: nn.Linear, test: Features, k: tuple[int, ...] = (1, 5)) -> tuple[float, ...]:
    """Share of test images whose class is among the k best guesses, for each k."""
    with torch.no_grad():
        guesses = head(test.features).topk(min(max(k), head.out_features), dim=1).indices
    hits = guesses == test.labels[:, None]
    return tuple(hits[:, :n].any(dim=1).double().mean().item() for n in k)


def batches(n: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches out of one permutation after the other, without a gap."""
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < size:
            left = torch.cat([left, torch.randperm(n, generator=generator)])
        yield left[:size]
        left = left[size:]


def _optimizer(head: nn.Linear, protocol: Protocol) -> torch.optim.Optimizer:
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(
            head.parameters(), lr=protocol.peak_lr, momentum=protocol.momentum, nesterov=True
        )
    # mmpretrain adapts the bias too: its linear recipe names no exception.
    return LARS(
        [{"params": list(head.parameters()), "adapt": True}],
        lr=protocol.peak_lr,
        momentum=protocol.momentum,
        norm="sum",
        lr_in_momentum=True,
    )


def save(
    head: nn.Linear,
    path: Path,
    *,
    classes: tuple[str, ...],
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write `weight` [classes, F] and `bias` as safetensors, with the class names as JSON.

    Args:
        about: what else should be known of the head, JSON values: which weights it is for.

    Raises:
        OSError: the disk is full or read-only.
    """
    tensors = {key: value.detach().contiguous() for key, value in head.state_dict().items()}
    metadata = {"format": "pt", "classes": json.dumps(classes), "about": json.dumps(about or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda p: safetensors.torch.save_file(tensors, p, metadata=metadata))


def load(path: Path | str) -> tuple[nn.Linear, tuple[str, ...], dict[str, Any]]:
    """A head that `save` wrote: the layer, its class names, and what else was said of it.

    Raises:
        CheckpointError: it is not there, damaged, or something else.
    """
    path = Path(path).expanduser()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in ("weight", "bias")}
            metadata = file.metadata() or {}
        classes = tuple(str(name) for name in json.loads(metadata["classes"]))
        about = dict(json.loads(metadata.get("about", "{}")))
        if tensors["bias"].shape != (len(classes),) or len(tensors["weight"]) != len(classes):
            raise ValueError(f"{len(classes)} class names for {len(tensors['weight'])} rows")
    except (
        *(safetensors.SafetensorError, OSError, LookupError, ValueError, TypeError),
        RecursionError,
    ) as error:
        raise CheckpointError(
            f"{path} is no classifier that can be read ({error}): name the .head.safetensors that "
            "linear evaluation wrote"
        ) from error
    head = nn.Linear(tensors["weight"].shape[1], len(classes))
    head.load_state_dict(tensors)
    return head, classes, about
