"""Threads whose results come in order: none lost, few ahead, and no failure that waits."""

import threading
import time
from collections.abc import Iterator

import pytest

from pipelines.ordered import in_order


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    def late_first(item: int) -> int:
        time.sleep(0.002 * (item % 5 == 0))
        return item * item

    done = list(in_order(late_first, range(50), workers=workers, ahead=8))
    assert done == [item * item for item in range(50)]


def test_nothing_to_do() -> None:
    assert list(in_order(str, [], workers=2, ahead=4)) == []


def test_only_so_many_are_begun_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = in_order(lambda item: item, items(), workers=2, ahead=5)
    assert taken == []
    assert next(results) == 0
    assert len(taken) == 5
    assert next(results) == 1
    assert len(taken) == 6
    results.close()


def test_a_failure_does_not_wait_for_its_turn_nor_for_a_thread_that_hangs() -> None:
    release = threading.Event()

    def stuck_or_broken(item: int) -> int:
        if item == 0:
            release.wait(60)
        if item == 2:
            raise OSError("item 2")
        return item

    try:
        with pytest.raises(OSError, match="item 2"):
            list(in_order(stuck_or_broken, range(9), workers=2, ahead=9))
        assert not release.is_set()
        stuck = [t for t in threading.enumerate() if t.name.startswith("in-order")]
        assert stuck and all(thread.daemon for thread in stuck)  # they do not keep the process
    finally:
        release.set()


def test_closing_ends_the_threads() -> None:
    begun: list[int] = []

    def slow(item: int) -> int:
        begun.append(item)
        time.sleep(0.01)
        return item

    results = in_order(slow, range(1000), workers=2, ahead=1000)
    next(results)
    results.close()
    for thread in threading.enumerate():
        if thread.name.startswith("in-order"):
            thread.join(60)
            assert not thread.is_alive()
    assert len(begun) < 1000
