"""The composition root: `torchrun --nproc_per_node=8 -m byol_fast.pretrain --data DIR`.

Read `pretrain` from top to bottom: it puts the parts together in the order in which they run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from byol_fast.cli import pretrain_arguments
from byol_fast.config import Config
from byol_fast.errors import CheckpointError, Diverged, Exit, Preempted

if TYPE_CHECKING:
    from byol_fast.distributed import World
    from byol_fast.recipes import Resolved
    from pipelines.stores import Store

log = logging.getLogger("byol_fast")


def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain as the command line says; returns the exit code of `errors.Exit`."""
    call = pretrain_arguments(sys.argv[1:] if argv is None else argv)
    if isinstance(call, int):
        return call
    from byol_fast import distributed  # torch is imported here, after --help has been answered
    from pipelines.errors import DataError, MissingBackend

    try:
        world = distributed.start(call.config.device)
    except ValueError as error:
        return _failed(Exit.USAGE, error)
    _log_to_stderr(world)
    try:
        pretrain(call.config, world, dry_run=call.dry_run)
    except DataError as error:
        return _failed(Exit.DATA, error)
    except (_Mistake, MissingBackend) as error:
        return _failed(Exit.USAGE, error)
    except CheckpointError as error:
        return _failed(Exit.NO_CHECKPOINT, error)
    except Diverged as error:
        return _failed(Exit.DIVERGED, error)
    except Preempted as error:
        log.warning("stopped: %s. Repeat the command to go on", error)
        return Exit.PREEMPTED
    finally:
        distributed.stop()
    return Exit.DONE


def pretrain(config: Config, world: World, *, dry_run: bool = False) -> None:
    """One session of a run: from the data and the newest checkpoint to the exported backbone."""
    from byol_fast.assemble import assemble
    from byol_fast.outcome import finish

    with _mistakes():
        store, eval_store = _open_data(config, world)
        resolved = _resolve(config, store, world)
    if dry_run:
        return
    with contextlib.ExitStack() as stack:
        with _mistakes():
            trainer, folder = assemble(resolved, store, eval_store, world, stack)
        outcome, reason = "failed", ""
        try:
            if trainer.run():
                outcome = "done"
                if world.is_main:
                    finish(trainer, folder)
            else:
                outcome, reason = "preempted", f"asked to stop after step {trainer.step}"
                log.info("%s: repeat the command without --run.max-steps to go on", reason)
        except Preempted as error:
            outcome, reason = "preempted", str(error)
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            if world.is_main:
                total = trainer.plan.total_steps
                folder.status(outcome, step=trainer.step, total_steps=total, reason=reason)


def _open_data(config: Config, world: World) -> tuple[Store, Store | None]:
    """Rank 0 indexes; the others then read its index. An error of rank 0 is everybody's."""
    from pipelines.errors import DataError
    from pipelines.stores import open_store

    def open_both() -> tuple[Store, Store | None]:
        verify, evaluated = config.input.verify, config.monitor.eval_data
        train = open_store(config.data, verify=verify, progress=world.is_main)
        return train, open_store(evaluated, verify=verify) if evaluated else None

    stores, error = None, None
    if world.is_main:
        try:
            stores = open_both()
        except DataError as caught:
            error = str(caught)
    if message := world.share(error):
        raise DataError(message)
    train, evaluation = stores or open_both()
    refuse_other_images(train, config, world)
    if world.is_main:
        _tell_quarantined(train)
    return train, evaluation


def refuse_other_images(store: Store, config: Config, world: World) -> None:
    """Row 7 has to be the same image on every rank: a machine with an older copy is found here.

    Raises:
        DataError: on every rank, if one has other images than rank 0.
    """
    from pipelines.errors import DataError

    images, fingerprint = world.share((len(store), store.fingerprint))
    other = fingerprint != store.fingerprint
    if other:
        log.error(
            "%s has %d images here (%s), and %d on rank 0 (%s)",
            *(config.data, len(store), store.fingerprint[:12], images, fingerprint[:12]),
        )
    if any(world.any(other)):
        raise DataError(
            f"{config.data} does not hold the same images on every machine: copy it again where it "
            "differs, or keep it on a file system that all of them share"
        )


def _tell_quarantined(store: Store) -> None:
    if not store.quarantined:
        return
    log.warning("%d broken images are left out:", len(store.quarantined))
    for name, reason in store.quarantined[:20]:
        log.warning("  %s: %s", name, reason)
    if len(store.quarantined) > 20:
        log.warning("  and %d more", len(store.quarantined) - 20)


def _resolve(config: Config, store: Store, world: World) -> Resolved:
    from byol_fast import recipes

    resolved = recipes.resolve(config, samples=len(store), world_size=world.size)
    for line in resolved.arithmetic():
        log.info(line)
    return resolved


def _log_to_stderr(world: World) -> None:
    rank = f"[rank {world.rank}] " if world.size > 1 else ""
    logging.basicConfig(
        level=logging.INFO if world.is_main else logging.WARNING,
        format=f"%(asctime)s {rank}%(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )


class _Mistake(ValueError):
    """A ValueError of the setup: the user's to mend, told without a traceback."""


@contextlib.contextmanager
def _mistakes() -> Iterator[None]:
    """During the setup a ValueError is about what was asked for; later it is a bug of ours."""
    from pipelines.errors import DataError

    try:
        yield
    except DataError:
        raise
    except ValueError as error:
        raise _Mistake(str(error)) from error


def _failed(code: Exit, error: BaseException) -> int:
    """Tell the error: rank 0's, or one that rank 0 need not have met."""
    rank = os.environ.get("RANK", "0")
    print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
