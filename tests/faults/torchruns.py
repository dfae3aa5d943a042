"""Runs started by launch/torchrun.sh: real agents, real ranks, the tiny network."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from faults.harness import HERE, LIMIT, ROOT, wait_until

from byol_fast.watching import metrics


def python_with_tiny(folder: Path) -> Path:
    """An interpreter for launch scripts under which byol_fast.pretrain knows `--backbone tiny`."""
    path = folder / "python"
    path.write_text(f"""#!/usr/bin/env bash
words=()
while (($#)); do
    if [[ $1 == -m && ${{2:-}} == byol_fast.pretrain ]]; then
        words+=({shlex.quote(str(HERE / "command.py"))})
        shift
    else
        words+=("$1")
    fi
    shift
done
exec {shlex.quote(sys.executable)} "${{words[@]}}"
""")
    path.chmod(0o755)
    return path


def descendants(pid: int) -> list[int]:
    """Process ids of a process's children, theirs, and so on."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        children = [child for child, its in parents.items() if its == parent]
        found += children
        todo += children
    return found


class Torchrun:
    """launch/torchrun.sh on one "machine"; `before` are words put before the command."""

    def __init__(
        self,
        python: Path,
        out: Path,
        arguments: Sequence[object],
        *,
        before: Sequence[str] = (),
        name: str = "output",
        **variables: object,
    ) -> None:
        self.out, self.output_file = out, out.with_name(f"{out.name}.{name}")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON": str(python)}
        env |= {name: str(value) for name, value in variables.items()}
        with open(self.output_file, "a") as file:
            self.process = subprocess.Popen(
                [*before, str(ROOT / "launch" / "torchrun.sh"), "--out", str(out)]
                + [str(word) for word in arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=env,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """What torchrun and its ranks have printed."""
        return self.output_file.read_text(errors="replace")

    @property
    def step(self) -> int:
        """The newest step in the log, -1 before the first line."""
        rows = metrics.read(self.out / "metrics.jsonl").rows
        return max((int(row["step"] or 0) for row in rows if "loss" in row), default=-1)

    @property
    def status(self) -> dict:
        return dict(json.loads((self.out / "status.json").read_text()))

    def ranks(self) -> dict[int, int]:
        """Process ids by rank, of those that have begun."""
        found = {}
        for pid in descendants(self.process.pid):
            try:
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            found |= {int(word[5:]): pid for word in words if word.startswith(b"RANK=")}
        return found

    def wait_for_step(self, step: int, limit: float = LIMIT) -> None:
        def reached() -> bool:
            assert self.process.poll() is None or self.step >= step, self.said[-4000:]
            return self.step >= step

        wait_until(reached, f"step {step}", limit)

    def wait(self, limit: float = LIMIT) -> int:
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended in {limit:.0f} s:\n{self.said[-4000:]}") from None

    def close(self) -> None:
        """Kill what is left of it."""
        for pid in descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
