"""Data in parts: rows disjoint and complete, the same on other ranks, draws of their own."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from pipelines.errors import DataError
from pipelines.parts import Held, Parts, changes
from pipelines.plan import EpochPlan, RowStream
from pipelines.spec import AugmentSpec
from pipelines.stores import open_store

SPEC = AugmentSpec(image_size=32)
IMAGES = {"aa": 24, "bb": 40, "cc": 16}
SIZES = {
    name: np.random.default_rng(n).integers(1, 600, (n, 2)) for name, n in IMAGES.items()
}  # by fingerprint

Row = tuple[str, int, bytes, bytes]  # part, row, windows, colours


def parts_of(names: Sequence[str]) -> Parts:
    """Parts as ranks find them, each rank the part of its name."""
    return Parts(
        [
            Held(fingerprint=name, images=IMAGES[name], classes="no classes", host=f"host-{name}")
            for name in names
        ]
    )


def streams(names: Sequence[str], batch: int, accumulate: int = 1) -> list[RowStream]:
    parts = parts_of(names)
    return [
        RowStream(
            SPEC,
            seed=3,
            sizes=SIZES[name],
            batch_size=batch,
            accumulate=accumulate,
            rank=rank,
            world_size=len(names),
            place=parts.place(rank),
        )
        for rank, name in enumerate(names)
    ]


def step_rows(names: Sequence[str], batch: int, step: int, accumulate: int = 1) -> list[Row]:
    """What all ranks see of each part in a step, in the part's order."""
    seen: dict[str, list[Row]] = {name: [] for name in sorted(set(names))}
    for name, stream in zip(names, streams(names, batch, accumulate), strict=True):
        for micro in range(accumulate):
            rows = stream.rows(step, micro)
            for i, row in enumerate(rows.ids.tolist()):
                seen[name].append((name, row, rows.windows[i].tobytes(), rows.colours[i].tobytes()))
    return [row for name in seen for row in seen[name]]


@pytest.mark.parametrize(
    ("names", "accumulate"),
    [
        (("aa", "bb"), 1),
        (("bb", "aa", "aa", "bb"), 2),
        (("aa", "bb", "bb"), 1),
        (("cc", "aa", "bb", "bb", "aa", "bb", "cc", "bb"), 3),
    ],
)
def test_rows_are_disjoint_and_complete_in_every_epoch_of_a_part(
    names: tuple[str, ...], accumulate: int
) -> None:
    batch = len(names) * accumulate
    ranks = streams(names, batch, accumulate)
    for name in set(names):
        share = batch * names.count(name) // len(names)
        steps = 3 * IMAGES[name] // share + 1
        seen = [
            row
            for step in range(steps)
            for stream, each in zip(ranks, names, strict=True)
            if each == name
            for micro in range(accumulate)
            for row in stream.rows(step, micro).ids.tolist()
        ]
        assert len(seen) == steps * share
        for epoch in range(3):
            part = seen[epoch * IMAGES[name] : (epoch + 1) * IMAGES[name]]
            assert sorted(part) == list(range(IMAGES[name])), (name, epoch)


@pytest.mark.parametrize(
    ("other", "accumulate"),
    [
        (("aa", "bb"), 2),  # 2+2 → 1+1 ranks
        (("bb", "aa"), 1),  # and the nodes in another order
        (("aa", "bb", "aa", "bb"), 1),
        (("bb", "bb", "bb", "aa", "aa", "aa"), 2),
    ],
)
def test_rows_do_not_depend_on_the_ranks_of_the_same_shares(
    other: tuple[str, ...], accumulate: int
) -> None:
    for step in range(9):  # 12 rows of each part: over its epochs' ends
        want = step_rows(("aa", "aa", "bb", "bb"), 24, step)
        assert step_rows(other, 24, step, accumulate) == want
        assert [row[0] for row in want] == ["aa"] * 12 + ["bb"] * 12


def test_one_part_is_the_ordinary_run() -> None:
    places = streams(("aa", "aa", "aa"), 12, 2)
    for rank, stream in enumerate(places):
        ordinary = RowStream(
            SPEC,
            seed=3,
            sizes=SIZES["aa"],
            batch_size=12,
            accumulate=2,
            rank=rank,
            world_size=3,
        )
        assert stream.images_per_epoch == ordinary.images_per_epoch == 24
        for step in range(6):
            for micro in (0, 1):
                a, b = stream.rows(step, micro), ordinary.rows(step, micro)
                np.testing.assert_array_equal(a.ids, b.ids)
                np.testing.assert_array_equal(a.windows, b.windows)
                np.testing.assert_array_equal(a.colours, b.colours)


def test_an_epoch_of_the_run_is_the_images_of_all_parts() -> None:
    for stream in streams(("cc", "aa", "bb"), 6):
        assert stream.images_per_epoch == 80
        assert list(stream.steps(0)) == list(range(14)) and stream.epoch_of(13) == 0
        assert stream.epoch_of(14) == 1


def test_parts_share_no_draws() -> None:
    """Row i of one part is another sample than row i of the next, in order, windows and colours."""
    n, sizes = 500, np.full((500, 2), 300)
    a, b = (EpochPlan(SPEC, 3, 0, sizes, first) for first in (0, n))
    rows = np.arange(n)
    assert (a.order == b.order).sum() < 10  # 1 in expectation
    assert (a.windows(rows) == b.windows(rows)).all(axis=(1, 2)).sum() == 0
    assert (a.colours(rows) == b.colours(rows)).all(axis=(1, 2)).sum() == 0
    both = EpochPlan(SPEC, 3, 0, np.concatenate([sizes, sizes]))  # as if nobody had split them
    np.testing.assert_array_equal(both.windows(rows + n), b.windows(rows))
    np.testing.assert_array_equal(both.colours(rows + n), b.colours(rows))
    everything = EpochPlan(SPEC, 3, 0, np.concatenate([SIZES["aa"], SIZES["bb"]]))
    got = streams(("aa", "bb"), 8)[1].rows(2)
    np.testing.assert_array_equal(got.windows, everything.windows(got.ids + IMAGES["aa"]))
    np.testing.assert_array_equal(got.colours, everything.colours(got.ids + IMAGES["aa"]))


def test_parts_stand_by_fingerprint_with_ids_after_each_other() -> None:
    for names in (("aa", "bb", "cc", "bb"), ("bb", "cc", "bb", "aa")):
        parts = parts_of(names)
        assert [(p.fingerprint, p.first, p.share) for p in parts.parts] == [
            ("aa", 0, Fraction(1, 4)),
            ("bb", 24, Fraction(1, 2)),
            ("cc", 64, Fraction(1, 4)),
        ]
        assert parts.images == 80 and parts.of_rank(1).fingerprint == names[1]
        assert parts.identity() == parts_of(("cc", "bb", "bb", "aa")).identity()


def test_the_log_says_who_reads_what_and_how_often() -> None:
    lines = parts_of(("bb", "aa", "bb", "bb")).lines(16)
    assert lines[0] == "data: 64 images in 2 parts, each shuffled within itself"
    assert lines[1] == (
        "part 1 of 2: aa (24 images); rank 1 on host-aa; 4 rows (1/4) of each step, so an image is "
        "shown 0.667 times an epoch"
    )
    assert "ranks 0, 2-3 on host-bb; 12 rows (3/4)" in lines[2] and "1.2 times" in lines[2]
    assert parts_of(("aa", "aa")).lines(16) == [
        "data: the same 24 images on every rank, so there is one part"
    ]


def test_images_shown_more_often_than_others_are_warned_of() -> None:
    uneven = parts_of(("aa", "bb"))
    shown = [uneven.shown(part) for part in uneven.parts]
    assert shown == pytest.approx([64 / 2 / 24, 64 / 2 / 40])
    text = uneven.unevenness()
    assert "those of part aa (24 images) 1.33 times" in text and "bb (40 images) 0.8 times" in text
    assert parts_of(("aa", "aa")).unevenness() == ""

    def two(images: int) -> Parts:
        a, b = (
            Held(fingerprint=f, images=n, classes="", host="")
            for f, n in (("a", 100), ("b", images))
        )
        return Parts([a, b])

    assert two(105).unevenness() == "" and two(106).unevenness() != ""


def test_a_part_smaller_than_its_rows_of_a_step_is_refused() -> None:
    parts = parts_of(("cc", "bb"))
    parts.refuse_small(32)
    with pytest.raises(DataError, match=r"part cc \(16 images\) is smaller than the 17 rows"):
        parts.refuse_small(34)
    with pytest.raises(DataError, match="batch_size 34"):
        streams(("cc", "bb"), 34)


def test_what_has_changed_between_two_sessions() -> None:
    before = parts_of(("aa", "bb", "bb")).identity()
    assert changes(before, parts_of(("bb", "aa", "bb", "aa", "bb", "bb")).identity()) == []
    share = changes(before, parts_of(("aa", "bb")).identity())
    assert [line.partition(": start")[0] for line in share] == [
        "data: part aa (24 images): 1/3 of each step → 1/2",
        "data: part bb (40 images): 2/3 of each step → 1/2",
    ]
    missing = changes(before, parts_of(("bb", "bb")).identity())
    assert "aa (24 images) is missing: start the node" in missing[0]
    changed = changes(before, parts_of(("cc", "bb", "bb")).identity())
    assert (
        len(changed) == 2
        and "aa (24 images) is missing" in changed[0]
        and "cc (16 images) is new" in changed[1]
    )
    one, other = (parts_of((name,)).identity() for name in ("aa", "bb"))
    assert changes(one, other) == ["data: 24 images (aa) → 40 images (bb)"]
    assert one == {"fingerprint": "aa", "images": 24}  # as an ordinary run's


def test_parts_know_whether_their_labels_mean_the_same() -> None:
    def held(*names: str, labels: int = 2) -> Held:
        images = np.random.default_rng(list(map(ord, "".join(names)))).integers(
            0, 255, (4, 8, 8, 3), dtype=np.uint8
        )
        store = open_store((images, np.arange(4) % labels))
        store.classes = names  # type: ignore[misc]
        return Held.of(store)

    assert Parts([held("cat", "dog"), held("cat", "dog")]).one_label_space
    for other in (held("dog", "cat"), held("cat", "dog", "emu"), held("cat"), held()):
        assert not Parts([held("cat", "dog"), other]).one_label_space
    assert "2 classes (cat … dog, " in held("cat", "dog").classes
