"""What every source promises about iterating, whatever it reads with. Each check closes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipelines.plan import Rows


def may_stop_and_overlap(source: Any, rows: list[Rows]) -> None:
    expected = list(source.crops(rows))
    for crops in source.crops(rows):
        assert torch.equal(crops, expected[0])
        break
    for a, b, wanted in zip(source.crops(rows), source.crops(rows), expected, strict=True):
        assert torch.equal(a, wanted) and torch.equal(b, wanted)
    source.close()


def closing_ends_an_iteration(source: Any, rows: list[Rows]) -> None:
    iterator = source.crops(rows)
    next(iterator)
    source.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(iterator)


def pulls_rows_no_further_than(source: Any, rows: list[Rows], ahead: int) -> None:
    pulled = 0

    def feed() -> Iterator[Rows]:
        nonlocal pulled
        for batch in rows:
            pulled += 1
            yield batch

    for number, _ in enumerate(source.crops(feed()), 1):
        assert pulled == min(number + ahead, len(rows))
    source.close()
