"""Ranks agree through one small API; a world of one needs no process group."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from faults.harness import free_port
from torch import nn

from byol_fast import distributed, ranks


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


class Counting(nn.Module):
    """A buffer of whole numbers, as other people's layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Counting(), nn.Linear(4, 2))


def _images(rank: int) -> torch.Tensor:
    return (1 + 3 * rank) * torch.randn(8, 3, generator=torch.Generator().manual_seed(rank)) + rank


def _buffers(rank: int, port: str, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    world = distributed.start("cpu")
    network = _network()
    wrapped = distributed.data_parallel(network, world)
    for _ in range(3):
        wrapped.zero_grad()
        wrapped(_images(rank)).square().mean().backward()
    gradients = [p.grad for p in network.parameters()]
    torch.save((dict(network.named_buffers()), gradients), f"{folder}/{rank}.pt")
    distributed.stop()


@pytest.mark.dist
def test_gradients_are_shared_and_buffers_are_not(in_ranks, tmp_path: Path) -> None:
    """A broadcast of buffers in each pass would give rank 1 the statistics of rank 0's images."""
    in_ranks(_buffers, 2, free_port(), tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = [_network() for _ in range(2)]
    for rank, network in enumerate(alone):
        for _ in range(3):
            network.zero_grad()
            network(_images(rank)).square().mean().backward()
        torch.testing.assert_close(found[rank][0], dict(network.named_buffers()))
        assert found[rank][0]["2.calls"] == 3
    assert not torch.allclose(found[0][0]["1.running_mean"], found[1][0]["1.running_mean"])
    for one, two, *own in zip(
        *(gradients for _, gradients in found),
        *([p.grad for p in network.parameters()] for network in alone),
        strict=True,
    ):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, sum(own) / 2)
