"""Rows of a store as bytes or pixels, timed, with the bad ones entered in a list."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
import numpy.typing as npt

from pipelines.decode import MAX_PIXELS, decode_top, sound
from pipelines.errors import BadImage, DataError
from pipelines.stores import Images, Store

log = logging.getLogger(__name__)


# Bad images in succession, of an order that is shuffled: not they are broken, but what holds them.
ALL_BAD = 512


class Reader:
    """Reads a store from any number of threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.bad: dict[int, str] = {}  # sample id -> reason
        self.seconds = 0.0  # spent in the store's `read`, summed over the threads
        self._sizes = store.sizes
        self._in_succession = 0  # bad ones
        self._sound: npt.NDArray[np.bool_] | None = None  # rows decoded strictly by `whole`
        if not getattr(store, "verified", False):
            self._sound = np.zeros(len(store), dtype=bool)
        self._lock = threading.Lock()

    def read(self, row: int) -> bytes | Images:
        """What the store holds for `row`.

        Raises:
            BadImage: it cannot be read any more.
            Exception: any other error of the store, with the image's name added.
        """
        started = time.perf_counter()
        try:
            return self.store.read(row)
        except BadImage:
            raise
        except Exception as error:
            error.add_note(f"while reading {self.store.name(row)}")
            raise
        finally:
            elapsed = time.perf_counter() - started
            with self._lock:
                self.seconds += elapsed

    def pixels(
        self, row: int, data: bytes | Images, rows: int = MAX_PIXELS
    ) -> npt.NDArray[np.uint8]:
        """uint8 `[H, W, 3]` of the `data` that `read` gave, or at least the upper `rows` of it.

        Raises:
            BadImage: it cannot be decoded, or has not the size that was indexed.
        """
        image, height = decode_top(data, rows) if isinstance(data, bytes) else (data, len(data))
        self.check_size(row, height, image.shape[1])
        return image

    def whole(self, row: int, data: bytes) -> bytes:
        """The JPEG that `read` gave, for a decoder that says nothing of damage.

        What was not verified when it was indexed is decoded strictly the first time it is read.

        Raises:
            BadImage: its pixels are damaged.
        """
        if self._sound is None or self._sound[row]:
            return data
        clean = sound(data)
        self._sound[row] = clean is data
        return clean

    def check_size(self, row: int, height: int, width: int) -> None:
        """Windows were drawn for the indexed size and fit no other.

        Raises:
            BadImage: the sizes differ, as after a file was replaced.
        """
        indexed = self._sizes[row]
        if height != indexed[0] or width != indexed[1]:
            raise BadImage(
                f"it has {height} x {width} pixels, but had {indexed[0]} x {indexed[1]} when it "
                "was indexed"
            )
        self._in_succession = 0

    def add_bad(self, row: int, error: BadImage) -> None:
        """Enter a row whose image is bad, and warn of it the first time.

        Raises:
            DataError: there was no good one among the last `ALL_BAD`.
        """
        with self._lock:
            known = row in self.bad
            self.bad.setdefault(row, str(error))
            self._in_succession += 1
        name = self.store.name(row)
        if self._in_succession >= ALL_BAD:
            raise DataError(
                f"none of the last {ALL_BAD} images could be read or decoded, {name} for one: "
                f"{error}. See that their disk is there, and that they are those that were "
                "indexed (python -m pipelines.index FOLDER); then repeat the command"
            )
        if known:
            return
        log.warning("%s cannot be decoded and is shown as grey: %s", name, error)
