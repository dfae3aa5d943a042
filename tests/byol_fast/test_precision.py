"""What `--run.precision` sets: fp32 is not rounded to TF32, and tf32 is the name of what is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from byol_fast import assemble
from byol_fast.config import FLAGS, parse
from byol_fast.distributed import World
from byol_fast.recipes import fill

CPU = World(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def torchs_settings() -> Iterator[None]:
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = conv
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize(
    ("precision", "matmul", "conv"),
    [
        ("fp32", "highest", False),
        ("auto", "highest", False),  # fp32 on a CPU
        ("tf32", "high", True),
        ("bf16", "high", True),
        ("fp16", "high", True),
    ],
)
@pytest.mark.parametrize("before", ["fp32", "tf32"])
def test_tf32_is_used_where_it_was_asked_for(
    precision: str, matmul: str, conv: bool, before: str
) -> None:
    for asked in (before, precision):
        argv = ["--recipe", "quickstart", "--hidden-size", "8", "--precision", asked]
        assemble.build_model(fill(parse(argv)), CPU)
    assert torch.get_float32_matmul_precision() == matmul
    assert torch.backends.cudnn.allow_tf32 is conv


def test_every_precision_is_described_in_the_log() -> None:
    assert set(FLAGS["run.precision"].choices) - {"auto"} == set(assemble.PRECISIONS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp32_is_exact_on_a_gpu_and_tf32_is_not() -> None:
    device = torch.device("cuda", 0)
    x = torch.randn(8, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    conv = torch.nn.Conv2d(64, 64, 3, bias=False)
    wanted = conv.double()(x.double())
    off = {}
    for precision in ("fp32", "tf32"):
        assemble._set_float32(precision)
        out = conv.float().to(device)(x.to(device)).double().cpu()
        off[precision] = (out - wanted).abs().max().item()
        conv.cpu()
    assert off["fp32"] < 1e-4
    if torch.cuda.get_device_capability() >= (8, 0):
        assert off["tf32"] > 2 * off["fp32"]
