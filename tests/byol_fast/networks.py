"""Networks that are small enough for a unit test, and a store that is partly broken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pipelines.errors import BadImage


class Small(nn.Module):
    """A network of which every part trains, in a thousandth of a ResNet's time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


class CountingMeans(nn.Module):
    """Channel means, counting images; after `most` of them it fails as a killed run does."""

    def __init__(self, most: int = 10**9) -> None:
        super().__init__()
        self.seen, self.most = 0, most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seen >= self.most:
            raise KeyboardInterrupt
        self.seen += len(x)
        return x.mean((2, 3))


class Unreadable:
    """A store of which the given rows cannot be decoded."""

    def __init__(self, store: Any, rows: Iterable[int]) -> None:
        self._store, self._rows = store, set(rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __len__(self) -> int:
        return len(self._store)

    def read(self, row: int) -> Any:
        if row in self._rows:
            raise BadImage("gone")
        return self._store.read(row)


class NoGrey(nn.Module):
    """[N, 3] means of the channels; fails on `pipelines.sources.FILL`, about 0 normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert bool((x.flatten(1).abs().amax(dim=1) > 0.05).all()), "a grey image was shown"
        return self.scale * x.mean((2, 3))
