"""Data of which every node holds a part: who holds what, and which rows of a step that makes.

A part is what the ranks with one fingerprint share. Parts stand in the order of their fingerprints,
so neither the nodes' order nor the ranks' changes the rows; each is shuffled within itself.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from pipelines.errors import DataError
from pipelines.plan import Place
from pipelines.stores import Store

UNEVEN = 1.05  # how much more often some images may be shown before it is said


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one rank finds at the path."""

    fingerprint: str
    images: int
    classes: str  # equal where the names of the classes are
    host: str

    @classmethod
    def of(cls, store: Store) -> Held:
        """What `store` holds, on this machine."""
        return cls(
            fingerprint=store.fingerprint,
            images=len(store),
            classes=_class_list(store.classes),
            host=platform.node(),
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images that are shuffled among themselves, and the ranks that read them."""

    fingerprint: str
    images: int
    first: int  # sample id of its row 0: the images of the parts before it
    ranks: tuple[int, ...]
    share: Fraction  # of the rows of a step
    classes: str
    hosts: tuple[str, ...]

    def __str__(self) -> str:
        return _part(self.fingerprint, self.images)


class Parts:
    """All parts, by fingerprint. Data that is the same on every rank is one part.

    Args:
        held: what each rank has, by rank.
    """

    def __init__(self, held: Sequence[Held]) -> None:
        parts, first = list[Part](), 0
        for fingerprint in sorted({each.fingerprint for each in held}):
            ranks = tuple(r for r, each in enumerate(held) if each.fingerprint == fingerprint)
            one = held[ranks[0]]
            parts.append(
                Part(
                    fingerprint=fingerprint,
                    images=one.images,
                    first=first,
                    ranks=ranks,
                    share=Fraction(len(ranks), len(held)),
                    classes=one.classes,
                    hosts=tuple(dict.fromkeys(held[rank].host for rank in ranks)),
                )
            )
            first += one.images
        self.parts, self.images = tuple(parts), first

    def __len__(self) -> int:
        return len(self.parts)

    def of_rank(self, rank: int) -> Part:
        """The part that `rank` reads."""
        return next(part for part in self.parts if rank in part.ranks)

    def place(self, rank: int) -> Place:
        """Where `rank` stands, for its `RowStream`."""
        part = self.of_rank(rank)
        return Place(
            first=part.first,
            images=self.images,
            rank=part.ranks.index(rank),
            ranks=len(part.ranks),
        )

    @property
    def one_label_space(self) -> bool:
        """Whether label 7 is the same class in every part."""
        return len({part.classes for part in self.parts}) == 1

    def shown(self, part: Part) -> float:
        """How often an image of `part` is shown while as many rows pass as there are images."""
        return float(part.share * self.images / part.images)

    def refuse_small(self, batch_size: int) -> None:
        """A step takes no image twice from one epoch of a part.

        Raises:
            DataError: a part has fewer images than its rows of a step.
        """
        for part in self.parts:
            rows = int(part.share * batch_size)
            if rows > part.images:
                raise DataError(
                    f"part {part} is smaller than the {rows} rows that its "
                    f"{_counted(len(part.ranks), 'rank')} on {', '.join(part.hosts)} read of it in "
                    f"a step of {batch_size}: give it more images, or use a smaller --batch-size"
                )

    def lines(self, batch_size: int) -> list[str]:
        """What is where, for the log."""
        if len(self) == 1:
            return [f"data: the same {self.images} images on every rank, so there is one part"]
        return [
            f"data: {self.images} images in {len(self)} parts, each shuffled within itself",
            *(
                f"part {number} of {len(self)}: {part}; {_ranks(part.ranks)} on "
                f"{', '.join(part.hosts)}; {int(part.share * batch_size)} rows ({part.share}) of "
                f"each step, so an image is shown {self.shown(part):.3g} times an epoch"
                for number, part in enumerate(self.parts, 1)
            ),
        ]

    def unevenness(self) -> str:
        """A warning where some images are shown more often than others; empty where none is."""
        most, least = (f(self.parts, key=self.shown) for f in (max, min))
        if self.shown(most) <= UNEVEN * self.shown(least):
            return ""
        return (
            f"images are not shown equally often: those of part {most} {self.shown(most):.3g} "
            f"times an epoch, those of part {least} {self.shown(least):.3g} times. Give every "
            f"part as many images for each of its ranks"
        )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of its data; of one part, whatever it was named, the same."""
        if len(self) == 1:
            return {"fingerprint": self.parts[0].fingerprint, "images": self.images}
        digest = hashlib.sha256("".join(part.fingerprint for part in self.parts).encode())
        parts = [
            {"fingerprint": part.fingerprint, "images": part.images, "share": str(part.share)}
            for part in self.parts
        ]
        return {"fingerprint": digest.hexdigest(), "images": self.images, "parts": parts}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """How two `Parts.identity` differ, a line for each difference and how it is mended."""
    if before == after:
        return []
    if "parts" not in before and "parts" not in after:
        one, other = (
            f"{data['images']} images ({data['fingerprint'][:12]})" for data in (before, after)
        )
        return [f"data: {one} → {other}"]
    was, now = ({p["fingerprint"]: p for p in _listed(data)} for data in (before, after))
    lines = []
    for fingerprint in sorted(was.keys() | now.keys()):
        old, new = was.get(fingerprint), now.get(fingerprint)
        name = _part(fingerprint, (old or new or {})["images"])
        if new is None:
            lines.append(
                f"data: part {name} is missing: start the node that holds it, or put it back"
            )
        elif old is None:
            lines.append(f"data: part {name} is new: its node holds other images than before")
        elif old["share"] != new["share"]:
            lines.append(
                f"data: part {name}: {old['share']} of each step → {new['share']}: start as many "
                f"ranks for each part, in proportion, as before"
            )
    return lines


def _listed(data: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The parts of an identity; what is not in parts is one."""
    listed: Sequence[Mapping[str, Any]] = data.get("parts") or [{**data, "share": "1"}]
    return listed


def _part(fingerprint: str, images: int) -> str:
    return f"{fingerprint[:12]} ({images} images)"


def _class_list(names: Sequence[str]) -> str:
    """`4 classes (cat … zebra, 1f0c2d3e)`: short, and equal where all names are."""
    if not names:
        return "no classes"
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{_counted(len(names), 'class', 'classes')} ({names[0]} … {names[-1]}, {digest[:8]})"


def _counted(number: int, one: str, more: str = "") -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"


def _ranks(ranks: Sequence[int]) -> str:
    """`ranks 0-3, 8`."""
    starts = [ranks[0], *(b for a, b in pairwise(ranks) if b != a + 1)]
    ends = [*(a for a, b in pairwise(ranks) if b != a + 1), ranks[-1]]
    spans = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(spans)}"
