"""A GPU that is lost is not gone on with, and compilers share a node's cores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from byol_fast.compiled import compiled
from byol_fast.device_errors import first_line, raise_if_lost, root_cause
from byol_fast.distributed import World
from byol_fast.model import BYOL
from pipelines import augment
from pipelines import cores as cores_module
from pipelines.spec import AugmentSpec

GPU = torch.device("cuda", 0)
ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …"


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context in which every call raises."""

    def synchronize(device: torch.device) -> None:
        raise RuntimeError(ILLEGAL)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)


def test_a_lost_context_is_raised_with_what_came_before(lost: None) -> None:
    before = ValueError("the kernel\nfailed")
    with pytest.raises(RuntimeError) as raised:
        raise_if_lost(GPU, before)
    assert raised.value.__cause__ is before
    words = str(raised.value)
    assert "cuda:0 is lost" in words and "illegal memory access" in words
    assert "ValueError: the kernel" in words and "\n" not in words


def test_a_context_that_works_and_a_cpu_raise_nothing(
    lost: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    raise_if_lost(torch.device("cpu"), ValueError())
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    raise_if_lost(GPU, ValueError())
    assert waited == [GPU]


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        return self.layer(x.flatten(1))


def options(device: torch.device) -> dict[str, object]:
    return {
        "world": World(0, 1, device),
        "batch": 2,
        "image_size": 2,
        "dtype": torch.float32,
        "autocast_dtype": None,
        "backend": "eager",
    }


def test_networks_do_not_go_on_eagerly_on_a_lost_gpu(
    lost: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BYOL(Fails(), image_size=2, projector=(4, 4), predictor=(4, 4))
    assert compiled(model, **options(torch.device("cpu"))).compile_seconds is None
    monkeypatch.setattr(torch, "randn", no_gpu(torch.randn))
    with pytest.raises(RuntimeError, match="cuda:0 is lost"):
        compiled(model, **options(GPU))


def no_gpu(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *shape, device, **rest: real(*shape, **rest)


def test_plain_torch_does_not_augment_on_a_lost_gpu(
    lost: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = pytest.importorskip("pipelines.augment.fused", reason="Triton is not installed")

    def self_check(*_: object) -> float:
        raise RuntimeError("the kernels differ")

    monkeypatch.setattr(fused, "self_check", self_check)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        augment.choose(AugmentSpec(image_size=24), GPU)


def test_the_first_of_a_chain() -> None:
    try:
        try:
            raise ValueError("first\nmore")
        finally:
            raise RuntimeError("the end of the capture")
    except RuntimeError as error:
        assert first_line(root_cause(error)) == "ValueError: first"
    alone = KeyError("one")
    alone.__context__ = other = KeyError("two")
    other.__context__ = alone  # a ring
    assert root_cause(alone) is other
    assert first_line(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"), [(192, 8, 24), (192, 1, 32), (4, 8, 1), (16, None, 16)]
)
def test_compile_workers_are_the_cores_by_the_ranks(
    cores: int, ranks: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(cores_module, "usable_cores", lambda: float(cores))
    model = BYOL(Fails(), image_size=2, projector=(4, 4), predictor=(4, 4))
    with config.patch(compile_threads=3):
        compiled(model, **options(torch.device("cpu")))
        assert config.compile_threads == workers
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "5")
    with config.patch(compile_threads=5):
        compiled(model, **options(torch.device("cpu")))
        assert config.compile_threads == 5
