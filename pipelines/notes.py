"""Notes on data: what is left out or in doubt, counted, with the first names of each kind.

A note is one line. Indexes keep theirs, so that one that is used again repeats them, and every
command shows them through `tell`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipelines.scan import printable

if TYPE_CHECKING:
    from pipelines.stores import Store

log = logging.getLogger(__name__)

EXAMPLES = 3


class Tally:
    """Counts by kind, and the first names of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, kind: str, name: bytes | str) -> None:
        """One more of `kind`."""
        self.counts[kind] += 1
        if self.counts[kind] <= EXAMPLES:
            self.names.setdefault(kind, []).append(printable(name))

    def merge(self, other: Tally, below: bytes = b"") -> None:
        """Adds what another has counted; `below` goes before its names."""
        self.counts.update(other.counts)
        for kind, names in other.names.items():
            mine = self.names.setdefault(kind, [])
            mine += [printable(below) + name for name in names[: EXAMPLES - len(mine)]]

    def note(self, kind: str, what: str, hint: str = "") -> list[str]:
        """The note on `kind`, if there is any: `N WHAT (NAME, NAME, NAME, …): HINT`.

        Args:
            what: with the verdict first and `#` for the number, such as `left out: # files`; an `s`
                in brackets is kept for several.
        """
        count = self.counts[kind]
        return [note(count, what, self.names[kind], hint)] if count else []


def note(count: int, what: str, examples: Iterable[bytes | str] = (), hint: str = "") -> str:
    """One line; arguments as in `Tally.note`."""
    some = [printable(name) for name in examples][:EXAMPLES]
    text = what.replace("#", f"{count:,}", 1).replace("(s)", "" if count == 1 else "s")
    named = f" ({', '.join(some)}{', …' if count > len(some) else ''})" if some else ""
    return f"{text}{named}{': ' if hint else ''}{hint}"


def notes_of(store: Store) -> tuple[str, ...]:
    """The notes on a store's data; a store that has no `notes` has none to give."""
    return tuple(getattr(store, "notes", ()))


def tell(where: str, notes: Iterable[str]) -> None:
    """Logs the notes on the data at `where`, a warning each."""
    for each in notes:
        log.warning("%s: %s", printable(where), printable(each))
