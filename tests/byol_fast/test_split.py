"""A batch shared out over ranks, and again over other ranks within the memory that is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from byol_fast.session import split
from byol_fast.session.split import Split, share_out


def parts(it: Split) -> tuple[int, int, int]:
    return it.ranks, it.micro_batch, it.accumulate


def test_a_first_session_takes_what_was_asked() -> None:
    assert parts(share_out(4096, 8)) == (8, 512, 1)
    assert parts(share_out(4096, 8, asked=4)) == (8, 128, 4)
    assert share_out(4096, 8, asked=4).bn_batch == 1024
    assert share_out(4096, 8, together=1).bn_batch == 512


@pytest.mark.parametrize("asked", [None, 1])
def test_fewer_ranks_accumulate_and_more_ranks_stop_to(asked: int | None) -> None:
    first = share_out(4096, 8, asked=asked)
    four = share_out(4096, 4, asked=asked, before=first)
    one = share_out(4096, 1, asked=asked, before=four)
    sixteen = share_out(4096, 16, asked=asked, before=one)
    again = share_out(4096, 8, asked=asked, before=sixteen)
    assert parts(four) == (4, 512, 2)
    assert parts(one) == (1, 512, 8)
    assert parts(sixteen) == (16, 256, 1)
    assert again == first  # the same ranks, the same step: bitwise, whatever lay between


@pytest.mark.parametrize(
    ("batch", "asked", "ranks"),
    [
        (batch, asked, ranks)
        for batch in (48, 60, 96, 4096)
        for asked in (1, 2, 3)
        for ranks in range(1, 9)
        if batch % asked == 0 and batch % ranks == 0
    ],
)
def test_no_micro_batch_is_larger_than_the_first(batch: int, asked: int, ranks: int) -> None:
    first = share_out(batch, 1, asked=asked)
    new = share_out(batch, ranks, asked=asked, before=first)
    assert new.micro_batch <= first.micro_batch == new.largest
    assert new.ranks * new.micro_batch * new.accumulate == batch
    fewer = [n for n in range(1, new.accumulate) if batch % (ranks * n) == 0]
    assert all(batch // (ranks * n) > first.micro_batch for n in fewer)  # as few as possible


def test_another_number_by_hand_wins_and_is_then_the_bound() -> None:
    first = share_out(4096, 8)
    by_hand = share_out(4096, 4, asked=1, before=first)
    assert parts(by_hand) == (4, 1024, 1)
    assert parts(share_out(4096, 2, asked=1, before=by_hand)) == (2, 1024, 2)
    assert parts(share_out(4096, 8, asked=2, before=first)) == (8, 256, 2)


def test_a_change_is_told_with_what_it_does_to_batchnorm() -> None:
    first = share_out(4096, 8)
    told = share_out(4096, 4, before=first).change(first)
    assert "8 × 512 × 1 → 4 × 512 × 2" in told
    assert "statistics are over 2048 images instead of 4096" in told
    assert "--input.accumulate 1 keeps them" in told
    alone = share_out(4096, 8, together=1)
    assert "statistics" not in share_out(4096, 4, together=1, before=alone).change(alone)
    assert share_out(4096, 8, before=first).change(first) == "" == first.change(None)


def test_ranks_that_do_not_divide_the_batch_are_refused_with_a_mend() -> None:
    first = share_out(4096, 8)
    with pytest.raises(ValueError, match="over 6 ranks: go on with 4, or another number"):
        share_out(4096, 6, before=first)
    before = share_out(8, 4, together=1)
    with pytest.raises(ValueError, match="one image"):
        share_out(8, 8, together=1, before=before)
    assert share_out(8, 8, together=1, batch_norm=False, before=before).micro_batch == 1


@pytest.mark.parametrize(("batch", "ranks"), [(48, 5), (48, 7), (60, 8), (4096, 3)])
def test_ranks_that_leave_a_remainder_are_refused_in_a_first_session_too(
    batch: int, ranks: int
) -> None:
    with pytest.raises(ValueError, match=f"over {ranks} ranks|{ranks} ranks"):
        share_out(batch, ranks)


def test_it_is_read_back_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    first = share_out(4096, 8, asked=2)
    (tmp_path / split.FILE).write_text(first.to_json())
    assert split.read(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.pt").touch()
    assert split.read(tmp_path) == first
    (tmp_path / split.FILE).write_text('{"ranks": 8}')
    with pytest.raises(ValueError, match=r"ranks\.json cannot be read .*: remove it"):
        split.read(tmp_path)
