"""Every fast path gives the losses of the eager fp32 step with the plain optimizer, for 20 steps.

Tolerances: 1e-5 in fp32 where only the order of sums differs (measured: a few 1e-7), 1e-3 on a GPU,
whose convolutions choose their own order and may take TF32, and 3e-2 in bf16 against fp32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from byol_fast.compiled import Networks, as_they_stand, compiled
from byol_fast.distributed import World
from byol_fast.graphed import WARM_UP, GraphedStep
from byol_fast.model import BYOL
from byol_fast.optim import LARS, param_groups, set_lr
from byol_fast.step import train_step

STEPS, BATCH, SIDE = 20, 8, 16
CPU, GPU = torch.device("cpu"), torch.device("cuda")
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.again = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu_()
        return (x + self.again(x)).mean((2, 3))


def steps() -> Iterator[tuple[Tensor, float, float]]:
    """Views, learning rate and τ of each step."""
    generator = torch.Generator().manual_seed(1)
    for number in range(STEPS):
        x = torch.randn(2, BATCH, SIDE, SIDE, 3, generator=generator).permute(0, 1, 4, 2, 3)
        yield x, 2.0 * min(1.0, number / 5), 1 - 0.1 / (number + 1)


def make(device: torch.device, impl: str, lr: float | Tensor = 0.0) -> tuple[BYOL, LARS]:
    torch.manual_seed(0)
    model = BYOL(Small(), image_size=SIDE, projector=(16, 8), predictor=(16, 8))
    model = model.to(device).to(memory_format=torch.channels_last)
    return model, LARS(param_groups(model.online, 1e-4), lr=lr, impl=impl)


def losses(
    model: BYOL,
    networks: Networks,
    optimizer: LARS,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> list[float]:
    found = []
    for x, lr, decay in steps():
        set_lr(optimizer, lr)
        options = {"accumulate": 1, "decay": decay, "autocast_dtype": dtype}
        output = train_step(model, networks, optimizer, [x.to(device)], **options)
        found.append(float(output.loss))
    return found


def compiled_networks(model: BYOL, device: torch.device, backend: str) -> Networks:
    networks = compiled(
        model,
        World(0, 1, device),
        batch=BATCH,
        image_size=SIDE,
        dtype=torch.float32,
        autocast_dtype=None,
        backend=backend,
    )
    assert networks.compile_seconds is not None
    return networks


@pytest.fixture(scope="module")
def trained() -> tuple[list[float], dict[str, Tensor]]:
    """Losses and the model's state at the end."""
    model, optimizer = make(CPU, "reference")
    found = losses(model, as_they_stand(model), optimizer, CPU)
    assert found[0] > found[-1] > 0  # it trains: equal losses mean something
    assert max(found) - min(found) > 0.05
    return found, model.state_dict()


@pytest.fixture(scope="module")
def reference(trained: tuple[list[float], dict[str, Tensor]]) -> list[float]:
    return trained[0]


@pytest.mark.parametrize("impl", ["foreach", pytest.param("fused", marks=TRITON)])
def test_multi_tensor_and_fused_updates(impl: str, reference: list[float]) -> None:
    if impl == "fused" and torch.cuda.is_available():
        pytest.skip("Triton is not interpreted here; the GPU's test takes the kernels")
    model, optimizer = make(CPU, impl)
    assert losses(model, as_they_stand(model), optimizer, CPU) == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_networks(backend: str, trained: tuple[list[float], dict[str, Tensor]]) -> None:
    wanted, state = trained
    model, optimizer = make(CPU, "foreach")
    networks = compiled_networks(model, CPU, backend)
    assert networks.online is not model.online
    assert losses(model, networks, optimizer, CPU) == pytest.approx(wanted, abs=1e-5)
    # Rounding that 20 steps have amplified.
    torch.testing.assert_close(model.state_dict(), state, rtol=1e-3, atol=1e-3)


def test_a_wrong_update_would_be_seen(reference: list[float]) -> None:
    model, optimizer = make(CPU, "foreach")
    optimizer.param_groups[0]["eta"] *= 1.01
    changed = losses(model, as_they_stand(model), optimizer, CPU)
    assert max(abs(a - b) for a, b in zip(changed, reference, strict=True)) > 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("engine", ["eager", "compile", "graph"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_on_a_gpu(engine: str, dtype: torch.dtype | None, reference: list[float]) -> None:
    """Fused updates, compiled networks, and both as one graph."""
    model, optimizer = make(GPU, "fused")
    networks = as_they_stand(model)
    if engine != "eager":
        networks = compiled_networks(model, GPU, "inductor")
    tolerance = 1e-3 if dtype is None else 3e-2
    if engine != "graph":
        found = losses(model, networks, optimizer, GPU, dtype)
    else:
        step = GraphedStep(model, networks, optimizer, autocast_dtype=dtype)
        found = [float(step(x.to(GPU), lr=lr, decay=decay).loss) for x, lr, decay in steps()]
        assert STEPS > WARM_UP + 1 and step._graph is not None
    assert found == pytest.approx(reference, abs=tolerance)
