"""Random pixels that are on the device already: what a step costs without its input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pipelines.plan import Rows
from pipelines.stores import Store

_PICTURES = 64  # different crops; 64 x 150 KB at 224 pixels is small beside one batch


class SyntheticSource:
    """Noise instead of crops; a sample has the same pixels whenever it comes, on any machine.

    Nothing is read or decoded: it needs the store only to be built like the other sources.
    See `pipelines.sources.Source`.
    """

    def __init__(self, store: Store, *, image_size: int, device: torch.device | str) -> None:
        self.bad: dict[int, str] = {}
        self._device, self._closed = torch.device(device), False
        generator = torch.Generator().manual_seed(0)
        shape = (_PICTURES, image_size, image_size, 3)
        pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self._pictures = pictures.to(self._device)

    @property
    def waits(self) -> dict[str, float]:
        """Seconds; all 0, see `Source.waits`."""
        return dict.fromkeys(("decode", "read", "wait", "copy"), 0.0)

    def crops(self, rows: Iterable[Rows]) -> Iterator[Tensor]:
        """uint8 `[V, B, S, S, 3]` for each of `rows`; see `Source.crops`."""
        for batch in rows:
            if self._closed:
                raise RuntimeError("the source is closed")
            ids, views = torch.from_numpy(batch.ids), torch.arange(batch.windows.shape[1])
            which = (ids + 31 * views[:, None]) % _PICTURES  # [V, B]: a sample's views differ
            if self._device.type == "cuda":
                which = which.pin_memory().to(self._device, non_blocking=True)
            yield self._pictures[which]

    def close(self) -> None:
        """Nothing to end; crops cannot be asked for after it."""
        self._closed = True
