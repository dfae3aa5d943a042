"""What is known to differ from the published protocols, in words, for result files.

`published_protocol` of a result is true where the list is empty. A published figure is a yardstick
all the same; the list says how exact a one.
"""

from __future__ import annotations

from collections.abc import Mapping

SIZE = 224  # pixels of all published protocols on ImageNet, Places205 and VOC07

ANTIALIASED = (
    "images are resized bicubically with antialiasing; the authors' code resizes without it"
)
ONE_RESIZE = (
    "test images are cut (the centred square of .875 of the short side) and then resized "
    "bicubically; there the short side is resized to 256 bilinearly, and 224 pixels are cut"
)
BILINEAR = "training crops are resized bicubically with antialiasing; there bilinearly"
WHOLE = (
    "the image is resized to a square in one bicubic step; there in two bilinear ones, the short "
    "side to 256 first"
)
QUICK = "--quick: a short run for trying"


def settings(asked: Mapping[str, object]) -> list[str]:
    """What the command line changed: values that are neither None nor False."""
    return [f"{key} {value}" for key, value in asked.items() if value not in (None, False)]


def size(pixels: int) -> list[str]:
    """Images of another size than the published protocols have."""
    return [] if pixels == SIZE else [f"images of {pixels} pixels instead of {SIZE}"]


def record(differences: list[str]) -> dict[str, object]:
    """The result file's part."""
    return {"published_protocol": not differences, "differs": differences}
