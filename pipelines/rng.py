"""Numbers by position: a counter-based generator without state (splitmix64, in NumPy).

A number is the hash of (seed, epoch, sample id, view, slot). It does not depend on what was drawn
before, so any row of any epoch can be made alone, on any rank, by any backend.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment: 2^64 / golden ratio
_SLOTS_PER_VIEW = 64
CROP_TRIES = 10  # torchvision's RandomResizedCrop gives up after ten draws


class Slot(IntEnum):
    """Where in a (sample, view) stream a number is drawn. New entries go at the end: changing a
    value changes every epoch ever made with a seed."""

    AREA = 0  # ... AREA + CROP_TRIES - 1
    ASPECT = 10  # ... ASPECT + CROP_TRIES - 1
    TOP = 20
    LEFT = 21
    FLIP = 22
    JITTER = 23
    ORDER = 24
    BRIGHTNESS = 25
    CONTRAST = 26
    SATURATION = 27
    HUE = 28
    GREY = 29
    BLUR = 30
    SIGMA = 31
    SOLARIZE = 32


def _mix(x: Any) -> Any:
    """splitmix64's finaliser, on a uint64 scalar or array; wrapping is the arithmetic meant."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def states(seed: int, epoch: int, ids: npt.NDArray[np.int64]) -> U64:
    """One 64-bit stream state per sample id: `[n]`."""
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed) + _GOLDEN)
        key = _mix(key ^ _mix(np.uint64(epoch) + np.uint64(1)))
        mixed: U64 = _mix(key ^ _mix(ids.astype(np.uint64) + np.uint64(1)))
    return mixed


def order_keys(stream_states: U64) -> U64:
    """Sort keys of the epoch's order, `[n]`: apart from every slot of every view."""
    keys: U64 = _mix(stream_states ^ _GOLDEN)
    return keys


class Draws:
    """The uniform numbers of one view of some samples: `draws(slot)` is `[n]` in [0, 1)."""

    def __init__(self, stream_states: U64, view: int) -> None:
        self.states, self.view = stream_states, view

    def __call__(self, slot: int) -> F64:
        with np.errstate(over="ignore"):
            counter = np.uint64(self.view * _SLOTS_PER_VIEW + slot + 1) * _GOLDEN
            bits = _mix(self.states + counter)
        uniform: F64 = (bits >> np.uint64(11)) * 2.0**-53
        return uniform

    def subset(self, which: npt.NDArray[np.int64]) -> Draws:
        """The same view of the samples at positions `which`."""
        return Draws(self.states[which], self.view)
