"""F26: where a step does not fit into memory, the setting that fits is found by trying."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from byol_fast.compiled import as_they_stand, compiled
from byol_fast.distributed import World
from byol_fast.errors import OutOfMemory
from byol_fast.memory import is_out_of_memory
from byol_fast.model import BYOL
from byol_fast.session.fitting import advice
from byol_fast.session.split import share_out

ALONE = World(0, 1, torch.device("cpu"))


class Limited(nn.Module):
    """A network that has memory for so many rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.conv, self.norm = rows, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.rows and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.norm(self.conv(x)).mean((2, 3))


def make(rows: int) -> BYOL:
    torch.manual_seed(0)
    return BYOL(Limited(rows), image_size=16, projector=(8, 8), predictor=(8, 8))


def advise(model: BYOL, batch: int, accumulate: int = 1) -> str:
    split = share_out(batch, 1, asked=accumulate)
    return advice(model, ALONE, split, image_size=16, dtype=torch.float32, autocast_dtype=None)


@pytest.mark.parametrize(
    ("images", "batch", "accumulate", "fits"),
    [
        (16, 32, 1, 2),
        (10, 32, 1, 4),
        pytest.param(3, 24, 2, 8, marks=pytest.mark.slow),
        pytest.param(2, 12, 1, 6, marks=pytest.mark.slow),
        (11, 33, 1, 3),
    ],
)
def test_the_fewest_micro_batches_that_fit_are_named(
    images: int, batch: int, accumulate: int, fits: int
) -> None:
    model = make(2 * images)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    text = advise(model, batch, accumulate)
    assert f"of {batch // fits} images fit: use --input.accumulate {fits} " in text
    assert f"over {batch // fits} images instead of {batch // accumulate}" in text
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_if_nothing_fits_that_is_the_advice() -> None:
    assert "do not fit either" in advise(make(1), 8)


def test_the_trial_of_compiled_networks_names_it() -> None:
    options = {"image_size": 16, "dtype": torch.float32, "autocast_dtype": None}
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(OutOfMemory, match=r"rank 0: OutOfMemoryError: CUDA out of memory"),
    ):
        compiled(make(6), ALONE, batch=4, **options, backend="eager")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (caused(RuntimeError("backend='inductor' raised:"), torch.OutOfMemoryError("")), True),
        (RuntimeError("No valid triton configs. OutOfResources: out of resource"), False),
        (RuntimeError("no C++ compiler"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_a_lack_of_memory(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


def test_a_trial_needs_no_gradients_in_the_parameters() -> None:
    """DistributedDataParallel waits for those: a trial must not set them off."""
    model = make(8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: pytest.fail("accumulated"))
    from byol_fast.compiled import try_out

    try_out(model, as_they_stand(model), 4, 16, torch.float32, None)
