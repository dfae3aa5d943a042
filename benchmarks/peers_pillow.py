"""Peers that work image by image: Pillow, torchvision, and lightly's transform.

They run as their users run them: a data set whose item is an image's two views, and torch's
`DataLoader` around it. One thread is `num_workers=0`; more are that many worker processes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from pipelines.plan import Rows
from pipelines.spec import IMAGENET_MEAN, IMAGENET_STD
from pipelines.stores import Store

BICUBIC = F.InterpolationMode.BICUBIC

Views = list[Tensor]  # an image's two, or a batch's two
Item = Callable[[str, np.ndarray], Views]  # path and the plan's windows [2, 4] to views


def item(kind: str, size: int) -> Item:
    """What the row `kind` does for one image.

    Raises:
        ImportError: the package that the row is about is not installed.
    """
    match kind:
        case "pil crops":
            return lambda path, windows: pil_crops(path, windows, size)
        case "pil views":
            chains = [
                pil_view(size, blur=1.0, solarize=0.0),
                pil_view(size, blur=0.1, solarize=0.2),
            ]
            return lambda path, _: _each(chains, load(path))
        case "lightly transform":
            from lightly.transforms import byol_transform as lightly

            transform = lightly.BYOLTransform(
                lightly.BYOLView1Transform(input_size=size),
                lightly.BYOLView2Transform(input_size=size),
            )
            return lambda path, _: transform(load(path))
        case "torchvision v2":
            chains = [v2_view(size, blur=1.0, solarize=0.0), v2_view(size, blur=0.1, solarize=0.2)]
            return lambda path, _: _each(chains, load_tensor(path))
    raise ValueError(f"no such row: {kind!r}")


def _each(chains: list[Any], image: Any) -> Views:
    return [chain(image) for chain in chains]


def load(path: str) -> Image.Image:
    """As torchvision's `ImageFolder` loads a file."""
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


def load_tensor(path: str) -> Tensor:
    """uint8 `[3, H, W]` by torchvision's own decoder, or Pillow's where it has none any more."""
    try:
        from torchvision.io import ImageReadMode, decode_image, read_file
    except ImportError:
        return F.pil_to_tensor(load(path))
    return decode_image(read_file(path), ImageReadMode.RGB)


def pil_crops(path: str, windows: np.ndarray, size: int) -> Views:
    """The plan's windows, uint8 `[S, S, 3]` each: the same work as the sources'."""
    image = load(path)
    crops = [F.resized_crop(image, *window, [size, size], BICUBIC) for window in windows.tolist()]
    return [torch.from_numpy(np.array(crop)) for crop in crops]


def pil_view(size: int, *, blur: float, solarize: float) -> T.Compose:
    """One view of BYOL as Pillow-based packages write it."""
    jitter = T.ColorJitter(0.4, 0.4, 0.2, 0.1)
    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=BICUBIC),
            T.RandomHorizontalFlip(0.5),
            T.RandomApply([jitter], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([_blur], p=blur),
            T.RandomApply([ImageOps.solarize], p=solarize),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def v2_view(size: int, *, blur: float, solarize: float) -> v2.Compose:
    """One view of BYOL by torchvision's v2 transforms on a uint8 tensor."""
    taps = 2 * int(size / 10 / 2) + 1
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(taps, (0.1, 2.0))], p=blur),
            v2.RandomSolarize(128, p=solarize),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


class Pictures(Dataset[Views]):
    """The plan's rows, one after the other; an item is the two views of one of them."""

    def __init__(self, make: Item, store: Store, rows: list[Rows]) -> None:
        self.make = make
        self.paths = [store.name(int(row)) for batch in rows for row in batch.ids]
        self.windows = np.concatenate([batch.windows for batch in rows])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Views:
        return self.make(self.paths[i], self.windows[i])


class PillowChain:
    """A peer's `DataLoader`; every pass gives the batches of `rows`, in order."""

    def __init__(
        self, kind: str, threads: int, *, store: Store, rows: list[Rows], size: int
    ) -> None:
        self.loader: Any = DataLoader(
            Pictures(item(kind, size), store, rows),
            batch_size=len(rows[0]),
            num_workers=threads if threads > 1 else 0,
            persistent_workers=threads > 1,
            multiprocessing_context="fork" if threads > 1 else None,
        )

    def batches(self) -> Iterator[Views]:
        """The two views of each batch, `[B, ...]` each."""
        yield from self.loader

    def close(self) -> None:
        """Ends the worker processes."""
        self.loader = None
