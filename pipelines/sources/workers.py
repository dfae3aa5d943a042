"""Threads that work through numbered items, batch after batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch


class Workers:
    """A pool of threads for code that releases the GIL, such as image decoders and torch.

    A thread takes the next item when it is done with one, and goes on to the next job when a job
    has none left, so no thread waits for the slowest image of a batch.

    Args:
        threads: how many.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="byol-input")
        self._lock = threading.Lock()
        self._busy = 0.0
        self._closed = threading.Event()
        self._start_threads()

    def _start_threads(self) -> None:
        """Starts all threads, each with one intra-op thread of its own.

        N workers with torch's default of one OpenMP thread per core would be N x cores threads.
        The number is kept per thread, but `set_num_threads` also sets what threads started later
        begin with, so the caller's number is set again afterwards.
        """
        before = torch.get_num_threads()
        together = threading.Barrier(self.threads)

        def start() -> None:
            together.wait()  # holds every thread until all exist
            torch.get_num_threads()  # takes over the common number, which else happens after this
            torch.set_num_threads(1)

        try:
            for future in [self._pool.submit(start) for _ in range(self.threads)]:
                future.result()
        except BaseException:
            together.abort()  # or those that did start would wait for ever
            raise
        torch.set_num_threads(before)

    @property
    def busy_seconds(self) -> float:
        """Processor time that finished jobs took, summed over the threads.

        Not wall time, which would count the waits for a core, for the GIL and for a disk too.
        """
        with self._lock:
            return self._busy

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    def start(self, items: int, function: Callable[[int], None]) -> Job:
        """Begin to call `function(0)` ... `function(items - 1)`, in any order, on the threads."""
        if self._closed.is_set():
            raise RuntimeError("the source is closed")
        job = Job(iter(range(items)), function)
        runners = min(self.threads, max(items, 1))
        job.futures = [self._pool.submit(self._run, job) for _ in range(runners)]
        return job

    def _run(self, job: Job) -> None:
        started = time.thread_time()
        try:
            while not (job.stopped or self._closed.is_set()):
                item = next(job.items, None)  # one step of the interpreter: no two threads get one
                if item is None:
                    return
                job.function(item)
        except BaseException:
            job.stopped = True  # the others need not go on
            raise
        finally:
            with self._lock:
                self._busy += time.thread_time() - started

    def close(self) -> None:
        """Ends every job after the items in hand, and the threads."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


class Job:
    """The items of one batch. Made by `Workers.start`."""

    def __init__(self, items: Iterator[int], function: Callable[[int], None]) -> None:
        self.items, self.function = items, function
        self.futures: list[Future[None]] = []
        self.stopped = False

    @property
    def succeeded(self) -> bool:
        """Whether all items are done, none of them with an error."""
        return all(
            future.done() and not future.cancelled() and future.exception() is None
            for future in self.futures
        )

    def wait(self) -> None:
        """Blocks until all items are done.

        Raises:
            Exception: the first that an item raised.
        """
        for future in self.futures:
            if future.cancelled():
                raise RuntimeError("the source was closed while it was in use")
            future.result()


def stop(jobs: Iterable[Job]) -> None:
    """Drops the items not begun and blocks until those in hand are done; raises nothing."""
    jobs = list(jobs)
    for job in jobs:
        job.stopped = True  # all of them first, or the threads would go on with the next job
    wait([future for job in jobs for future in job.futures if not future.cancel()])
