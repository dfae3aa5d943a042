"""How one image is stored in a `.beton`: copied, encoded as a JPEG, or as its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from pipelines.decode import decode, header, is_plain_jpeg, sound
from pipelines.errors import BadImage
from pipelines.formats.jpeg import SOI
from pipelines.stores import Images
from pipelines.turbo import simplejpeg

Mode: TypeAlias = Literal["jpeg", "lossless", "raw"]
How: TypeAlias = Literal["copied", "encoded", "raw"]

MODES: tuple[Mode, ...] = ("jpeg", "lossless", "raw")
_LONGEST = 65_500  # pixels a side: libjpeg's limit; the format's own is 65,535


@dataclass(frozen=True)
class Stored:
    """An image ready to be written."""

    how: How
    data: bytes | Images  # a JPEG, or pixels [height, width, 3]
    height: int
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return len(self.data) if isinstance(self.data, bytes) else self.data.nbytes


@dataclass(frozen=True)
class Storage:
    """What becomes of every image; calling it gives one image as it is to be stored.

    A plain JPEG that need not be made smaller is copied byte by byte, so it loses nothing; in mode
    `raw` nothing is. One with something odd beside its pixels is copied without that. All else
    (PNG, CMYK, what is resized) is decoded by `pipelines.decode` and encoded as a JPEG in mode
    `jpeg`, else stored as pixels.

    Args:
        mode: see above.
        quality: of the JPEGs encoded here, 1 to 100.
        max_side: the longer side in pixels that larger images are brought down to; None: as is.
    """

    mode: Mode = "jpeg"
    quality: int = 90
    max_side: int | None = None

    def __call__(self, image: bytes | Images) -> Stored:
        """Decodes strictly whatever it stores.

        Raises:
            BadImage: the image is corrupt, or has a side the format cannot state.
        """
        if isinstance(image, bytes):
            if image.startswith(SOI) and self.mode != "raw" and self._small_enough(*header(image)):
                image = sound(image)
                if is_plain_jpeg(image):
                    return Stored("copied", image, *header(image))
            image = decode(image)
        pixels = self._shrunk(image)
        height, width = pixels.shape[:2]
        if max(height, width) > _LONGEST:
            raise BadImage(
                f"{height} x {width} pixels: a side of a .beton's image has at most {_LONGEST:,}, "
                "so a maximum side is needed"
            )
        if self.mode != "jpeg":
            return Stored("raw", pixels, height, width)
        # 4:2:0 as FFCV's writer and most photographs have it: 370 images/s decoded on a core where
        # 4:4:4 gave 285 (ImageNet's sizes, quality 90).
        data = simplejpeg.encode_jpeg(
            pixels, self.quality, "RGB", colorsubsampling="420", fastdct=False
        )
        return Stored("encoded", data, height, width)

    def _small_enough(self, height: int, width: int) -> bool:
        return self.max_side is None or max(height, width) <= self.max_side

    def _shrunk(self, pixels: Images) -> Images:
        """The pixels, made smaller by Pillow's bicubic filter, which widens with the reduction."""
        height, width = pixels.shape[:2]
        pixels = np.ascontiguousarray(pixels)
        if self.max_side is None or self._small_enough(height, width):
            return pixels
        scale = self.max_side / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
