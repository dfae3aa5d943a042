"""Training batches of a labelled store by the epoch plan: one window an image, on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from byol_fast.evaluate.decoding import open_pinned
from byol_fast.evaluate.recipes import Recipe
from byol_fast.evaluate.undecodable import readable
from pipelines.augment import choose
from pipelines.plan import Rows, RowStream
from pipelines.spec import AugmentSpec
from pipelines.stores import Store

# Main axes of ImageNet's colours (eigenvectors in columns) and the variances along them, RGB in
# [0, 1]; as in MMSelfSup's `Lighting` and fb.resnet.torch.
_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_VARIANCES = (0.2175, 0.0188, 0.0045)


class TrainingBatches:
    """Batch s is a pure function of (seed, s): a run goes on where it stopped, on any ranks.

    Args:
        store: labelled images.
        recipe: batch size, crop and colours.
        spec: read for mean, std and the image size.
    """

    def __init__(
        self,
        store: Store,
        recipe: Recipe,
        spec: AugmentSpec,
        *,
        device: torch.device,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int | None = None,
        backend: str = "auto",
    ) -> None:
        self._recipe, self._device, self._seed = recipe, device, seed
        self._spec = replace(spec, views=(recipe.view,) * 2, semantics=recipe.semantics)
        sizes = np.asarray(store.sizes)
        short = np.minimum(sizes[:, 0], sizes[:, 1])[:, None].repeat(2, axis=1)
        self._offsets = (sizes - short) // 2 if recipe.from_square else np.zeros_like(sizes)
        self._stream = RowStream(
            self._spec,
            seed=seed,
            sizes=short if recipe.from_square else sizes,
            batch_size=recipe.batch_size,
            rank=rank,
            world_size=world_size,
        )
        self._labels = torch.as_tensor(store.labels, dtype=torch.int64)
        self._augment = choose(self._spec, device)
        self._source = open_pinned(store, spec.image_size, device, backend=backend, threads=threads)

    @property
    def steps_per_epoch(self) -> int:
        return len(self._stream.steps(0))

    def steps(self, first: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images `[b, 3, S, S]`, normalised, channels_last, and labels `[b]`; this rank's share,
        without those that could not be decoded.

        Raises:
            DataError: that leaves none.
        """
        pending: deque[tuple[int, Rows]] = deque()

        def feed() -> Iterator[Rows]:
            for step in range(first, stop):
                pending.append((step, self._rows(step)))
                yield pending[-1][1]

        for crops in self._source.crops(feed()):
            step, rows = pending.popleft()
            x = self._augment(crops, torch.from_numpy(rows.colours))[0]
            if self._recipe.lighting:
                x += self._lighting(step)
            y = self._labels[rows.ids]
            if (kept := readable(rows.ids, self.bad)) is not None:
                x, y = x[kept.to(x.device)].contiguous(memory_format=torch.channels_last), y[kept]
            yield x, y.to(self._device, non_blocking=True)

    @property
    def bad(self) -> dict[int, str]:
        """Row of the store -> reason, of the images that this rank could not decode."""
        return self._source.bad

    def close(self) -> None:
        """Ends the source's threads."""
        self._source.close()

    def _rows(self, step: int) -> Rows:
        """One view, so that the source cuts once; windows moved into the centre square."""
        rows = self._stream.rows(step)
        windows = rows.windows[:, :1].copy()
        windows[:, 0, :2] += self._offsets[rows.ids].astype(windows.dtype)
        return Rows(rows.ids, windows, rows.colours[:, :1])

    def _lighting(self, step: int) -> Tensor:  # [b, 3, 1, 1], in units of the normalised image
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        drawn = torch.randn(self._recipe.batch_size, 3, generator=generator)
        drawn *= self._recipe.lighting * torch.tensor(_VARIANCES)
        shifts = drawn @ torch.tensor(_AXES).T / torch.tensor(self._spec.std)
        here = self._stream.micro_batch
        shifts = shifts[self._stream.rank * here :][:here]
        return shifts[:, :, None, None].to(self._device, non_blocking=True)
