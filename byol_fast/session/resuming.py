"""A run's folder and the checkpoint it goes on from: found, agreed on by the ranks, and checked."""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Iterator
from typing import Any

import torch

from byol_fast import checkpoint
from byol_fast import config as configuration
from byol_fast.distributed import World
from byol_fast.errors import CheckpointError
from byol_fast.session.runfolder import RunFolder
from pipelines import parts

log = logging.getLogger(__name__)


def open_folder(
    folder: RunFolder, world: World, stack: contextlib.ExitStack
) -> dict[str, Any] | None:
    """Rank 0 takes the folder and finds the newest whole checkpoint; all ranks load that one.

    Raises:
        CheckpointError: on every rank, if one of them cannot load it.
    """
    state: dict[str, Any] | None = None
    error: Exception | None = None
    if world.is_main:
        try:
            stack.enter_context(folder)
            _prepare(folder)
            state = checkpoint.latest(
                folder.checkpoints, map_location=world.device, rename_damaged=True
            )
        except (ValueError, CheckpointError) as caught:
            error = caught
    step, error = world.share((state and state["step"], error))
    if error is not None:
        raise error
    if step is None:
        return None
    if not world.is_main:
        path = checkpoint.path_of(folder.checkpoints, step)
        try:
            state = checkpoint.load(path, map_location=world.device)
        except CheckpointError as caught:
            error = CheckpointError(f"rank {world.rank} on {platform.node()}: {caught}")
    errors = world.gather(error, patient=True)  # before one of them waits for the others
    if error := next((each for each in errors if each is not None), None):
        raise error
    return state


def _prepare(folder: RunFolder) -> None:
    try:
        folder.sweep()
        checkpoint.prepare(folder.checkpoints)
    except OSError as error:
        raise ValueError(
            f"checkpoints cannot be written to {folder.checkpoints}: {error}. Choose another "
            f"folder with --out, or mend its permissions"
        ) from error


@contextlib.contextmanager
def taking_over(state: dict[str, Any], folder: RunFolder) -> Iterator[None]:
    """While a checkpoint is taken over: its hash was right, but it may be of other networks.

    Raises:
        CheckpointError: it lacks something, or holds other tensors than this run's.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = (
            f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        )
        raise CheckpointError(
            f"the checkpoint of step {state['step']} in {folder.checkpoints} does not fit this "
            f"run's networks: {reason[:300]}. Go back to the settings that it was made with, or "
            f"choose another --out"
        ) from error


def same_run(state: dict[str, Any], identity: dict[str, Any], *, allowed: bool) -> None:
    """Refuse to go on with other settings or other images than the checkpoint's."""
    saved = configuration.from_dict(state["config"], "the checkpoint")
    now = configuration.from_dict(identity["config"])
    changes = configuration.diff(saved, now)
    changes += parts.changes(state["data"], identity["data"])
    if not changes:
        return
    listed = "\n  ".join(changes)
    if not allowed:
        raise ValueError(
            f"the checkpoint in {now.out} belongs to another run:\n  {listed}\n"
            f"Choose another --out, go back to these settings, or accept the change with "
            f"--checkpoint.allow-config-change"
        )
    log.warning("going on from a checkpoint of another configuration:\n  %s", listed)
