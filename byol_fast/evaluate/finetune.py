"""Training a classifier on images: of whole networks, or of heads on a frozen one.

Steps, order, crops and colours are the plan's, so a run that was stopped goes on where it was:
on a CPU, to bitwise the same weights. Under torchrun the batch is shared out over the ranks,
gradients and BatchNorm statistics are averaged over them, and rank 0 writes the checkpoints.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from byol_fast import checkpoint, norm
from byol_fast.distributed import World, data_parallel
from byol_fast.errors import Diverged, Preempted
from byol_fast.evaluate import undecodable
from byol_fast.evaluate.batches import TrainingBatches
from byol_fast.evaluate.heads import Classifier
from byol_fast.evaluate.recipes import Recipe
from byol_fast.session.signals import StopSignal
from pipelines.progress import Progress
from pipelines.spec import AugmentSpec
from pipelines.stores import Store

_LOOK_EVERY = 20  # steps from one look at the loss to the next: each waits for the GPU


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a training went."""

    steps: int
    final_loss: float  # mean over the last epoch and the ranks, summed over the classifiers
    images_per_second: float  # over all ranks; 0 where nothing was left to do
    bad: dict[int, str]  # row of the store -> reason, of images that were left out on any rank


@dataclass(frozen=True, kw_only=True)
class Progressing:
    """Where a training's checkpoints lie, and what they belong to.

    about: what has to be the same to go on: plain JSON values.
    every: seconds between checkpoints; one is also written at the end and on SIGTERM.
    """

    folder: Path
    about: dict[str, Any]
    every: float = 300.0


def train(
    module: Classifier,
    store: Store,
    *,
    recipe: Recipe,
    spec: AugmentSpec,
    world: World,
    seed: int = 0,
    threads: int | None = None,
    backend: str = "auto",
    resume: Progressing | None = None,
    progress: bool = False,
    label: str = "training",
) -> Trained:
    """Train `module`, in place, on the labelled images of `store` as `recipe` says.

    The loss is the cross-entropy, summed over the module's classifiers. On a GPU the forward pass
    runs under bf16 autocast, channels_last; on a CPU in fp32.

    Args:
        module: images to a list of logits, as `heads.FineTuned` and `heads.StageHeads`; moved to
            the world's device, and left in eval mode.
        spec: read for mean, std and the image size.
        resume: where to go on from, and to leave checkpoints; None keeps nothing.

    Raises:
        DataError: fewer images than a batch, or a batch of which none could be decoded.
        ValueError: the checkpoints belong to another training, or ranks do not divide the batch.
        Diverged: the loss is not finite.
        Preempted: a signal came; with `resume` a checkpoint has been written.
    """
    total = recipe.total_steps(len(store))
    batches = TrainingBatches(
        store,
        recipe,
        spec,
        device=world.device,
        seed=seed,
        rank=world.rank,
        world_size=world.size,
        threads=threads,
        backend=backend,
    )
    try:
        run = _Run(module, recipe, total, len(store), world, seed, resume)
        started, first = time.monotonic(), run.step
        images = (total - first) * recipe.batch_size
        meter = Progress(label, images, enabled=progress and world.is_main)
        with StopSignal() as stop, meter, _own_randomness(world.device):
            for x, y in batches.steps(first, total):
                run.train_step(x, y)
                run.bad.update(batches.bad)
                meter.advance(recipe.batch_size)
                run.look(stop)
        seconds = time.monotonic() - started
        bad = run.all_bad()
        if world.is_main:
            undecodable.warn(store, bad)
        return Trained(
            steps=total,
            final_loss=run.mean_loss(),
            images_per_second=images / seconds if images else 0.0,
            bad=bad,
        )
    finally:
        batches.close()
        module.eval()


class _Run:
    """Module, optimizer and schedule of one training, and its checkpoints."""

    def __init__(
        self,
        module: Classifier,
        recipe: Recipe,
        total: int,
        images: int,
        world: World,
        seed: int,
        resume: Progressing | None,
    ) -> None:
        self.recipe, self.total, self.world = recipe, total, world
        self.seed, self.resume, self.step = seed, resume, 0
        self.bad: dict[int, str] = {}  # row -> reason, of this rank's images
        steps_per_epoch = max(1, images // recipe.batch_size)
        self.module = module.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if recipe.slow_norms:
            _set_norm_momentum(module, min(0.1, 10 / steps_per_epoch))
        if world.size > 1:
            norm.convert(module, views=1, sync=True)
        self.optimizer = _optimizer(module, recipe)
        self.losses: deque[Tensor] = deque(maxlen=min(total, steps_per_epoch))
        self._restore()
        self.net = data_parallel(module.train(), world)
        self._saved = time.monotonic()

    def train_step(self, x: Tensor, y: Tensor) -> None:
        torch.manual_seed(self.seed * 1_000_003 + self.step * self.world.size + self.world.rank)
        factor = self.recipe.factor(self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        device = self.world.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            each = self.net(x)
        loss = torch.stack([F.cross_entropy(logits.float(), y) for logits in each]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())
        self.step += 1

    def look(self, stop: StopSignal) -> None:
        """Between two steps: has it diverged, is it to stop, is it time to save?"""
        due = self.step % _LOOK_EVERY == 0 or self.step == self.total
        if due or self.world.size == 1:
            wrong = due and not bool(torch.isfinite(self.losses[-1]))
            wrong, stopping = self.world.any(wrong, stop.received)
            if wrong:
                raise Diverged(
                    f"the loss is not finite after {self.step} steps at lr "
                    f"{self.recipe.peak_lr:g}: use a lower rate (--lr)"
                )
            if stopping:
                self._save()
                kept = f"; repeat the command to go on from step {self.step}" if self.resume else ""
                raise Preempted(f"stopped by {stop.name or 'a signal'}{kept}")
        patience = self.resume.every if self.resume else float("inf")
        if self.step == self.total or time.monotonic() - self._saved >= patience:
            self._save()

    def mean_loss(self) -> float:
        """Over the ranks too: each has seen its share of every batch."""
        return self.world.mean(torch.stack(list(self.losses)).mean().cpu()).item()

    def all_bad(self) -> dict[int, str]:
        """Those of every rank."""
        return {row: why for bad in self.world.gather(self.bad) for row, why in bad.items()}

    def _save(self) -> None:
        if self.resume is None or not self.world.is_main:
            return
        state = {
            "about": json.dumps(self.resume.about, sort_keys=True),
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": torch.stack(list(self.losses)),
            "bad": {str(row): why for row, why in self.bad.items()},
        }
        checkpoint.save(self.resume.folder, self.step, state)
        self._saved = time.monotonic()

    def _restore(self) -> None:
        if self.resume is None:
            return
        state = checkpoint.latest(self.resume.folder, map_location=self.world.device)
        if state is None:
            return
        now = json.loads(json.dumps(self.resume.about))
        if differences := _differences(json.loads(state["about"]), now):
            raise ValueError(
                f"{self.resume.folder} holds an unfinished run with another setting "
                f"({differences}): repeat its command, name another result with --out, or remove it"
            )
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses.extend(state["losses"])
        self.bad = {int(row): why for row, why in state.get("bad", {}).items()}
        self.step = state["step"]


def _optimizer(module: Classifier, recipe: Recipe) -> torch.optim.SGD:
    new = list(module.heads())
    known = {id(p) for p in new}
    old = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": new, "peak_lr": recipe.peak_lr * recipe.head_lr_factor}]
    if old:
        groups.append({"params": old, "peak_lr": recipe.peak_lr})
    return torch.optim.SGD(
        groups,
        lr=recipe.peak_lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.l2,
    )


def _set_norm_momentum(module: nn.Module, momentum: float) -> None:
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = momentum


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Dropout and the like draw from seeds of the step; the caller's generators stay untouched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    keys = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {before.get(key)} there, {now.get(key)} now" for key in sorted(keys))
