"""Pretraining runs to be killed, stopped and starved: started, watched, compared.

    run = runs(out, *SMALL, "--data", images)          # or ranks=2, fault="python code"
    run.wait_for_step(5)
    run.kill()
    assert run.wait() == -signal.SIGKILL

Everything waits for a condition, with a limit that only a hang can reach.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support import assert_same, final

from byol_fast.watching import metrics

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT = 600.0  # seconds; a healthy run needs a few, a busy machine makes them many

# 24 steps of 8 images: epochs of 8 steps, a line of the log each step, no kNN in between.
SMALL = (
    *("--recipe", "quickstart", "--backbone", "tiny", "--image-size", "8", "--hidden-size", "8"),
    *("--batch-size", "8", "--epochs", "3", "--device", "cpu", "--threads", "1"),
    *("--log-every", "1", "--eval-every", "0", "--tracker", "none"),
)
ENDLESS = ("--epochs", "1000000")  # after SMALL: to be stopped


def wait_until(condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
    """The first true value of `condition`, asked again and again."""
    deadline = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {limit:.0f} s: {what}"
        time.sleep(0.005)
    return value


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Zygote:
    """The other side of zygote.py; starting it takes as long as importing torch."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Buffered, so that a printed line is one write: ranks share an output file.
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "PYTHONUNBUFFERED": "",
            },
            start_new_session=True,
        )
        assert self._answer() == {"ready": True}

    def start(
        self, arguments: Sequence[object], output: Path, env: dict[str, str], code: str = ""
    ) -> int:
        """The process id of a new run, or of `code` with the arguments as ARGS."""
        words = [str(a) for a in arguments]
        request = {"start": words, "output": str(output), "env": env, "code": code}
        return int(self._ask(request)["pid"])

    def wait(self, pid: int, limit: float = LIMIT) -> int:
        """The exit code of a process."""
        return int(
            wait_until(
                lambda: [c] if (c := self.poll(pid)) is not None else None,
                f"the end of process {pid}",
                limit,
            )[0]
        )

    def poll(self, pid: int) -> int | None:
        """A run's exit code, None while it runs; ask no more once it was told."""
        code: int | None = self._ask({"poll": pid})["code"]
        return code

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(LIMIT)
        self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or "null")
        assert answer is not None, "the zygote has died"
        return answer


def run_ranks(
    zygote: Zygote, folder: Path, call: Callable[..., None], ranks: int, *arguments: object
) -> None:
    """`call(rank, *arguments)`, a function of a test's module, in a process per rank.

    The arguments arrive as text. All have to return; `folder` gets what they print.
    """
    code = f"from {call.__module__} import {call.__name__} as call\ncall(int(ARGS[0]), *ARGS[1:])"
    outputs = [folder / f"rank{rank}.output" for rank in range(ranks)]
    pids = [
        zygote.start([rank, *arguments], output, {}, code) for rank, output in enumerate(outputs)
    ]
    codes: dict[int, int] = {}

    def ended() -> bool:
        for rank, pid in enumerate(pids):
            if rank not in codes and (code := zygote.poll(pid)) is not None:
                codes[rank] = code
        return len(codes) == ranks or any(codes.values())

    try:
        wait_until(ended, "the end of all ranks")
    finally:
        for rank, pid in enumerate(pids):
            if rank not in codes:
                os.kill(pid, signal.SIGKILL)
                zygote.wait(pid)
    assert not any(codes.values()), "".join(output.read_text() for output in outputs)


class Run:
    """One run, of one process or a process per rank; `output` is what all of them print."""

    def __init__(self, zygote: Zygote, out: Path, arguments: Sequence[str], ranks: int, fault: str):
        self.out, self.ranks = out, ranks
        self.output_file = out.with_name(out.name + ".output")
        self._zygote = zygote
        self._before = len(self.output)
        self.codes: dict[int, int] = {}  # by rank, of those that have ended
        common = {"FAULT": fault} if fault else {}
        if ranks > 1:
            common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.pids: list[int] = []
        for rank in range(ranks):
            mine = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            self.pids.append(
                zygote.start(["--out", str(out), *arguments], self.output_file, common | mine)
            )

    @property
    def output(self) -> str:
        """Standard output and error of every run in this folder so far."""
        if not self.output_file.exists():
            return ""
        return self.output_file.read_text(encoding="utf-8", errors="replace")

    @property
    def said(self) -> str:
        """Standard output and error of this run."""
        return self.output[self._before :]

    @property
    def step(self) -> int:
        """The newest step in the log, -1 before the first line."""
        rows = metrics.read(self.out / "metrics.jsonl").rows
        return max((int(row["step"] or 0) for row in rows if "loss" in row), default=-1)

    @property
    def status(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "status.json").read_text()))

    def poll(self) -> bool:
        """Whether every rank has ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (code := self._zygote.poll(pid)) is not None:
                self.codes[rank] = code
        return len(self.codes) == self.ranks

    def wait_for(self, condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
        """Until `condition`; an error if the run ends before."""

        def or_ended() -> Any:
            value = condition()
            assert value or not self.poll(), f"ended ({self.codes}) before {what}:\n{self.said}"
            return value

        return wait_until(or_ended, what, limit)

    def wait_for_step(self, step: int) -> None:
        """Until the log has a line of `step` or a later one."""
        self.wait_for(lambda: self.step >= step, f"step {step}")

    def wait_for_text(self, text: str) -> None:
        """Until the run has printed `text`."""
        self.wait_for(lambda: text in self.said, f"{text!r} was said")

    def signal(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all that run."""
        for each, pid in enumerate(self.pids):
            if rank in (None, each) and each not in self.codes:
                os.kill(pid, number)

    def kill(self, rank: int | None = None) -> None:
        """kill -9."""
        self.signal(signal.SIGKILL, rank)

    def wait(self, limit: float = LIMIT) -> int:
        """The exit code: of rank 0 unless the ranks agree."""
        wait_until(self.poll, f"the end of the run; it said:\n{self.said[-3000:]}", limit)
        return self.codes[0]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, target, momentum, BatchNorm statistics and log of two run folders, bitwise."""
    a, b = final(one), final(other)
    assert a["step"] == b["step"]
    for part in ("model", "optimizer", "scaler", "probe"):
        assert_same(a[part], b[part], part)
    logs = [metrics.reproducible(metrics.read(out / "metrics.jsonl")) for out in (one, other)]
    assert logs[0] == logs[1]
