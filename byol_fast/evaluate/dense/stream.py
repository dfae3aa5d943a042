"""What each step shows, as a pure function of (seed, step): nothing to save, nothing to restore."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipelines import rng


class Order:
    """Step s shows places [s·B, (s+1)·B) of the permutations of all images, one after the other."""

    def __init__(self, images: int, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed

    def rows(self, step: int) -> list[tuple[int, int]]:
        """`(image, place)` of the step's batch; a place never comes again."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [(self._image(place), place) for place in places]

    def _image(self, place: int) -> int:
        epoch, position = divmod(place, self.images)
        return int(_permutation(self.images, self.seed, epoch)[position])


def generator(seed: int, place: int) -> np.random.Generator:
    """The random numbers that augment the image shown at `place`."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, place], np.uint64)))


def step_seed(seed: int, step: int) -> int:
    """For torch's generator in one step: the heads draw samples and drop activations."""
    state = rng.order_keys(rng.states(seed, step, np.array([-1], np.int64)))
    return int(state[0] >> np.uint64(1))


@lru_cache(maxsize=4)
def _permutation(images: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    states = rng.states(seed, epoch, np.arange(images, dtype=np.int64))
    return np.argsort(rng.order_keys(states), kind="stable")
