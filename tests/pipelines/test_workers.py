"""Workers: every item once, errors come out, nothing hangs, torch's threads are left alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipelines.sources.workers import Workers, stop


@pytest.mark.parametrize(("threads", "items"), [(1, 5), (3, 100), (4, 2), (2, 0)])
def test_every_item_is_done_once(threads: int, items: int) -> None:
    workers, done = Workers(threads), []
    job = workers.start(items, done.append)
    job.wait()
    assert sorted(done) == list(range(items)) and job.succeeded
    workers.close()


def test_each_worker_computes_on_one_thread_and_other_threads_keep_theirs() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        workers, seen, together = Workers(2), [], threading.Barrier(2)

        def look(item: int) -> None:
            together.wait(60)  # so that both workers take part
            seen.append(torch.get_num_threads())

        workers.start(2, look).wait()
        with ThreadPoolExecutor(1) as started_later:
            later = started_later.submit(torch.get_num_threads).result()
        assert (seen, torch.get_num_threads(), later) == ([1, 1], 3, 3)
        workers.close()
    finally:
        torch.set_num_threads(before)


def test_an_error_comes_out_and_ends_the_job() -> None:
    workers, done = Workers(2), []

    def work(item: int) -> None:
        if item == 3:
            raise KeyError("three")
        time.sleep(0.001)
        done.append(item)

    job = workers.start(10_000, work)
    with pytest.raises(KeyError, match="three"):
        job.wait()
    stop([job])
    assert len(done) < 100 and not job.succeeded
    workers.start(1, done.append).wait()  # the workers themselves go on
    workers.close()


def test_a_stopped_job_ends_after_the_items_in_hand() -> None:
    workers, begun, go = Workers(2), [], threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        assert go.wait(60)

    job, behind = workers.start(100, work), workers.start(100, work)
    while len(begun) < 2:
        time.sleep(0.001)
    stopping = threading.Thread(target=stop, args=([job, behind],))
    stopping.start()
    while not (job.stopped and behind.stopped):
        time.sleep(0.001)
    go.set()
    stopping.join()
    assert len(begun) == 2
    workers.close()


def test_closing_ends_the_threads_and_what_waits_for_them() -> None:
    before = set(threading.enumerate())
    workers, go = Workers(2), threading.Event()
    begun, done = threading.Barrier(3), []

    def work(item: int) -> None:
        begun.wait(60)
        assert go.wait(60)
        done.append(item)

    running, queued = workers.start(2, work), workers.start(2, work)
    begun.wait(60)  # both threads are in the first job
    closing = threading.Thread(target=workers.close)
    closing.start()
    while not workers.closed:
        time.sleep(0.001)
    go.set()
    closing.join()
    running.wait()
    assert len(done) == 2
    with pytest.raises(RuntimeError, match="closed while"):
        queued.wait()
    stop([running, queued])  # does not wait for what will never run
    with pytest.raises(RuntimeError, match="closed"):
        workers.start(1, print)
    assert {t for t in threading.enumerate() if t.name.startswith("byol")} <= before


def test_processor_time_is_counted_and_sleep_is_not() -> None:
    workers = Workers(2)
    workers.start(2, lambda item: time.sleep(0.2)).wait()
    asleep = workers.busy_seconds

    def compute(item: int) -> None:
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass

    workers.start(2, compute).wait()
    assert asleep < 0.1 and workers.busy_seconds - asleep >= 0.1
    workers.close()


def test_threads_must_be_at_least_one() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Workers(0)
