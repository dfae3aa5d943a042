"""Generated pictures and a store to hold them, for the tests of the sources."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipelines.errors import BadImage
from pipelines.plan import EpochPlan, Rows
from pipelines.spec import AugmentSpec

SIZES = [(48, 64), (97, 131), (240, 320), (33, 17), (7, 9), (1, 1), (150, 40), (375, 500)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 `[H, W, 3]` that looks like a photograph to a resampler: smooth, with some edges."""
    rng = np.random.default_rng((height, width, seed))
    total = np.zeros((height, width, 3))
    for cell in (4, 16, 64):  # octaves, the coarse ones stronger
        coarse = rng.normal(size=(height // cell + 2, width // cell + 2, 3)) * 12 * cell**0.5
        layers = [
            np.asarray(Image.fromarray(layer).resize((width, height), Image.Resampling.BILINEAR))
            for layer in coarse.astype(np.float32).transpose(2, 0, 1)
        ]
        total += np.stack(layers, axis=2)
    total[height // 3 :, width // 2 :] += 60  # an edge
    return (total + 110).clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options: int) -> bytes:
    """The picture as a file."""
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, kind, **options)
    return file.getvalue()


class FakeStore:
    """Images given as bytes or arrays; an exception in the place of one is raised when it is read.

    Args:
        images: one entry a row.
        sizes: what was indexed; by default the sizes of the arrays.
    """

    classes: tuple[str, ...] = ()
    fingerprint = ""
    quarantined: tuple[tuple[str, str], ...] = ()

    def __init__(
        self,
        images: Sequence[bytes | np.ndarray | Exception],
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.images, self.reads = list(images), 0
        self.encoded = any(isinstance(image, bytes) for image in images)
        if sizes is None:
            sizes = [image.shape[:2] for image in images if isinstance(image, np.ndarray)]
        self.sizes = np.array(sizes, dtype=np.int32)
        self.labels = np.full(len(self.images), -1, dtype=np.int32)

    @classmethod
    def of_jpegs(cls, sizes: Sequence[tuple[int, int]] = SIZES) -> FakeStore:
        """Colour JPEGs of the given sizes, every fourth one grey."""
        images = [
            encoded(picture(*size, seed=number), mode="RGB" if number % 4 < 3 else "L", quality=90)
            for number, size in enumerate(sizes)
        ]
        return cls(images, sizes)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> bytes | np.ndarray:
        self.reads += 1
        image = self.images[row]
        if isinstance(image, Exception):
            raise image
        return image

    def name(self, row: int) -> str:
        return f"picture-{row}"


def rows_of(store: FakeStore, batches: Sequence[Sequence[int]], size: int = 32) -> list[Rows]:
    """The first epoch's windows and colours of the samples named, batch by batch."""
    plan = EpochPlan(AugmentSpec(image_size=size), 0, 0, store.sizes)
    return [Rows(np.array(ids), plan.windows(ids), plan.colours(ids)) for ids in batches]


def bad(reason: str = "it is gone") -> BadImage:
    return BadImage(reason)
