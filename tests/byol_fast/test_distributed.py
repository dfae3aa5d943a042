"""Ranks agree through one small API; a world of one needs no process group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from byol_fast import distributed

WORKER = """
import json, sys, torch
from byol_fast import distributed
world = distributed.start("cpu")
result = {
    "rank": world.rank,
    "size": world.size,
    "any": world.any(world.rank == 1, False),
    "mean": world.mean(torch.tensor([1.0 + world.rank])).tolist(),
    "share": world.share({"from": world.rank}),
}
world.barrier()
open(f"{sys.argv[1]}/{world.rank}.json", "w").write(json.dumps(result))
distributed.stop()
"""


def torchrun(*args: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", f"--nproc_per_node={ranks}", *args),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = distributed.start("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.any(True, False) == (True, False)
    assert world.share("x") == "x"
    assert world.mean(torch.tensor([2.0])).tolist() == [2.0]
    assert distributed.data_parallel(module := torch.nn.Linear(1, 1), world) is module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_with_a_mend() -> None:
    with pytest.raises(ValueError, match="--device cpu"):
        distributed.start("cuda")


@pytest.mark.dist
def test_two_ranks_agree(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = torchrun(str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "rank": rank,
            "size": 2,
            "any": [True, False],
            "mean": [1.5],
            "share": {"from": 0},
        }
