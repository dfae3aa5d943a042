"""BatchNorm statistics over the ranks of a node: four gloo ranks as two nodes of two."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faults.harness import free_port
from torch import Tensor

from byol_fast import distributed
from byol_fast.distributed import World, statistics_group
from byol_fast.networks import norm_ops
from byol_fast.norm import ViewBatchNorm

RANKS, NODE, CHANNELS = 4, 2, 6
ROUTES = ("kernels", "formulas")


def batch() -> tuple[ViewBatchNorm, Tensor, Tensor]:
    """A layer, `[2·8, C, 3, 3]` views of eight images and a gradient; each image has its mean."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, CHANNELS, 3, 3, generator=generator)
    x += torch.arange(16.0).view(16, 1, 1, 1)
    norm = ViewBatchNorm(CHANNELS)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=generator)
    return norm, x, torch.randn(x.shape, generator=generator)


def part(x: Tensor, number: int, of: int) -> Tensor:
    """One of equal shares of the images, both views of each."""
    return torch.cat([view.chunk(of)[number] for view in x.chunk(2)])


def run(norm: ViewBatchNorm, x: Tensor, grad: Tensor, call: Any = None) -> list[Tensor]:
    """Output, input gradient and running statistics; `call` is `norm`, compiled."""
    leaf = x.clone().requires_grad_()
    out = (norm if call is None else call)(leaf)
    out.backward(grad)
    return [out.detach(), leaf.grad, norm.running_mean, norm.running_var]


def _rank(rank: int, port: str, folder: str) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_RANK=str(rank % NODE),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    world = distributed.start("cpu")
    group = statistics_group("group", world)
    result: dict[str, Any] = {
        "members": dist.get_process_group_ranks(group),
        "words": [statistics_group(word, world) for word in ("none", "world")],
    }
    sent: list[tuple[int, ...]] = []
    whole, fits = dist.all_reduce, norm_ops._fits_kernels

    def counted(tensor: Tensor, **options: Any) -> Any:
        sent.append(tuple(tensor.shape))
        return whole(tensor, **options)

    dist.all_reduce = counted
    for route in ROUTES:
        norm_ops._fits_kernels = (lambda *_: False) if route == "formulas" else fits
        norm, x, grad = batch()
        norm.sync = group
        result[route] = run(norm, part(x, rank, RANKS), part(grad, rank, RANKS))
    dist.all_reduce = whole
    torch.save({**result, "sent": sent}, f"{folder}/{rank}.pt")
    distributed.stop()


@pytest.mark.dist
def test_two_nodes_of_two_ranks_are_two_batches(in_ranks, tmp_path: Path) -> None:
    in_ranks(_rank, RANKS, free_port(), tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    norm, x, grad = batch()
    wanted = []
    for node in range(RANKS // NODE):
        own = copy.deepcopy(norm)
        wanted.append(run(own, part(x, node, RANKS // NODE), part(grad, node, RANKS // NODE)))
    assert not torch.allclose(wanted[0][2], wanted[1][2], atol=0.1)  # the nodes differ
    for rank, result in enumerate(results):
        node, place = divmod(rank, NODE)
        assert result["members"] == [NODE * node, NODE * node + 1]
        assert result["words"] == [False, True]
        assert result["sent"] == [(2, 2, CHANNELS)] * 2 * 2  # both views in one message each way
        for route in ROUTES:
            rows = [part(t, place, NODE) for t in wanted[node][:2]]
            torch.testing.assert_close(
                result[route],
                [*rows, *wanted[node][2:]],
                rtol=1e-5,
                atol=1e-5,
                msg=lambda text, where=f"rank {rank}, {route}": f"{where}: {text}",
            )


@pytest.mark.dist
def test_a_layer_with_a_group_compiles_in_one_piece() -> None:
    """Among ranks that are not there: a message comes back as it was, compiled or not."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=fake.FakeStore())
    try:
        norm, x, grad = batch()
        norm.sync = dist.new_group([0, 1])
        eager = run(norm, x, grad)
        again, _, _ = batch()
        again.sync = norm.sync
        compiled = run(again, x, grad, torch.compile(again, backend="aot_eager", fullgraph=True))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    alone = run(batch()[0], x, grad)
    assert not torch.allclose(eager[0], alone[0])  # halved by the two ranks: a message was sent


def test_one_rank_shares_with_nobody_and_an_unknown_node_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone, two = World(0, 1, torch.device("cpu")), World(0, 2, torch.device("cpu"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [statistics_group(word, alone) for word in ("none", "group", "world")] == [False] * 3
    with pytest.raises(ValueError, match="LOCAL_RANK is not set"):
        statistics_group("group", two)
