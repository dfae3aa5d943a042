"""The same surroundings for every test, whoever starts pytest, and what is imported first.

FFCV imports distutils: setuptools comes first, so that Inductor, which needs it, finds one of them.
Without a GPU Triton is interpreted, which is settled by its import.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.harness import Zygote, run_ranks

# What a shell, a job of Slurm or another torchrun has set reaches every command called here.
_OF_JOBS = ("SLURM_", "PET_", "TORCHELASTIC_", "WANDB_")
_OF_SHELLS = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CDPATH", "PYTHONWARNINGS"}
_OF_SHELLS |= {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_OF_SHELLS |= {"NNODES", "NPROC", "NODE_RANK", "MAX_RESTARTS", "BYOL_FAST_TIMEOUT"}
for name in list(os.environ):
    if name in _OF_SHELLS or name.startswith(_OF_JOBS):
        del os.environ[name]
os.umask(0o022)
# Threads of several processes wait for each other in turns: an SVD of 1 ms takes 1 s.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

if importlib.util.find_spec("setuptools"):
    import setuptools  # noqa: F401
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


_LEFT = pytest.StashKey[int]()  # how many slow tests were not asked for
_SHARED = "slow_tests_left"  # its name between the processes of pytest-xdist


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEFT] = 0


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        item.config.stash[_LEFT] += item.get_closest_marker("slow") is not None


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_SHARED] = session.config.stash[_LEFT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker has collected all tests, so each has left out the same."""
    node.config.stash[_LEFT] = getattr(node, "workeroutput", {}).get(_SHARED, 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if left := terminalreporter.config.stash[_LEFT]:
        terminalreporter.write_line(f"{left} slow tests are left to ./launch/test.sh --all")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads an index that an earlier run has left, nor leaves one."""
    os.environ["BYOL_FAST_CACHE"] = str(tmp_path_factory.mktemp("cache") / "index")


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """A command called in this process leaves a log handler and a number of threads behind."""
    root, threads = logging.getLogger(), torch.get_num_threads()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """A process that has imported torch, and forks others: cheaper than starting them."""
    started = Zygote()
    yield started
    started.close()


@pytest.fixture
def in_ranks(zygote: Zygote, tmp_path: Path) -> Callable[..., None]:
    """`in_ranks(function, number, *arguments)`: see `faults.harness.run_ranks`."""

    def run(call: Callable[..., None], ranks: int, *arguments: object) -> None:
        run_ranks(zygote, tmp_path, call, ranks, *arguments)

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports travel between processes as UTF-8: file names in them need not be that."""
    report = yield
    report.sections = [(_utf8(name), _utf8(text)) for name, text in report.sections]
    if report.longrepr is not None and (text := str(report.longrepr)) != _utf8(text):
        report.longrepr = _utf8(text)
    return report


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
