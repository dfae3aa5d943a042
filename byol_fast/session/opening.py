"""The data of a run: opened on every rank, and agreed on by all of them."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from dataclasses import dataclass

from byol_fast.config import Config
from byol_fast.distributed import World
from byol_fast.errors import Preempted
from byol_fast.session.runfolder import RunFolder
from byol_fast.session.signals import StopSignal
from pipelines import notes, stores
from pipelines.errors import DataError
from pipelines.parts import Held, Parts
from pipelines.stores import Store

log = logging.getLogger("byol_fast")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What this rank reads, and what all of them have."""

    store: Store
    parts: Parts
    evaluated: Store | None  # images that kNN is scored on; opened by rank 0 alone


def open_data(config: Config, world: World, signal: StopSignal) -> Data:
    """Open the images: rank 0 first, as it may have to index them, then the others by its index.

    Where nodes may hold different parts the first rank of each node goes first. What keeps one rank
    from its images ends all of them.

    Raises:
        DataError: on every rank, if one cannot use its images, or has others than rank 0 and
            `--data` does not say that there are parts.
        Preempted: on every rank, if one was asked to stop meanwhile.
    """
    first = _first_of_node() if config.in_parts else world.is_main
    opened: tuple[Store, Store | None] | None = None
    for my_turn in (first, not first):
        error: DataError | Preempted | None = None
        if my_turn:
            try:
                with signal.interrupting("the data was indexed"):
                    opened = _open(config, world)
            except DataError as caught:
                error = DataError(_where(config, world) + str(caught))
            except Preempted as caught:
                error = caught
        _raise_any(world.gather(error, patient=True), config, world)
    assert opened is not None
    store, evaluated = opened
    parts = agree_on_parts(store, config, world)
    if parts.of_rank(world.rank).ranks[0] == world.rank:
        notes.tell(config.data_path, notes.notes_of(store))
        _tell_quarantined(store)
    return Data(store=store, parts=parts, evaluated=evaluated)


def agree_on_parts(store: Store, config: Config, world: World) -> Parts:
    """Who has which images. Row 7 has to be the same on every rank that shares a part.

    Raises:
        DataError: on every rank, if one has other images than rank 0 and no parts were asked for.
    """
    held = world.gather(Held.of(store))
    parts, main = Parts(held), held[0]
    if len(parts) == 1 or config.in_parts:
        return parts
    if store.fingerprint != main.fingerprint:
        log.error(
            "%s has %d images here (%s), and %d on rank 0 (%s)",
            *(config.data, len(store), store.fingerprint[:12]),
            *(main.images, main.fingerprint[:12]),
        )
    raise DataError(
        f"{config.data} does not hold the same images on every machine: copy it again where it "
        f"differs, keep it on a file system that all of them share, or say --data "
        f"parts:{config.data} if each node is to hold a part of the images"
    )


def _open(config: Config, world: World) -> tuple[Store, Store | None]:
    verify, evaluated = config.input.verify, config.monitor.eval_data
    train = stores.open_store(config.data_path, verify=verify, progress=world.is_main, quiet=True)
    if not (evaluated and world.is_main):
        return train, None
    return train, stores.open_store(evaluated, verify=verify)


def _first_of_node() -> bool:
    """Whether no other rank of this machine indexes before this one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _where(config: Config, world: World) -> str:
    """What tells a rank's error from the others'; rank 0's needs no telling where all are alike."""
    if world.size == 1 or (world.is_main and not config.in_parts):
        return ""
    return f"on {platform.node()}, rank {world.rank}: "


def _raise_any(errors: list[DataError | Preempted | None], config: Config, world: World) -> None:
    """The lowest rank's error is everybody's."""
    error = next((each for each in errors if each is not None), None)
    if error is None:
        return
    if isinstance(error, Preempted) and world.is_main:
        _note_preempted(config, str(error))
    raise error


def _note_preempted(config: Config, reason: str) -> None:
    """`status.json` of a run that was stopped before it had begun; not if it is another's."""
    with contextlib.suppress(ValueError, OSError), RunFolder(config.out) as folder:
        before = folder.read_status()
        step, total = before.get("step", 0), before.get("total_steps", 0)
        folder.status("preempted", step=step, total_steps=total, reason=reason)


def _tell_quarantined(store: Store) -> None:
    if not store.quarantined:
        return
    log.warning("%d broken images are left out:", len(store.quarantined))
    for name, reason in store.quarantined[:20]:
        log.warning("  %s: %s", name, reason)
    if len(store.quarantined) > 20:
        log.warning("  and %d more", len(store.quarantined) - 20)
