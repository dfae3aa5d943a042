"""Which rank failed first: known to all ranks, so that its traceback is the one that is read.

A rank that waits for a dead one in a collective gets an error of its own, or none at all for
minutes. The ranks therefore leave a note in the process group's store.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

_KEY = "first"
PATIENCE = 10.0  # seconds that a rank has to end by itself once another one has failed
_INTERVAL = 1.0  # seconds between looks


class Failures:
    """The note of the first failure, in a store that all ranks reach.

    Args:
        store: of the process group; None in a world of one.
    """

    def __init__(self, store: Store | None, rank: int) -> None:
        self.rank = rank
        self._store: Store | None = None
        if store is not None:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"byol_fast/failure/{attempt}", store)
            self._store.set_timeout(timedelta(seconds=5))

    def report(self, error: BaseException) -> str | None:
        """Note that this rank fails; returns what another rank noted before, if one did."""
        if self._store is None:
            return None
        text = f"rank {self.rank} failed first: {type(error).__name__}: {error}"
        try:
            found = self._store.compare_set(_KEY, "", text).decode()
        except Exception:  # the store has died with its rank
            return None
        return None if found == text else found

    def watch(self) -> None:
        """End this process when another rank has failed and this one goes on waiting for it."""
        if self._store is not None:
            threading.Thread(target=self._watch, name="failures", daemon=True).start()

    def _watch(self) -> None:
        why = None
        while why is None:
            time.sleep(_INTERVAL)
            why = self._first()
        time.sleep(PATIENCE)
        print(
            f"error on rank {self.rank}: still waiting {PATIENCE:.0f} s after another rank has "
            f"ended, so it ends too ({why})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _first(self) -> str | None:
        """What the rank that failed first noted; None while none has."""
        assert self._store is not None
        try:
            return self._store.get(_KEY).decode() if self._store.check([_KEY]) else None
        except Exception:  # whatever c10d raises: without torchrun the store is in rank 0's process
            return "rank 0, which holds the store, is gone"


def of_this_process(rank: int) -> Failures:
    """The notes of the process group that this process has joined, if any."""
    if not dist.is_initialized():
        return Failures(None, rank)
    return Failures(_get_default_store(), rank)
