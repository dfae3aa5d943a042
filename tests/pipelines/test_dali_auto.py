"""`auto` in the DALI source: changing decoders in mid-run changes nothing else.

The candidates here are all libjpeg-turbo, which takes no notice of its share of JPEG engines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pipelines.sources import dali_available
from pipelines.sources.dali_decode import PART, PARTS, WARMUP, Decoder
from tests.pipelines.fake_store import FakeStore, encoded, picture, rows_of

pytestmark = [
    pytest.mark.dali,
    pytest.mark.skipif(not dali_available(), reason="NVIDIA DALI is not installed"),
]
ALL, HALF, CPU = (Decoder("cpu", share) for share in (1.0, 0.5, 0.0))
TURN = WARMUP + PART * PARTS


class Steps:
    """A clock that goes on by what the decoder in turn costs."""

    def __init__(self, device: torch.device) -> None:
        self.costs: dict[Decoder, float] = {}
        self.trial: Any = None
        self.now = 0.0

    def mark(self) -> float:
        self.now += self.costs[self.trial.decoder]
        return self.now

    def seconds(self, start: float, end: float) -> float | None:
        return end - start


class Built:
    """The pipelines that a source builds, and how they are made to fail."""

    def __init__(self) -> None:
        self.decoders: list[Decoder | None] = []
        self.alive = self.most = 0
        self.building: Callable[[Decoder], None] = lambda decoder: None
        self.taking: Callable[[Decoder, Any], None] = lambda decoder, images: None


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    from pipelines.sources import dali_source

    noted = Built()

    class Graph(dali_source.DaliGraph):
        def __init__(self, **options: Any) -> None:
            noted.building(options["decoder"])
            super().__init__(**options)
            noted.decoders.append(self.decoder)
            noted.alive += 1
            noted.most = max(noted.most, noted.alive)

        def submit(self, images: Any, windows: Any) -> None:
            super().submit(images, windows)
            noted.taking(self.decoder, images)

        def close(self) -> None:
            super().close()
            noted.alive -= 1

    monkeypatch.setattr(dali_source, "DaliGraph", Graph)
    return noted


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A source whose `auto` has candidates at given costs, closed after the test."""
    from pipelines.sources import dali_source

    sources: list[Any] = []

    def made(store: FakeStore, costs: dict[Decoder, float], **options: Any) -> Any:
        monkeypatch.setattr(dali_source, "decoders", lambda decode, device: tuple(costs))
        monkeypatch.setattr(dali_source, "StreamClock", Steps)
        source = dali_source.DaliSource(
            store, image_size=16, device="cpu", threads=1, decode="auto", **options
        )
        clock = source._trial._clock
        clock.costs, clock.trial = costs, source._trial
        sources.append(source)
        return source

    yield made
    for source in sources:
        source.close()


@pytest.fixture(scope="module")
def store() -> FakeStore:
    sizes = [(20, 30), (31, 17), (24, 24), (16, 40)]
    return FakeStore.of_jpegs(sizes)


def batches(number: int) -> list[list[int]]:
    return [[i % 4, (i + 1) % 4] for i in range(number)]


def only(store: FakeStore, rows: Any, make: Callable[..., Any]) -> list[torch.Tensor]:
    return list(make(store, {CPU: 1.0}).crops(rows))


def test_trying_changes_no_row_and_no_order(
    store: FakeStore, make: Callable[..., Any], built: Built, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(store, batches(3 * TURN + 20), 16)
    expected = only(store, rows, make)
    built.decoders.clear()
    source = make(store, {ALL: 2.0, HALF: 1.0, CPU: 3.0})
    pulled, reads = 0, store.reads

    def feed() -> Iterator[Any]:
        nonlocal pulled
        for batch in rows:
            pulled += 1
            yield batch

    with caplog.at_level(logging.INFO):
        for number, crops in enumerate(source.crops(feed())):
            assert torch.equal(crops, expected[number])
            assert pulled == min(number + 4, len(rows))  # no further ahead than otherwise
    assert number + 1 == len(rows)
    assert store.reads - reads == 2 * len(rows)  # every image of the run, once
    assert built.decoders == [ALL, HALF, CPU, HALF]
    assert built.most <= 3  # the source of `only` holds one
    assert sum("DALI decodes with" in r.getMessage() for r in caplog.records) == 1


def test_the_choice_holds_for_later_epochs(
    store: FakeStore, make: Callable[..., Any], built: Built
) -> None:
    source = make(store, {ALL: 2.0, CPU: 1.0})
    for _ in range(6):
        list(source.crops(rows_of(store, batches(TURN), 16)))
    assert built.decoders == [ALL, CPU] and built.alive == 1
    source.close()
    assert built.alive == 0


def test_a_consumer_that_stops_in_a_turn_leaves_nothing_behind(
    store: FakeStore, make: Callable[..., Any], built: Built
) -> None:
    rows = rows_of(store, batches(3 * TURN), 16)
    expected = only(store, rows, make)
    before = built.alive  # the source of `only` keeps one
    built.decoders.clear()
    source = make(store, {ALL: 2.0, CPU: 1.0})
    for number, _ in enumerate(source.crops(rows)):
        if number == TURN + 3:  # what the first had begun is out
            break
    # The second's graph is kept if no batch had reached it yet, which is a matter of time.
    assert built.decoders == [ALL, CPU] and built.alive - before <= 1
    for crops, wanted in zip(source.crops(rows), expected, strict=True):
        assert torch.equal(crops, wanted)  # none of the batches that nobody took
    source.close()
    assert built.alive == before


def test_a_decoder_that_cannot_be_built_is_passed_over(
    store: FakeStore, make: Callable[..., Any], built: Built, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(store, batches(TURN), 16)
    expected = only(store, rows, make)

    def building(decoder: Decoder) -> None:
        if decoder != CPU:
            raise RuntimeError(f"no {decoder.hardware}")

    built.building = building
    source = make(store, {ALL: 1.0, HALF: 1.0, CPU: 1.0})
    for got, wanted in zip(source.crops(rows), expected, strict=True):
        assert torch.equal(got, wanted)
    messages = [r.getMessage() for r in caplog.records if "cannot decode" in r.getMessage()]
    assert messages == ["DALI cannot decode with cpu and goes on with cpu: no 1.0"]

    built.building = lambda decoder: (_ for _ in ()).throw(RuntimeError("no memory"))
    with pytest.raises(RuntimeError, match="no memory"):
        list(make(store, {CPU: 1.0}).crops(rows))


def test_a_decoder_that_keeps_failing_is_left(
    store: FakeStore, make: Callable[..., Any], built: Built, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(store, batches(TURN), 16)
    expected = only(store, rows, make)

    def taking(decoder: Decoder, images: Any) -> None:
        if decoder != CPU and any(image[0] == 0xFF for image in images):
            raise RuntimeError("engine failure")  # on JPEGs; what we have decoded passes

    built.taking = taking
    source = make(store, {ALL: 1.0, CPU: 1.0})
    for got, wanted in zip(source.crops(rows), expected, strict=True):
        assert torch.equal(got, wanted)
    assert source.bad == {}
    assert sum("goes on with cpu: engine failure" in r.getMessage() for r in caplog.records) == 1


def test_a_corrupt_image_is_not_the_decoders_fault(
    make: Callable[..., Any], built: Built, caplog: pytest.LogCaptureFixture
) -> None:
    jpegs = [encoded(picture(24, 24, seed=i)) for i in range(4)]
    frame = jpegs[2].index(b"\xff\xc0")
    jpegs[2] = jpegs[2][: frame + 12] + b"\x03" + jpegs[2][frame + 13 :]
    store = FakeStore(jpegs, sizes=[(24, 24)] * 4)
    source = make(store, {ALL: 1.0, CPU: 2.0})
    crops = list(source.crops(rows_of(store, batches(2 * TURN + 10), 16)))
    assert len(crops) == 2 * TURN + 10 and list(source.bad) == [2]
    assert source._trial.decoder == ALL
    assert not any("cannot decode with" in r.getMessage() for r in caplog.records)


def test_the_engines_are_shown_a_whole_batch_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or they would get no more than a share of a smaller one, batch after batch."""
    from pipelines.sources.dali_graph import DaliGraph

    fed, feed = [], DaliGraph._feed

    def noted(self: DaliGraph, images: Any, windows: Any) -> None:
        fed.append(len(images))
        feed(self, images, windows)

    monkeypatch.setattr(DaliGraph, "_feed", noted)
    for decoder in (ALL, CPU, None):
        options: Any = {"size": 16, "threads": 1, "depth": 2, "device": torch.device("cpu")}
        DaliGraph(batch_size=5, views=2, decoder=decoder, **options).close()
    assert fed == [5, 5, 1, 1, 1, 1]
