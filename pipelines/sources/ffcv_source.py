"""Crops from a `.beton` file by FFCV's decoder: one decode and every view's crop in one operation.

Of FFCV this takes the file and libffcv, its compiled decoder, not its `Loader`. The same kernel as
an operation of a Loader was a fifth slower, and a Loader has one batch size, ignores what libffcv
says of a corrupt image, draws orders of its own and sets the thread counts of torch and numba. Here
the torch source's threads read, decode and cut; each image's windows go with its call.

libffcv decodes with libjpeg's fast inverse DCT, so pixels are on average 0.9 of 255 levels from the
torch source's, most of that 0.7 too dark; the kernel has 0.2 of it. An image whose windows are all
large is decoded at half, a quarter or an eighth of its size, which is 1 to 2 levels from the torch
source's on average and 5.8 for the worst of 400 photographs.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.decode import header, is_plain_jpeg
from pipelines.errors import BadImage, DataError, MissingBackend
from pipelines.plan import Rows
from pipelines.sources import FILL
from pipelines.sources.torch_source import TorchSource
from pipelines.sources.workers import Job
from pipelines.stores import Images, Store
from pipelines.stores.beton import BetonStore

try:
    from pipelines.sources.ffcv_kernel import compile_cut
except Exception as error:  # an import can raise anything
    raise MissingBackend(
        f"the ffcv backend needs FFCV ({type(error).__name__}: {error}): run launch/install_ffcv.sh"
    ) from error

_KEPT = 64 << 20  # bytes of decoded pixels that a thread keeps room for: 21 megapixels


class FfcvSource(TorchSource):
    """Decodes with libffcv and cuts with compiled code, on CPU threads.

    See `pipelines.sources.Source`. Batches, threads and closing are the torch source's; what is
    done for one image is not.

    Args:
        store: a `.beton` file.
        image_size: S, pixels.
        device: where the crops are wanted.
        threads: worker threads; one core each keeps them busy.
        prefetch: batches made ahead of the one in use, >= 0.

    Raises:
        DataError: the store is not a `.beton` file.
    """

    def __init__(
        self,
        store: Store,
        *,
        image_size: int,
        device: torch.device | str,
        threads: int,
        prefetch: int = 2,
    ) -> None:
        if not isinstance(store, BetonStore):
            raise DataError(
                f"the ffcv backend reads .beton files, and this is a {type(store).__name__}: "
                "make one with python -m pipelines.convert DIR OUT.beton"
            )
        super().__init__(
            store, image_size=image_size, device=device, threads=threads, prefetch=prefetch
        )
        self._cut = compile_cut()
        self._sizes = store.sizes
        self._own = threading.local()  # .room: a thread's decoded image
        self._grey = torch.tensor(FILL, dtype=torch.uint8)

    def _begin(self, rows: Rows) -> tuple[Job, Tensor]:
        """Sets the workers on a batch; the tensor is complete when the job is done."""
        check_windows(rows.windows, self._sizes[rows.ids])
        views, size = rows.windows.shape[1], self._size
        host = self._transfer.empty(views, len(rows), size, size, 3)
        windows = np.ascontiguousarray(rows.windows, dtype=np.int64)
        ids, shrinks = rows.ids.tolist(), reductions(windows, size).tolist()
        places = (windows.ctypes.data, host.data_ptr(), (views, len(rows), size))

        def cut(item: int, windows: object = windows) -> None:  # kept alive by this
            row = ids[item]
            try:
                self._cut_row(row, shrinks[item], *places, item)
            except BadImage as error:
                self._reader.add_bad(row, error)
                host[:, item] = self._grey

        return self._workers.start(len(rows), cut), host

    def _cut_row(self, row: int, shrink: int, *target: Any) -> None:
        """Writes the crops of one image.

        Args:
            target: see `ffcv_kernel._cut`: windows, out, shape, item.

        Raises:
            BadImage: it cannot be read or decoded.
        """
        data = self._reader.read(row)
        if isinstance(data, bytes) and is_plain_jpeg(data):
            height, width = header(data)
            self._reader.check_size(row, height, width)
            coded, room = np.frombuffer(data, np.uint8).ctypes.data, self._room(3 * height * width)
            if self._cut(coded, len(data), height, width, shrink, room.ctypes.data, *target) == 0:
                return
        # The rest is the image policy's: other formats, and what libjpeg complained of.
        image = np.ascontiguousarray(self._reader.pixels(row, data))
        height, width, _ = image.shape
        self._cut(0, 0, height, width, 1, image.ctypes.data, *target)

    def _room(self, size: int) -> Images:
        """Memory of this thread, used again and again: cleared anew it takes 0.1 ms a megabyte."""
        room: Images | None = getattr(self._own, "room", None)
        if room is None or len(room) < size:
            room = np.empty(size, dtype=np.uint8)
            if size <= _KEPT:
                self._own.room = room
        return room


def reductions(windows: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """`[B]` from `[B, V, 4]`: by how much each image may be shrunk while it is decoded, 1 to 8.

    By 2, 4 or 8 if every window has at least as many times the pixels of a crop on both sides, so
    that no crop is ever enlarged from a reduced image.
    """
    shortest = windows[:, :, 2:].min(axis=(1, 2))
    return np.select([shortest >= shrink * size for shrink in (8, 4, 2)], [8, 4, 2], 1)


def check_windows(windows: npt.NDArray[np.int32], sizes: npt.NDArray[np.int32]) -> None:
    """Compiled code checks nothing: a window outside its image would read foreign memory.

    Raises:
        ValueError: one lies outside.
    """
    corner, extent = windows[..., :2], windows[..., 2:]
    if (corner < 0).any() or (extent < 1).any() or (corner + extent > sizes[:, None]).any():
        raise ValueError("a window lies outside its image")
