"""Logs kept by others: TensorBoard and Weights & Biases. Imported only when they are used."""

from __future__ import annotations

import hashlib
import logging
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from byol_fast.watching.tfevents import EventFile
from pipelines.errors import MissingBackend, import_problem

log = logging.getLogger(__name__)


class Sink(Protocol):
    """One place numbers go to. Its methods may raise anything; RunLog then drops it."""

    name: str

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def event(self, step: int, kind: str, text: str) -> None: ...
    def close(self) -> None: ...


def open_tensorboard(folder: Path, resume_step: int | None) -> Sink | None:
    """TensorBoard's event file, or None with one warning where it cannot be written."""
    try:
        return EventFile(folder, resume_step)
    except OSError as error:
        log.warning("TensorBoard cannot write to %s (%s); training goes on", folder, error)
    return None


def require_wandb() -> Any:
    """The wandb module.

    Raises:
        MissingBackend: it is not installed, or its import fails, for whatever reason.
    """
    install = "pip install '.[wandb]' in the checkout"
    try:
        import wandb
    except Exception as error:
        raise import_problem("W&B", "wandb", error, install) from error
    if getattr(wandb, "__file__", None) is None and hasattr(wandb, "__path__"):
        where = ", ".join(wandb.__path__)  # a folder of runs is a package to Python
        raise MissingBackend(f"W&B is not installed, {where} is a folder of that name: {install}")
    return wandb


def open_wandb(out: Path, config: Mapping[str, Any], *, resumed: bool) -> Sink | None:
    """A W&B run, or None with one warning where it cannot be started.

    Raises:
        MissingBackend: as `require_wandb`.
    """
    wandb = require_wandb()
    try:
        return WandB(wandb, out, config, resumed=resumed)
    except Exception as error:  # its own errors, the network's, the disk's: none ends a training
        log.warning("W&B could not be started (%s); training goes on without it", error)
    return None


class WandB:
    """One W&B run per run folder, continued on resume. Offline where no credentials are set."""

    name = "W&B"

    def __init__(self, wandb: Any, out: Path, config: Mapping[str, Any], *, resumed: bool) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "byol-fast"),
            name=out.resolve().name,
            id=_run_id(out, resumed=resumed),
            resume="allow",
            dir=str(out),
            config=dict(config),
            mode=os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def event(self, step: int, kind: str, text: str) -> None:
        self._run.log({f"events/{kind}": text}, step=step)

    def close(self) -> None:
        self._run.finish()


def _run_id(out: Path, *, resumed: bool) -> str:
    """The id kept in the run folder; a new one for a run that starts afresh."""
    path = out / "wandb_id"
    if resumed and path.exists():
        return path.read_text(encoding="utf-8").strip()
    name = hashlib.sha256(str(out.resolve()).encode() + os.urandom(16)).hexdigest()[:16]
    path.write_text(name + "\n", encoding="utf-8")
    return name


def _has_key() -> bool:
    """Whether W&B would find credentials by itself; without them it would ask on the terminal."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        entry = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        return False
    return entry is not None
