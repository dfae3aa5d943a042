"""The training loop of both tasks: SGD by iterations, checkpoints, going on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from byol_fast import checkpoint
from byol_fast.errors import CheckpointError, Diverged, Preempted
from byol_fast.evaluate.dense.recipes import Recipe
from byol_fast.evaluate.dense.stream import Order, step_seed
from byol_fast.session.signals import StopSignal
from pipelines.errors import DataError
from pipelines.ordered import in_order
from pipelines.progress import Progress

S = TypeVar("S")
_CHECK_EVERY = 20  # steps between two looks at the loss: reading it waits for the GPU


@dataclass(frozen=True, kw_only=True)
class Job(Generic[S]):
    """One training: the network, its data as a function of the place, and where it is kept."""

    model: nn.Module  # on `device`, freshly built from the pretrained weights
    recipe: Recipe
    images: int  # the training images there are
    sample: Callable[[int, int], S]  # (image, place) -> sample on the CPU; called by threads
    loss: Callable[[list[S]], Tensor]  # of a batch, through `model` in training mode
    folder: Path  # of the checkpoints
    identity: dict[str, Any]  # JSON values; a checkpoint with others is refused
    device: torch.device
    seed: int
    threads: int
    save_every: int = 500  # iterations
    progress: bool = False


@dataclass(frozen=True)
class Trained:
    """How the training went."""

    final_loss: float
    images_per_second: float  # of this process's share of the run; 0 if nothing was left to do
    resumed_at: int  # iteration, 0 for a run that began here


def train(job: Job[S]) -> Trained:
    """Bring `job.model` to the end of the recipe, from its newest checkpoint if there is one.

    What a step sees and draws depends on (seed, step) alone, so on a CPU a run that was stopped
    and repeated ends with the weights of one that was not.

    Raises:
        DataError: fewer training images than a batch.
        CheckpointError: the checkpoints are damaged, or of other weights, data or settings.
        Diverged: the loss is not finite; the checkpoint before is kept.
        Preempted: a signal asked to stop; a checkpoint has been written.
        OSError: a checkpoint could not be written.
    """
    recipe, model = job.recipe, job.model
    if job.images < recipe.batch_size:
        raise DataError(
            f"a batch of {recipe.batch_size} is larger than the training set ({job.images} "
            "images): use a smaller --batch-size"
        )
    optimizer = torch.optim.SGD(
        parameter_groups(model, recipe), lr=recipe.lr, momentum=recipe.momentum
    )
    start, loss = _restore(job, optimizer)
    began = time.perf_counter()
    model.train()
    steps = recipe.iterations - start
    meter = Progress("training", steps * recipe.batch_size, enabled=job.progress)
    with own_random(job.device), StopSignal() as stop, meter:
        for step, samples in _batches(job, start, recipe.iterations):
            torch.manual_seed(step_seed(job.seed, step))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step)
            with mixed_precision(job.device):
                value = job.loss(samples)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            done = step + 1
            due = done % job.save_every == 0 or done == recipe.iterations or stop.received
            if due or done % _CHECK_EVERY == 0:
                loss = _finite(value, step, recipe.learning_rate(step))
            if due:
                _save(job, optimizer, done, loss)
            meter.advance(recipe.batch_size)
            if stop.received and done < recipe.iterations:
                raise Preempted(
                    f"{stop.name}: stopped after iteration {done:,} of {recipe.iterations:,}; "
                    "the same command goes on from there"
                )
    seconds = time.perf_counter() - began
    return Trained(loss, steps * recipe.batch_size / seconds if steps else 0.0, start)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """All trainable parameters; those of norm layers without decay where the recipe says so."""
    norms = {
        id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(False)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    free = set() if recipe.decay_norms else norms
    groups = [
        {"params": [p for p in trained if id(p) not in free], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if id(p) in free], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def precise_statistics(job: Job[S], batches: int) -> None:
    """Replace the running BatchNorm statistics by the mean over `batches` training batches.

    The batches are those that would come after the end of training. As detectron2's PRECISE_BN.
    """
    norms = [m for m in job.model.modules() if isinstance(m, _BatchNorm)]
    if not batches or not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: a cumulative average
    job.model.train()
    end = job.recipe.iterations
    with own_random(job.device), torch.no_grad():
        for step, samples in _batches(job, end, end + batches):
            torch.manual_seed(step_seed(job.seed, step))
            with mixed_precision(job.device):
                job.loss(samples)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def mixed_precision(device: torch.device) -> torch.autocast:
    """bf16 autocast on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@contextmanager
def own_random(device: torch.device) -> Iterator[None]:
    """A block that may seed torch's global generators without changing them for the caller."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block whose first weights are of `seed` alone."""
    with own_random(torch.device("cpu")):
        torch.manual_seed(seed)
        yield


def _batches(job: Job[S], start: int, end: int) -> Iterator[tuple[int, list[S]]]:
    size = job.recipe.batch_size
    order = Order(job.images, size, job.seed)
    rows = (row for step in range(start, end) for row in order.rows(step))
    ahead = 2 * size + job.threads
    samples = in_order(lambda row: job.sample(*row), rows, workers=job.threads, ahead=ahead)
    try:
        for step in range(start, end):
            yield step, list(islice(samples, size))
    finally:
        samples.close()


def _restore(job: Job[S], optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    state = checkpoint.latest(job.folder)
    if state is None:
        return 0, float("nan")
    if different := _differences(job.identity, state.get("identity", {})):
        raise CheckpointError(
            f"{job.folder} holds a training with other settings ({different}): remove the folder "
            "to begin anew, or name another result with --out"
        )
    job.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), float(state["loss"])


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return "; ".join(f"{key} is {theirs.get(key)!r}, now {ours.get(key)!r}" for key in keys)


def _save(job: Job[S], optimizer: torch.optim.Optimizer, done: int, loss: float) -> None:
    state = {
        "model": job.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "identity": job.identity,
        "loss": loss,
    }
    checkpoint.save(job.folder, done, state, keep=1 if done == job.recipe.iterations else 2)


def _finite(value: Tensor, step: int, rate: float) -> float:
    loss = float(value.detach())
    if not torch.isfinite(value.detach()):
        raise Diverged(
            f"the loss is {loss} in iteration {step:,} at learning rate {rate:g}: use a lower --lr"
        )
    return loss
