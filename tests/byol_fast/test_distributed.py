"""Ranks agree through one small API; a world of one needs no process group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from byol_fast import distributed, ranks

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


RANKS = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29788"}


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK"),
        ({"LOCAL_RANK": "1"}, "RANK is not set"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK .* from 0 to 1"),
        ({"LOCAL_WORLD_SIZE": "none"}, "LOCAL_WORLD_SIZE"),
        ({"RANK": "0"}, "RANK set, but not WORLD_SIZE and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE set, but not RANK and"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({**RANKS, "RANK": "a"}, "RANK"),
        ({**RANKS, "RANK": ""}, "not RANK"),
        ({**RANKS, "RANK": "2"}, "RANK .* from 0 to 1, got '2'"),
        ({**RANKS, "WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({**RANKS, "MASTER_ADDR": ""}, "not MASTER_ADDR"),
        ({**RANKS, "MASTER_PORT": ""}, "not MASTER_PORT"),
        ({**RANKS, "MASTER_PORT": "70000"}, "MASTER_PORT .* from 1 to 65535"),
        ({**RANKS, "MASTER_PORT": "http"}, "MASTER_PORT"),
    ],
)
def test_wrong_variables_of_ranks_are_named(
    variables: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ranks.NAMES:
        monkeypatch.delenv(each, raising=False)
    for each, value in variables.items():
        monkeypatch.setenv(each, value)
    with pytest.raises(ValueError, match=name) as caught:
        distributed.start("cpu")
    assert "start with torchrun" in str(caught.value)


@pytest.mark.parametrize("variables", [dict.fromkeys(ranks.NAMES, ""), {"WORLD_SIZE": "1"}])
def test_empty_variables_of_ranks_are_none(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ranks.NAMES:
        monkeypatch.setenv(each, variables.get(each, " "))
    assert distributed.start("cpu").size == 1
    left = {name for name, value in variables.items() if value}
    assert set(ranks.NAMES) & os.environ.keys() == left


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
