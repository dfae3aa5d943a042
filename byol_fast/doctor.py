"""`byol-fast doctor`: what this machine has for a pretraining run, and what mends what it lacks.

Every line says ok, slow or missing. The checks run side by side, apart from each other: what may
crash or hang (importing PyTorch, DALI, FFCV) has a process of its own, and every check a limit.
"""

from __future__ import annotations

import argparse
import json
import platform
import queue
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

from byol_fast._version import __version__
from byol_fast.config import PARTS
from byol_fast.errors import Exit

State = Literal["ok", "slow", "missing"]

SECONDS = 20.0  # for the slowest check
BACKENDS = ("auto", "torch", "dali", "ffcv")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the run is to be: decides what is asked for and what is merely good to have."""

    data: str = ""  # what pretraining's --data takes
    out: str = "runs"
    backend: str = "auto"
    device: str = "auto"
    ranks: int = 0  # processes on this machine; 0: one for each GPU

    @property
    def gpu(self) -> bool:
        """Whether a GPU is asked for."""
        return self.device == "cuda"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: what was looked at, how it is, and the command that mends it."""

    name: str
    state: State
    what: str
    mend: str = ""  # empty where nothing has to be done
    asked: bool = False  # its absence ends the command with an error


Check = Callable[[Wanted], list[Finding]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, 2 something asked for is missing, 4 the data is."""
    args = _parse(argv)
    wanted = Wanted(
        data=args.data.removeprefix(PARTS),  # those of this node are what can be looked at
        out=args.out,
        backend=args.backend,
        device=args.device,
        ranks=args.ranks,
    )
    started = time.perf_counter()
    findings = examine(wanted)
    seconds = time.perf_counter() - started
    if args.json:
        report = {
            "byol_fast": __version__,
            "machine": platform.platform(),
            "seconds": round(seconds, 2),
            "exit": int(verdict(findings)),
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(report, indent=2))
    else:
        print(as_text(findings, seconds))
    return verdict(findings)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="byol-fast doctor",
        description="Look at this machine: each line says ok, slow or missing, and the command "
        "that mends it.",
        epilog="exit codes: 0, 2 something that was asked for is missing, 4 the data is",
    )
    add = parser.add_argument
    add("--data", default="", metavar="DIR", help="also its index and how fast it is read")
    add("--out", default="runs", metavar="DIR", help="where runs are written (default: runs)")
    add("--backend", choices=BACKENDS, default="auto", help="ask for this one (default: auto)")
    add("--device", choices=DEVICES, default="auto", help="ask for this one (default: auto)")
    add("--ranks", type=_count, default=0, metavar="N", help="processes here (default: the GPUs)")
    add("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def checks() -> dict[str, Check]:
    """All checks by name, in the order of the lines."""
    from byol_fast import doctor_machine, doctor_packages

    return {
        "Python": doctor_packages.python,
        "PyTorch": doctor_packages.pytorch,
        "DALI": doctor_packages.dali,
        "FFCV": doctor_packages.ffcv,
        "cores": doctor_machine.cores,
        "/dev/shm": doctor_machine.shared_memory,
        "out": doctor_machine.output,
        "data": doctor_machine.data,
        "index": doctor_machine.index,
    }


def examine(
    wanted: Wanted, run: dict[str, Check] | None = None, seconds: float = SECONDS
) -> list[Finding]:
    """Runs the checks side by side; one that raises or does not come back is a line as well.

    Args:
        run: by name; by default all.
        seconds: after which a check is given up.
    """
    run = checks() if run is None else run
    done: queue.SimpleQueue[tuple[str, list[Finding]]] = queue.SimpleQueue()

    def work(name: str, check: Check) -> None:
        try:
            done.put((name, check(wanted)))
        except Exception as error:  # whatever is wrong with this machine is a finding
            what = f"the check failed: {type(error).__name__}: {error}"
            asked = name == "out" or (name in ("data", "index") and bool(wanted.data))
            done.put((name, [Finding(name=name, state="missing", what=what, asked=asked)]))

    for name, check in run.items():  # daemons: one that hangs does not keep the process
        threading.Thread(target=partial(work, name, check), daemon=True).start()
    found: dict[str, list[Finding]] = {}
    deadline = time.monotonic() + seconds
    while len(found) < len(run):
        try:
            name, findings = done.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        found[name] = findings
    late = f"no answer in {seconds:g} s"
    return [
        finding
        for name in run
        for finding in found.get(name, [Finding(name=name, state="slow", what=late)])
    ]


def verdict(findings: Sequence[Finding]) -> Exit:
    """The exit code: an error only for what was asked for and is missing."""
    missing = {f.name for f in findings if f.asked and f.state == "missing"}
    if missing & {"data", "index"}:
        return Exit.DATA
    return Exit.USAGE if missing else Exit.DONE


def as_text(findings: Sequence[Finding], seconds: float) -> str:
    """A line for each finding, and one with what mends it."""
    width = max(len(finding.name) for finding in findings)
    indent = " " * (9 + width + 2)
    lines = [f"byol-fast {__version__} on {platform.platform()}", ""]
    for finding in findings:
        head = f"{finding.state:<9}{finding.name:<{width}}  "
        lines += textwrap.wrap(
            head + finding.what, 100, subsequent_indent=indent, break_long_words=False
        )
        if finding.mend:
            lines.append(f"{indent}→ {finding.mend}")
    counted = ", ".join(
        f"{sum(f.state == state for f in findings)} {state}" for state in ("ok", "slow", "missing")
    )
    asked = [f.name for f in findings if f.asked and f.state == "missing"]
    ending = f"; asked for and missing: {', '.join(asked)}" if asked else ""
    return "\n".join([*lines, "", f"{counted} in {seconds:.1f} s{ending}"])


if __name__ == "__main__":
    sys.exit(main())
