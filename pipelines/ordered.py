"""Work done by threads, its results in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Pool(Generic[T, R]):
    """Daemon threads: one that hangs on a dead disk keeps neither the caller nor the process."""

    def __init__(self, function: Callable[[T], R], workers: int) -> None:
        self.function, self.stopped = function, False
        self.todo: SimpleQueue[tuple[int, T] | None] = SimpleQueue()
        self.done: SimpleQueue[tuple[int, R] | BaseException] = SimpleQueue()
        self.threads = [
            threading.Thread(target=self._run, name=f"in-order-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self.threads:
            thread.start()

    def _run(self) -> None:
        try:
            while (job := self.todo.get()) is not None and not self.stopped:
                self.done.put((job[0], self.function(job[1])))
        except BaseException as error:  # raised where the results are taken
            self.done.put(error)

    def stop(self) -> None:
        self.stopped = True
        for _ in self.threads:
            self.todo.put(None)


def in_order(
    function: Callable[[T], R], items: Iterable[T], *, workers: int, ahead: int
) -> Generator[R, None, None]:
    """`function(item)` for each item, computed by `workers` threads, in the order of the items.

    Args:
        ahead: items begun before the result of the first of them is taken, at least 1.

    Raises:
        Exception: the first error of any thread, at once and not when its item's turn has come.
    """
    waiting, begun, ready = enumerate(items), 0, dict[int, R]()
    pool: _Pool[T, R] = _Pool(function, workers)
    try:
        turn = 0
        while True:
            while begun < turn + ahead and (job := next(waiting, None)) is not None:
                pool.todo.put(job)
                begun += 1
            if turn == begun:
                return
            while turn not in ready:
                result = pool.done.get()
                if isinstance(result, BaseException):
                    raise result
                ready[result[0]] = result[1]
            yield ready.pop(turn)
            turn += 1
    finally:
        pool.stop()
