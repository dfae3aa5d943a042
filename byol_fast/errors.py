"""Exit codes of the commands, and the errors that carry them."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """What a command's exit status means."""

    DONE = 0
    FAILED = 1  # a checkpoint could not be written, or an error that is not the user's
    USAGE = 2
    NO_CHECKPOINT = 3
    DATA = 4
    DIVERGED = 5
    PREEMPTED = 75  # EX_TEMPFAIL: a scheduler may start the same command again


class CheckpointError(RuntimeError):
    """No checkpoint can be loaded; the message names the files and what is wrong with each."""


class UnreadableError(CheckpointError):
    """The system could not read a checkpoint (permission, I/O error): it may be whole."""


class SaveError(OSError):
    """A checkpoint was not written; the message has path, cause and mend."""


class Diverged(RuntimeError):
    """Training was stopped: steps are not finite, or the embeddings have collapsed."""


class Preempted(RuntimeError):
    """A signal asked the run to end; a checkpoint of the last step, if any, has been written."""


class OutOfMemory(RuntimeError):
    """A step does not fit into memory; the message names what does, where that is known."""


class CaptureError(RuntimeError):
    """The step could not be captured as a CUDA graph; the process is not fit to go on training."""
