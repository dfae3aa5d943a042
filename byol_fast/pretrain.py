"""The composition root: `torchrun --nproc_per_node=8 -m byol_fast.pretrain --data DIR`.

Read `pretrain` from top to bottom: it puts the parts together in the order in which they run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from byol_fast.cli import PretrainCall, pretrain_arguments
from byol_fast.config import Config
from byol_fast.errors import CheckpointError, Diverged, Exit, Preempted, SaveError
from byol_fast.signals import StopSignal

if TYPE_CHECKING:
    from byol_fast.distributed import World
    from byol_fast.failures import Failures
    from byol_fast.recipes import Resolved
    from byol_fast.runfolder import RunFolder
    from byol_fast.split import Split
    from byol_fast.trainer import Trainer
    from pipelines.stores import Store

log = logging.getLogger("byol_fast")


def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain as the command line says; returns the exit code of `errors.Exit`."""
    call = pretrain_arguments(sys.argv[1:] if argv is None else argv)
    if isinstance(call, int):
        return call
    from byol_fast import distributed  # torch is imported here, after --help has been answered

    try:
        world = distributed.start(call.config.device)
    except ValueError as error:
        return _failed(Exit.USAGE, error)
    _log_to_stderr(world)
    try:
        with StopSignal() as signal:
            return _ends_well(call, world, signal)
    finally:
        distributed.stop()


def _ends_well(call: PretrainCall, world: World, signal: StopSignal) -> Exit:
    """Run the call; whatever ends it becomes a message and an exit code."""
    from byol_fast import distributed, failures
    from pipelines.errors import DataError, MissingBackend

    # Before a collective gives up: what it says names no rank.
    silence = 0.8 * distributed.timeout().total_seconds()
    notes = failures.of_this_process(world.rank, silence=silence)
    notes.watch()
    try:
        pretrain(call, world, signal, notes)
    except DataError as error:
        return _failed(Exit.DATA, error)
    except (_Mistake, MissingBackend) as error:
        return _failed(Exit.USAGE, error)
    except CheckpointError as error:
        return _failed(Exit.NO_CHECKPOINT, error)
    except SaveError as error:
        return _failed(Exit.FAILED, error)
    except Diverged as error:
        return _failed(Exit.DIVERGED, error)
    except Preempted as error:
        log.warning("stopped: %s. Repeat the command to go on", error)
        return Exit.PREEMPTED
    except Exception as error:
        # A rank that was to leave, and whose peers have left already, not because one failed.
        if signal.received and world.size > 1 and notes.noted() is None:
            log.warning("stopped: %s, while waiting for other ranks (%s)", signal.name, error)
            return Exit.PREEMPTED
        if first := notes.report(error):
            print(f"error on rank {world.rank}: ended, since {first}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
            if world.size > 1 and "timed out" in str(error).lower():
                print(f"where the ranks are: {notes.whereabouts()}", file=sys.stderr, flush=True)
        return Exit.FAILED
    finally:
        notes.leave()
    return Exit.DONE


def pretrain(call: PretrainCall, world: World, signal: StopSignal, notes: Failures) -> None:
    """One session of a run: from the data and the newest checkpoint to the exported backbone."""
    from byol_fast.assemble import assemble
    from byol_fast.outcome import finish

    config = call.config
    with _mistakes():
        store, eval_store = _open_data(config, world, signal)
        resolved = _resolve(config, store, world)
        if call.replay is not None and world.is_main:
            from byol_fast.replay import replay

            replay(resolved, store, *call.replay)
    if call.dry_run or call.replay is not None:
        return
    with contextlib.ExitStack() as stack:
        with _mistakes():
            trainer, folder = assemble(resolved, store, eval_store, world, stack)
        outcome, reason = "failed", ""
        if world.is_main:
            notes.last_words = partial(_close, trainer, folder, "failed")
        try:
            if trainer.run(signal):
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
            reason = notes.noted() or f"{type(error).__name__}: {error}"
            raise
        finally:
            if world.is_main:
                notes.last_words = None
                _close(trainer, folder, outcome, reason)


def _close(trainer: Trainer, folder: RunFolder, outcome: str, reason: str) -> None:
    """Let the writer finish, and say how the run stands; trouble with that is only told."""
    try:
        with contextlib.suppress(SaveError):  # told by the writer
            trainer.writer.wait()
        total = trainer.plan.total_steps
        folder.status(outcome, step=trainer.step, total_steps=total, reason=reason)
    except OSError as error:
        log.error("status.json could not be written: %s", error)


def _open_data(config: Config, world: World, signal: StopSignal) -> tuple[Store, Store | None]:
    """Rank 0 indexes; the others then read its index. An error of rank 0 is everybody's."""
    from pipelines.errors import DataError
    from pipelines.stores import open_store

    def open_both() -> tuple[Store, Store | None]:
        verify, evaluated = config.input.verify, config.monitor.eval_data
        train = open_store(config.data, verify=verify, progress=world.is_main)
        return train, open_store(evaluated, verify=verify) if evaluated else None

    stores: tuple[Store, Store | None] | None = None
    error: DataError | Preempted | None = None
    if world.is_main:
        try:
            with signal.interrupting("the data was indexed"):
                stores = open_both()
        except DataError as caught:
            error = DataError(str(caught))
        except Preempted as caught:
            error = caught
            _note_preempted(config, str(caught))
    if (theirs := world.share(error)) is not None:
        raise theirs
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


def _note_preempted(config: Config, reason: str) -> None:
    """`status.json` of a run that was stopped before it had begun; not if it is another's."""
    from byol_fast.runfolder import RunFolder

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


def _resolve(config: Config, store: Store, world: World) -> Resolved:
    from byol_fast import recipes, split

    before: Split | ValueError | None = None
    if world.is_main:
        try:
            before = split.read(Path(config.out))
        except ValueError as error:
            before = error
    before = world.share(before)
    if isinstance(before, ValueError):
        raise before
    resolved = recipes.resolve(config, samples=len(store), world_size=world.size, before=before)
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
    from byol_fast.monitor import LogError
    from pipelines.errors import DataError

    try:
        yield
    except DataError:
        raise
    except (ValueError, LogError) as error:
        raise _Mistake(str(error)) from error


def _failed(code: Exit, error: BaseException) -> Exit:
    """Tell the error: rank 0's, or one that rank 0 need not have met."""
    rank = os.environ.get("RANK", "0")
    text = f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}"
    print(text, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
