"""How many threads the cores of this process, or the quota of its container, are worth."""

import os
from pathlib import Path

import pytest
import torch

from byol_fast import distributed
from byol_fast.evaluate.commands import common, frozen
from pipelines import convert, cores, pipeline, scan


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b", {"sys/fs/cgroup/a/b/cpu.max": "max 100000"}, None),
        ("0::/a/b", {"sys/fs/cgroup/a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/a/b", {"sys/fs/cgroup/a/cpu.max": "25000 100000"}, 0.25),  # of the group above
        ("0::/", {"sys/fs/cgroup/cpu.max": "10000 100000"}, 0.1),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x",
            {
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "75000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            0.75,
        ),
        (
            "3:cpu,cpuacct:/docker/1f",  # as seen from inside, where the group is the root
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            1.5,
        ),
        ("0::/a", {"sys/fs/cgroup/a/cpu.max": "100000 0"}, None),
        (
            "3:cpu:/",
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_the_control_groups_quota_counts(
    tmp_path: Path, groups: str, files: dict[str, str], expected: float | None
) -> None:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    affinity = len(os.sched_getaffinity(0))
    assert cores.usable_cores(tmp_path) == min(expected or affinity, affinity)


@pytest.fixture
def quota(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two and a half cores of 64."""
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(cores, "_quotas", lambda root: [2.5])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def test_threads_of_everything_follow_the_quota(
    quota: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cores.usable_cores() == 2.5
    assert pipeline.default_threads() == cores.worker_threads() == frozen.default_jobs() == 2
    assert (scan.default_workers(True), scan.default_workers(False)) == (2, 8)
    assert convert._parse(["a", "b.beton"]).workers == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert pipeline.default_threads() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert pipeline.default_threads() == 1


def test_torch_has_no_more_threads_than_the_quota(
    quota: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    distributed.start("cpu")
    assert asked == []  # the user's number stands
    monkeypatch.delenv("OMP_NUM_THREADS")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    distributed.start("cpu")
    common.device_of("cpu")
    assert asked == [2, 2]
