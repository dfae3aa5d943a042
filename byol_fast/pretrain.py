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
from byol_fast.errors import (
    CaptureError,
    CheckpointError,
    Diverged,
    Exit,
    OutOfMemory,
    Preempted,
    SaveError,
)
from byol_fast.session.signals import StopSignal

if TYPE_CHECKING:
    from byol_fast.distributed import World
    from byol_fast.recipes import Resolved
    from byol_fast.session.failures import Failures
    from byol_fast.session.opening import Data
    from byol_fast.session.runfolder import RunFolder
    from byol_fast.session.split import Split
    from byol_fast.trainer import Trainer

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
    from byol_fast import distributed
    from byol_fast.session import failures
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
        notes.report(error)  # it may be this rank's alone, and the others wait for it
        return _failed(Exit.USAGE, error)
    except CheckpointError as error:
        return _failed(Exit.NO_CHECKPOINT, error)
    except (CaptureError, OutOfMemory) as error:
        notes.report(error)
        return _failed(Exit.FAILED, error)
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
    from byol_fast.session.opening import open_data
    from byol_fast.session.outcome import finish
    from pipelines.errors import DataError

    config = call.config
    with _mistakes():
        data = open_data(config, world, signal)
        resolved = _resolve(config, data, world)
        if call.replay is not None:
            from byol_fast.session.replay import replay

            replay(resolved, data, *call.replay, rank=world.rank)
        elif call.dry_run:
            from byol_fast.session import dryrun

            dryrun.check(resolved.config, world)
    if call.dry_run or call.replay is not None:
        return
    with contextlib.ExitStack() as stack:
        with _mistakes():
            trainer, folder = assemble(resolved, data, world, stack)
        outcome, reason = "failed", ""
        if world.is_main:
            notes.last_words = partial(_close, trainer, folder, "failed")
        try:
            if trainer.run(signal):
                if world.is_main:
                    finish(trainer, folder)
                outcome = "done"
            else:
                outcome, reason = "preempted", f"asked to stop after step {trainer.step}"
                log.info("%s: repeat the command without --run.max-steps to go on", reason)
        except Preempted as error:
            outcome, reason = "preempted", str(error)
            raise
        except DataError as error:  # it may be this rank's disk alone
            reason = notes.report(error) or str(error)
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
            trainer.saving.writer.wait()
        total = trainer.plan.total_steps
        folder.status(outcome, step=trainer.step, total_steps=total, reason=reason)
    except OSError as error:
        log.error("status.json could not be written: %s", error)


def _resolve(config: Config, data: Data, world: World) -> Resolved:
    from byol_fast import recipes
    from byol_fast.session import split

    before: Split | ValueError | None = None
    if world.is_main:
        try:
            before = split.read(Path(config.out))
        except ValueError as error:
            before = error
    before = world.share(before)
    if isinstance(before, ValueError):
        raise before
    parts = data.parts
    resolved = recipes.resolve(config, samples=parts.images, world_size=world.size, before=before)
    parts.refuse_small(resolved.global_batch)
    for line in resolved.arithmetic():
        log.info(line)
    if config.in_parts:
        for line in parts.lines(resolved.global_batch):
            log.info(line)
    if world.is_main and (uneven := parts.unevenness()):
        log.warning(uneven)
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
    with contextlib.suppress(OSError):  # where nobody listens any more the code still tells
        print(text, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
