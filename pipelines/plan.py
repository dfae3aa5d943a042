"""The epoch as a table: order, crop windows and colours, a pure function of where you are.

Nothing here has state. Every number is a hash of (seed, epoch, sample id, view, slot), so any row
can be made at any time, on any rank, by any backend, and resuming is starting at row k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines import rng
from pipelines.crops import Windows, centre_windows, draw_windows
from pipelines.errors import DataError
from pipelines.rng import F64, Slot
from pipelines.spec import JITTER_ORDERS, AugmentSpec, Colour

__all__ = ["EpochPlan", "Place", "RowStream", "Rows", "centre_windows", "total_steps"]

Ids = npt.NDArray[np.int64]


class EpochPlan:
    """Order, windows and colours of one epoch.

    Args:
        spec: the two views.
        seed: the run's seed, any non-negative integer below 2^63.
        epoch: counted from 0.
        sizes: `[n, 2]` heights and widths in pixels, one row per sample.
        first: sample id of row 0. Rows are counted from 0 in the store; what is drawn for one
            follows from its id, so two stores with ids of their own share no numbers.
    """

    def __init__(
        self, spec: AugmentSpec, seed: int, epoch: int, sizes: npt.ArrayLike, first: int = 0
    ) -> None:
        self.spec, self.seed, self.epoch, self.first = spec, seed, epoch, first
        self.sizes = np.asarray(sizes)
        if self.sizes.ndim != 2 or self.sizes.shape[1] != 2:
            raise ValueError(f"sizes must be [n, 2] (height, width), got {self.sizes.shape}")
        if seed < 0 or epoch < 0:
            raise ValueError(f"seed and epoch must not be negative, got {seed} and {epoch}")
        self._order: Ids | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def order(self) -> Ids:
        """`[n]` rows in the order in which the epoch shows them: a permutation."""
        if self._order is None:
            keys = rng.order_keys(self._states(np.arange(len(self), dtype=np.int64)))
            self._order = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
        return self._order

    def windows(self, ids: npt.ArrayLike) -> Windows:
        """Crop windows `[n, 2, 4]` of the rows `ids`: top, left, height, width in pixels."""
        ids = self._checked(ids)
        states, sizes = self._states(ids), self.sizes[ids].astype(np.float64)
        return np.stack(
            [
                draw_windows(rng.Draws(states, number), view, sizes, self.spec.semantics)
                for number, view in enumerate(self.spec.views)
            ],
            axis=1,
        )

    def colours(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Photometric parameters `[n, 2, len(Colour)]`; columns as in `spec.Colour`."""
        states = self._states(self._checked(ids))
        out = np.zeros((len(states), 2, len(Colour)), dtype=np.float32)
        additive = self.spec.semantics == "deepmind"
        for view, s in enumerate(self.spec.views):
            draw, table = rng.Draws(states, view), out[:, view]
            table[:, Colour.FLIP] = draw(Slot.FLIP) < s.flip
            table[:, Colour.JITTER] = draw(Slot.JITTER) < s.jitter
            table[:, Colour.ORDER] = np.floor(draw(Slot.ORDER) * len(JITTER_ORDERS))
            table[:, Colour.BRIGHTNESS] = _around(draw(Slot.BRIGHTNESS), s.brightness, additive)
            table[:, Colour.CONTRAST] = _around(draw(Slot.CONTRAST), s.contrast, False)
            table[:, Colour.SATURATION] = _around(draw(Slot.SATURATION), s.saturation, False)
            table[:, Colour.HUE] = _around(draw(Slot.HUE), s.hue, True)
            table[:, Colour.GREY] = draw(Slot.GREY) < s.grey
            low, high = s.blur_sigma
            sigma = low + (high - low) * draw(Slot.SIGMA)
            table[:, Colour.SIGMA] = np.where(draw(Slot.BLUR) < s.blur, sigma, 0.0)
            table[:, Colour.SOLARIZE] = draw(Slot.SOLARIZE) < s.solarize
        return out

    def _states(self, ids: Ids) -> rng.U64:
        return rng.states(self.seed, self.epoch, self.first + ids)

    def _checked(self, ids: npt.ArrayLike) -> Ids:
        ids = np.asarray(ids, dtype=np.int64)
        if ids.ndim != 1 or (len(ids) and (ids.min() < 0 or ids.max() >= len(self))):
            raise ValueError(f"ids must be a 1-d array of rows in [0, {len(self)})")
        return ids


def _around(uniform: F64, strength: float, additive: bool) -> F64:
    """Uniform in ±strength, or in 1 ± strength (not below 0) for a factor."""
    low, high = (-strength, strength) if additive else (max(0.0, 1 - strength), 1 + strength)
    return low + (high - low) * uniform


@dataclass(frozen=True)
class Rows:
    """Some rows of the table: what a source has to cut, and how the views are coloured."""

    ids: Ids  # [b] rows of the store
    windows: npt.NDArray[np.int32]  # [b, views, 4] top, left, height, width
    colours: npt.NDArray[np.float32]  # [b, views, len(Colour)]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands that reads one part of the data; see `pipelines.parts`."""

    first: int  # sample id of its part's row 0
    images: int  # of all parts together: an epoch of the run
    rank: int  # among those that read its part
    ranks: int  # that read its part


class RowStream:
    """The rows of every training step: one epoch's table after the other, without a gap.

    Step s takes positions [s * batch_size, (s + 1) * batch_size) of the endless sequence
    "order of epoch 0, order of epoch 1, ...", as the authors' input does. So no image is dropped at
    an epoch's end, and E epochs of n images are exactly E * n // batch_size steps. A step that runs
    over an epoch's end belongs to the epoch in which it starts.

    The `batch_size` rows are cut into world_size * accumulate consecutive micro-batches; rank r
    takes those from r * accumulate on. So 2 ranks and 1 rank accumulating twice see the same
    micro-batches, and the global sequence is the same for every number of ranks.

    With a `place` the data is one of several parts. The ranks of a part take as many of a step's
    rows as they are of all ranks, from that part's own endless sequence; an epoch of the run has
    passed when as many rows as all parts have images have.
    """

    def __init__(
        self,
        spec: AugmentSpec,
        *,
        seed: int,
        sizes: npt.ArrayLike,
        batch_size: int,  # global: images of one optimizer step over all ranks
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        place: Place | None = None,  # None: every rank reads the same images
    ) -> None:
        self.sizes = np.asarray(sizes)
        if batch_size < 1 or batch_size % (world_size * accumulate):
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of ranks x accumulate = "
                f"{world_size} x {accumulate}"
            )
        self.place = place or Place(first=0, images=len(self.sizes), rank=rank, ranks=world_size)
        self._share = batch_size // world_size * self.place.ranks  # rows of a step that are ours
        if self._share > len(self.sizes):
            raise too_few_images(batch_size, len(self.sizes), shares=world_size * accumulate)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")
        self.spec, self.seed, self.batch_size, self.accumulate = spec, seed, batch_size, accumulate
        self.rank, self.world_size = rank, world_size
        self._plans: dict[int, EpochPlan] = {}

    @property
    def micro_batch(self) -> int:
        """Images of one forward pass on one rank."""
        return self.batch_size // (self.world_size * self.accumulate)

    @property
    def images_per_epoch(self) -> int:
        """Rows that pass in an epoch of the run, over all ranks."""
        return self.place.images

    def steps(self, epoch: int) -> range:
        """Global step numbers that start in `epoch`."""
        n, b = self.images_per_epoch, self.batch_size
        return range(-(-epoch * n // b), -(-(epoch + 1) * n // b))

    def epoch_of(self, step: int) -> int:
        """The epoch in which `step` starts."""
        return step * self.batch_size // self.images_per_epoch

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of one epoch; the newest two are kept, as a step can touch two."""
        if epoch not in self._plans:
            while len(self._plans) >= 2:
                del self._plans[min(self._plans)]
            self._plans[epoch] = EpochPlan(
                self.spec, self.seed, epoch, self.sizes, self.place.first
            )
        return self._plans[epoch]

    def spans(self, step: int, micro: int = 0) -> Iterator[tuple[EpochPlan, Ids]]:
        """Which rows `rows` gives, with the plan of the epoch that each run of them is from.

        An epoch is one of the store: where the data is a part, not one of the run.
        """
        place = self.place
        position = step * self._share
        position += (place.rank * self.accumulate + micro) * self.micro_batch
        end = position + self.micro_batch
        while position < end:
            epoch, offset = divmod(position, len(self.sizes))
            plan = self.plan(epoch)
            ids = plan.order[offset : offset + end - position]
            yield plan, ids
            position += len(ids)

    def rows(self, step: int, micro: int = 0) -> Rows:
        """The rows of this rank's micro-batch `micro` of the global step `step`."""
        spans = list(self.spans(step, micro))
        return Rows(
            np.concatenate([ids for _, ids in spans]),
            np.concatenate([plan.windows(ids) for plan, ids in spans]),
            np.concatenate([plan.colours(ids) for plan, ids in spans]),
        )


def too_few_images(batch_size: int, images: int, *, shares: int, least: int = 1) -> DataError:
    """What to say of a batch that is larger than the data set.

    Args:
        shares: ranks x accumulate, of which a batch is a multiple.
        least: images that a batch must have anyway.
    """
    smallest = -(-least // shares) * shares
    if smallest > images:
        fewer = ", or start fewer processes" if shares > 1 else ""
        mend = f"add images: {smallest} is the smallest batch here{fewer}"
    else:
        fits = max(smallest, images // 2 // shares * shares)
        mend = f"use --batch-size {fits} or less, or more images"
    return DataError(
        f"batch_size {batch_size} is larger than the data set ({images} "
        f"{'image' if images == 1 else 'images'}): {mend}"
    )


def total_steps(epochs: int, samples: int, batch_size: int) -> int:
    """Optimizer steps of a run: epochs * samples // batch_size, as the authors count."""
    return epochs * samples // batch_size
