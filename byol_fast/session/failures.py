"""Which rank failed first, or went silent: known to all ranks, so that the root is what is read.

A rank that waits for a dead one in a collective gets an error of its own, or none at all for
minutes. The ranks therefore leave notes in the process group's store: the first failure, and a
heartbeat each. Every rank listens to the next one, so a store serves any number of ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

_KEY, _LEFT = "first", "- has left"
PATIENCE = 10.0  # seconds that a rank has to end by itself once another one has failed
_INTERVAL = 1.0  # seconds between heartbeats
_ANSWER = 5.0  # seconds that a store may take
_HERE = Path(__file__).resolve().parents[2]
_PACKAGES = tuple(f"{_HERE / name}{os.sep}" for name in ("byol_fast", "pipelines"))


class Failures:
    """The notes of one rank, in a store that all ranks reach.

    Args:
        store: of the process group; None in a world of one.
        silence: after how many seconds without a heartbeat a rank counts as hanging.
    """

    def __init__(
        self, store: Store | None, rank: int, size: int = 1, *, silence: float = 240.0
    ) -> None:
        self.rank, self.size, self.silence = rank, size, silence
        self._store: Store | None = None
        self._beats = 0  # that the store has taken
        self._first: str | None = None
        self._gone = self._left = False
        self._speaking = threading.Lock()
        # Called with the cause, from a thread, before this process is ended for another's failure.
        self.last_words: Callable[[str], None] | None = None
        if store is not None:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"byol_fast/failure/{attempt}", store)
            self._store.set_timeout(timedelta(seconds=_ANSWER))

    def report(self, error: BaseException) -> str | None:
        """Note that this rank fails; returns what another rank noted before, if one did."""
        text = f"rank {self.rank} failed first: {type(error).__name__}: {error}"
        found = self._within_limit(lambda store: store.compare_set(_KEY, "", text).decode())
        return None if found in (None, text) else found

    def whereabouts(self) -> str:
        """Where in the code the ranks are, by their heartbeats, and which of them have none."""

        def ask(store: Store) -> str:
            keys = [key for key in map("beat/{}".format, range(self.size)) if store.check([key])]
            before = [store.get(key) for key in keys]
            time.sleep(2.5 * _INTERVAL)
            places: defaultdict[str, list[str]] = defaultdict(list)
            for key, earlier in zip(keys, before, strict=True):
                said = store.get(key)
                silent = " (silent)" if said == earlier else ""
                places[said.decode().partition(" ")[2] + silent].append(key.partition("/")[2])
            return "; ".join(f"rank {', '.join(ranks)} in {at}" for at, ranks in places.items())

        return self._within_limit(ask) or "rank 0, which holds the store, is silent"

    def noted(self) -> str | None:
        """What the rank that failed first noted; None if none has, or the store is gone."""
        return self._within_limit(
            lambda store: store.get(_KEY).decode() if store.check([_KEY]) else None
        )

    def watch(self) -> None:
        """End this process when another rank has failed or hangs, and this one waits for it.

        Under torchrun also ask it to stop, as a signal would, once its torchrun has gone.
        """
        if self._store is not None:
            for target in (self._beat, self._watch):
                threading.Thread(target=target, name="failures", daemon=True).start()

    def leave(self) -> None:
        """Tell the others that this rank is silent from now on because it has finished."""

        def say(store: Store) -> None:
            with self._speaking:
                self._left = True
                store.set(f"beat/{self.rank}", _LEFT)

        self._within_limit(say)

    def _watch(self) -> None:
        """Needs no store: that may never answer again."""
        silent, beats = 0.0, 0
        parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        while self._first is None:
            time.sleep(_INTERVAL)
            # In intervals, not by the clock: a machine that slept has missed nothing.
            silent = silent + _INTERVAL if beats == self._beats else 0.0
            beats = self._beats
            if silent > self.silence:
                self._first = f"rank 0, which holds the store, has been silent for {silent:.0f} s"
            if parent is not None and os.getppid() != parent:
                parent = None
                print(f"rank {self.rank}: its torchrun is gone", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        self._say_last_words()
        print(
            f"error on rank {self.rank}: still waiting {PATIENCE:.0f} s after another rank has "
            f"ended, so it ends too ({self._first})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _say_last_words(self) -> None:
        """Within a limit: the disk may be what everybody waits for."""
        if self.last_words is not None and self._first is not None:
            said = threading.Thread(target=self.last_words, args=(self._first,), daemon=True)
            said.start()
            said.join(_ANSWER)

    def _beat(self) -> None:
        """Say that this rank lives, hear whether the next one does, and look for a failure."""
        assert self._store is not None
        store = self._store.clone()  # a connection of its own: it may wait here for good
        following, heard, silent = (self.rank + 1) % self.size, b"", 0.0
        while self._first is None:
            try:
                with self._speaking:
                    if not self._left:
                        store.set(f"beat/{self.rank}", f"{self._beats} {_place()}")
                key = f"beat/{following}"
                said = store.get(key) if store.check([key]) else b""
                silent = silent + _INTERVAL if said == heard != _LEFT.encode() else 0.0
                heard = said
                if silent > self.silence:
                    text = f"rank {following} has been silent for {silent:.0f} s: it hangs, or "
                    store.compare_set(_KEY, "", text + "its machine cannot be reached")
                if store.check([_KEY]):
                    self._first = store.get(_KEY).decode()
            except Exception:  # whatever c10d raises: the store may be in rank 0's process
                self._gone, self._first = True, "rank 0, which holds the store, is gone"
            self._beats += 1
            time.sleep(_INTERVAL)

    def _within_limit(self, ask: Callable[[Store], str | None]) -> str | None:
        """What a store answers; None if it has died with its rank, or is silent."""
        if self._store is None or self._gone:  # c10d prints a page for each try
            return None
        answers: list[str | None] = []
        store = self._store

        def work() -> None:
            try:
                answers.append(ask(store))
            except Exception:  # whatever c10d raises
                answers.append(None)

        thread = threading.Thread(target=work, name="failures", daemon=True)
        thread.start()
        thread.join(2 * _ANSWER)
        return answers[0] if answers else None


def _place() -> str:
    """Where this process's main thread is: its innermost line in our code, `step.py:62`."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_PACKAGES):
            return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
        frame = frame.f_back
    return "code of others"


def of_this_process(rank: int, *, silence: float = 240.0) -> Failures:
    """The notes of the process group that this process has joined, if any."""
    if not dist.is_initialized():
        return Failures(None, rank)
    return Failures(_get_default_store(), rank, dist.get_world_size(), silence=silence)
