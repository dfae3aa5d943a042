"""Sources execute a plan's rows: read, decode once, cut every view's crop.

All of them give the same thing, uint8 `[V, B, S, S, 3]` on the device, so that nothing after them
knows which one ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.plan import Rows

# Takes the place of an image that cannot be decoded. ImageNet's mean colour: about 0 normalised.
FILL = (124, 116, 104)


class Source(Protocol):
    """Cuts the crops that rows of a plan ask for."""

    @property
    def bad(self) -> dict[int, str]:
        """Sample id -> reason, of images that could not be decoded and were shown as FILL."""
        ...

    @property
    def waits(self) -> dict[str, float]:
        """Seconds since the source was made: `decode` (processor time of all workers), `read`
        (workers inside the store's `read`), `wait` (consumer blocked), `copy` (to the device)."""
        ...

    def crops(self, rows: Iterable[Rows]) -> Iterator[Tensor]:
        """One uint8 tensor `[V, B, S, S, 3]` for each `Rows`, in order, on the device.

        A tensor is ready on the current stream and belongs to the consumer: the source never
        writes to it again. `rows` is read in the consumer's thread, some batches ahead. Ending the
        iteration early stops the work that was begun.

        Raises:
            Exception: whatever a worker met, `BadImage` excepted.
        """
        ...

    def close(self) -> None:
        """Ends the threads. Crops cannot be asked for after it."""
        ...


def dali_available() -> bool:
    """Whether NVIDIA DALI is installed and loads."""
    try:
        import nvidia.dali  # noqa: F401
    except Exception:  # a shared library that does not load, versions that do not fit
        return False
    return True


def ffcv_available() -> bool:
    """Whether FFCV's decoder is installed and loads, and numba with it."""
    try:
        import pipelines.sources.ffcv_source  # noqa: F401
    except (ImportError, OSError):  # whatever it lacks: FFCV, numba or one of their libraries
        return False
    return True
