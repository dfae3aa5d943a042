"""Ranks agree through one small API; a world of one needs no process group."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from faults.harness import free_port

from byol_fast import distributed


def _rank(rank: int, port: str, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    world = distributed.start("cpu")
    result = {
        "rank": world.rank,
        "size": world.size,
        "any": world.any(world.rank == 1, False),
        "mean": world.mean(torch.tensor([1.0 + world.rank])).tolist(),
        "gather": world.gather(f"rank {world.rank}"),
        "share": world.share({"from": world.rank}),
    }
    world.barrier()
    Path(folder, f"{world.rank}.json").write_text(json.dumps(result))
    distributed.stop()


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
def test_two_ranks_agree(in_ranks, tmp_path: Path) -> None:
    in_ranks(_rank, 2, free_port(), tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "rank": rank,
            "size": 2,
            "any": [True, False],
            "mean": [1.5],
            "gather": ["rank 0", "rank 1"],
            "share": {"from": 0},
        }
