"""Which of its decoders DALI uses: what users call them, and how `auto` finds the fastest."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, Protocol

import torch

log = logging.getLogger(__name__)

WARMUP = 4  # batches of a turn that are not timed: the first ones wait for the pipeline to fill
PART, PARTS = 6, 3  # batches timed together, and how often: the median overlooks a pause
CLOSE = 0.98  # of the best rate: no slower than it, as far as so few batches can tell
STRIKES = 3  # failures on sound images, with no success between, that `auto` puts up with


@dataclass(frozen=True)
class Decoder:
    """libjpeg-turbo on the CPU ("cpu"), or nvJPEG on the GPU ("mixed").

    `hardware` is the share in [0, 1] of a full batch that the GPU's JPEG engines get; CUDA cores
    and the CPU decode the rest together. Without such engines the share means nothing. Which image
    meets which of them is chance: pixels repeat exactly on the CPU and with a share of 0.
    """

    device: Literal["cpu", "mixed"]
    hardware: float = 0.0

    def __str__(self) -> str:
        return "cpu" if self.device == "cpu" else f"mixed:{self.hardware:g}"

    @property
    def needs(self) -> int:
        """0 the CPU alone, 1 nvJPEG, 2 the JPEG engines too."""
        return (self.device == "mixed") + (self.hardware > 0)


CPU = Decoder("cpu")
MIXED = Decoder("mixed", 0.65)  # DALI's default, the best split NVIDIA found on an A100
# The likeliest first: an epoch too short for a comparison stays with it.
CANDIDATES = (MIXED, Decoder("mixed", 0.9), Decoder("mixed", 1.0), Decoder("mixed"), CPU)


def decoders(decode: str, device: torch.device) -> tuple[Decoder, ...]:
    """What a user's word stands for: one decoder, or the candidates of "auto".

    Args:
        decode: "auto", "cpu", "mixed", or "mixed:0.8" with a share of the JPEG engines.
        device: where the crops are wanted; without a GPU "auto" is "cpu".
    """
    kind, colon, share = decode.partition(":")
    if decode == "auto":
        return CANDIDATES if device.type == "cuda" else (CPU,)
    if decode == "cpu":
        return (CPU,)
    if kind != "mixed" or (colon and not _is_share(share)):
        raise ValueError(
            "decode is auto, cpu, mixed, or mixed with a share of the GPU's JPEG engines between "
            f"0 and 1, as in mixed:0.65; got {decode!r}"
        )
    if device.type != "cuda":
        raise ValueError(f"decode {decode!r} is on a GPU: use 'cpu' or 'auto' without one")
    return (Decoder("mixed", float(share)) if colon else MIXED,)


def _is_share(text: str) -> bool:
    try:
        return 0.0 <= float(text) <= 1.0
    except ValueError:
        return False


class Clock(Protocol):
    """Tells how long the consumer took from one moment to another."""

    def mark(self) -> Any:
        """This moment."""
        ...

    def seconds(self, start: Any, end: Any) -> float | None:
        """Between two marks; None while the later one is yet to come."""
        ...


class StreamClock:
    """The time of the consumer's stream on a GPU, which may be steps behind its thread; else ours.

    Marks are events: nothing waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event | float:
        """When all that the stream was given so far is done."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: Any, end: Any) -> float | None:
        """See `Clock.seconds`."""
        if isinstance(start, float):
            return float(end - start)
        passed = start.query() and end.query()
        return float(start.elapsed_time(end)) / 1000 if passed else None


class Trial:
    """Gives each candidate a turn at the batches of the run itself, and stays with the fastest.

    Every batch is decoded once, by the candidate whose turn it is, and used: a turn is WARMUP +
    PART * PARTS batches at the speed of everything together, the training included. Turns are
    counted in batches, not in seconds, so ranks that wait for each other change together. Where
    the training is slower than every decoder they come out alike, and the first is kept.

    Args:
        candidates: by preference; a single one is simply used.
        clock: of the consumer.
    """

    def __init__(self, candidates: Sequence[Decoder], clock: Clock) -> None:
        self._candidates = list(candidates)
        self._clock = clock
        self._parts: dict[Decoder, list[tuple[Any, Any, int]]] = {c: [] for c in candidates}
        self._strikes: Counter[Decoder] = Counter()
        self._best = self._candidates[0] if len(candidates) == 1 else None
        self._seen = self._images = 0  # of this turn, and since its last mark
        self._start: Any = None

    @property
    def decoder(self) -> Decoder:
        """Of the next batch that goes to DALI."""
        if self._best is not None:
            return self._best
        todo = (c for c in self._candidates if len(self._parts[c]) < PARTS)
        return next(todo, self._candidates[-1])  # the last one until its marks have come

    def pause(self) -> None:
        """Something else takes time now, such as an evaluation: the part begun does not count."""
        self._begin()

    def taken(self, decoder: Decoder, images: int) -> None:
        """A batch of `decoder` became the consumer's."""
        self._strikes.pop(decoder, None)
        if self._best is not None:
            return
        parts = self._parts[decoder]
        if decoder == self.decoder and len(parts) < PARTS:  # not left over from the turn before
            self._seen, self._images = self._seen + 1, self._images + images
            if self._seen >= WARMUP and (self._seen - WARMUP) % PART == 0:
                now = self._clock.mark()
                if self._seen > WARMUP:
                    parts.append((self._start, now, self._images))
                self._start, self._images = now, 0
            if len(parts) == PARTS:
                self._begin()
        self._decide()

    def failed(self, decoder: Decoder, error: Exception, *, certain: bool) -> bool:
        """`decoder` failed on sound images; `certain`: on pixels too, so it cannot do anything.

        Returns:
            Whether there is a way to go on.
        """
        self._strikes[decoder] += 1
        self._begin()
        if certain or self._strikes[decoder] > STRIKES:
            return self.drop(decoder, error) or not certain
        return True

    def drop(self, decoder: Decoder, error: Exception) -> bool:
        """Goes on without `decoder` and all that need as much of the GPU; False if none is left."""
        left = [c for c in self._candidates if c.needs < decoder.needs]
        if not left:
            return False
        self._candidates = left
        self._best = left[0] if len(left) == 1 else None
        self._begin()
        self._decide()  # what was measured before counts
        log.warning(
            "DALI cannot decode with %s and goes on with %s: %s", decoder, self.decoder, error
        )
        return True

    def _begin(self) -> None:
        self._seen, self._images, self._start = 0, 0, None

    def _decide(self) -> None:
        if self._best is not None:
            return
        rates: dict[Decoder, float] = {}
        for candidate in self._candidates:
            times = [self._clock.seconds(start, end) for start, end, _ in self._parts[candidate]]
            known = [t for t in times if t is not None]
            if len(known) < PARTS:
                return
            counts = [images for _, _, images in self._parts[candidate]]
            rates[candidate] = median(n / t for n, t in zip(counts, known, strict=True))
        fastest = max(rates.values())
        self._best = next(c for c, rate in rates.items() if rate >= CLOSE * fastest)
        listed = ", ".join(f"{c} {rate:.0f}" for c, rate in rates.items())
        log.info("DALI decodes with %s; images/s of the whole run: %s", self._best, listed)
