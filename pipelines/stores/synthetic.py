"""Random pictures without a disk: for measuring, and for trying a machine."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError


class SyntheticStore:
    """`n` unlabelled images of uniform noise; a row has the same pixels on every read and machine.

    Args:
        n: number of images, at least 1.
        size: height and width in pixels.
    """

    encoded = False
    classes: tuple[str, ...] = ()
    quarantined: tuple[tuple[str, str], ...] = ()

    def __init__(self, n: int, size: tuple[int, int] = (256, 256)) -> None:
        if n < 1:
            raise DataError(f"synthetic:{n} holds no image: give a number of at least 1")
        self.size = size
        self.sizes: npt.NDArray[np.int32] = np.broadcast_to(np.array(size, np.int32), (n, 2))
        self.labels: npt.NDArray[np.int32] = np.full(n, -1, dtype=np.int32)
        description = f"synthetic:{n}:{size[0]}x{size[1]}"
        self.fingerprint = hashlib.sha256(description.encode()).hexdigest()

    @classmethod
    def parse(cls, text: str) -> SyntheticStore:
        """From `synthetic:N`."""
        number = text.removeprefix("synthetic:").replace("_", "")
        if not (number.isascii() and number.isdigit()):
            raise DataError(f"{text!r} is not synthetic:N with a number N, such as synthetic:10000")
        return cls(int(number))

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, row: int) -> npt.NDArray[np.uint8]:
        """Pixels `[H, W, 3]` of row `row`."""
        bits = np.random.Generator(np.random.Philox(key=row))
        return bits.integers(0, 256, (*self.size, 3), dtype=np.uint8)

    def name(self, row: int) -> str:
        """`synthetic[12]`."""
        return f"synthetic[{row}]"
