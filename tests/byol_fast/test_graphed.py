"""A step as one CUDA graph: the same steps, without waiting; what cannot be captured is said."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from byol_fast import graphed
from byol_fast.compiled import as_they_stand
from byol_fast.distributed import World, data_parallel
from byol_fast.errors import CaptureError
from byol_fast.graphed import WARM_UP, GraphedStep, refusal, side_stream
from byol_fast.model import BYOL
from byol_fast.optim import LARS, param_groups, set_lr
from byol_fast.step import train_step
from tests.byol_fast.networks import Small

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "accumulate", "precision", "word"),
    [
        ("cpu", 1, "bf16", "no GPU"),
        ("cuda", 2, "bf16", "accumulate"),
        ("cuda", 1, "fp16", "fp16"),
        ("cuda", 1, "bf16", ""),
        ("cuda", 1, "fp32", ""),
    ],
)
def test_what_cannot_be_one_graph(device: str, accumulate: int, precision: str, word: str) -> None:
    reason = refusal(torch.device(device), accumulate=accumulate, precision=precision)
    assert bool(reason) == bool(word)
    assert word in reason


def steps(count: int, device: torch.device = GPU):
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        x = torch.randn(2, 8, 16, 16, 3, generator=generator).permute(0, 1, 4, 2, 3)
        yield x.to(device), 0.1 * number, 1 - 0.1 / (number + 1)


def pair(device: torch.device = GPU) -> tuple[BYOL, LARS, BYOL, LARS]:
    torch.manual_seed(0)
    one = BYOL(Small(), image_size=16, projector=(16, 8), predictor=(16, 8)).to(device)
    two = copy.deepcopy(one)
    return (
        *(one, LARS(param_groups(one.online, 1e-4), lr=0.0)),
        *(two, LARS(param_groups(two.online, 1e-4), lr=0.0)),
    )


class Stream:
    """Stands for a CUDA stream where there is no GPU; what it is asked is written down."""

    def __init__(self, device: object = None) -> None:
        self.waits = 0

    def wait_stream(self, other: Stream) -> None:
        self.waits += 1


class Recorder:
    """Stands for CUDA's graphs: a captured step leaves no trace, a replay takes it once more."""

    def __init__(self, model: BYOL, optimizer: LARS) -> None:
        self.model, self.optimizer, self.log = model, optimizer, list[str]()
        self.step: GraphedStep | None = None
        self.error: Exception | None = None

    def replay(self) -> None:
        self.log.append("replay")
        taken = self.step._step(self.step._views)
        for into, value in zip(self.step._output, taken, strict=True):
            if value is not None:  # the gradient's norm, which only a guard asks for
                into.copy_(value)

    @contextlib.contextmanager
    def capture(self, graph: object, *, stream: Stream, capture_error_mode: str):
        self.log.append(f"capture {capture_error_mode}")
        tensors = [*self.model.state_dict().values()]
        tensors += [s["momentum_buffer"] for s in self.optimizer.state.values()]
        before = [t.clone() for t in tensors]
        try:
            yield
        finally:
            for t, old in zip(tensors, before, strict=True):
                t.copy_(old)
            if self.error is not None:  # as torch 2.11 does, whatever the step raised
                raise self.error


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch):
    """A plain and a graphed step without a GPU: everything but what CUDA itself does."""
    plain, usual, fast, optimizer = pair(torch.device("cpu"))
    recorder = Recorder(fast, optimizer)
    current = Stream()
    for name, value in {
        "Stream": Stream,
        "current_stream": lambda device: current,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device: recorder.log.append("synchronize"),
        "set_stream": lambda stream: recorder.log.append(f"back on {stream is current}"),
        "CUDAGraph": lambda: recorder,
        "graph": recorder.capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    graphed._stream.cache_clear()
    step = GraphedStep(fast, as_they_stand(fast), optimizer, autocast_dtype=None)
    recorder.step = step
    yield plain, usual, step, recorder
    graphed._stream.cache_clear()


def both(recorded, count: int) -> None:
    """Steps both ways; the losses and the weights are equal."""
    plain, usual, step, _ = recorded
    for x, lr, decay in steps(count, torch.device("cpu")):
        set_lr(usual, lr)
        options = {"accumulate": 1, "decay": decay}
        wanted = train_step(plain, as_they_stand(plain), usual, [x], **options)
        got = step(x, lr=lr, decay=decay)
        torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    # The rate is a float32 tensor there and a number here.
    torch.testing.assert_close(step._model.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)


def test_eleven_steps_as_usual_then_one_capture_and_replays(recorded) -> None:
    """Eleven are what DistributedDataParallel needs before a capture, by torch's notes on graphs;
    each step's views, rate and τ reach the replay."""
    _, _, step, recorder = recorded
    both(recorded, 20)
    assert recorder.log == ["synchronize", "capture thread_local", *["replay"] * (20 - WARM_UP)]
    assert WARM_UP == 11
    assert step._side.waits == WARM_UP


def test_ddp_is_made_on_the_stream_of_the_capture(recorded, monkeypatch) -> None:
    made: list[Stream] = []
    monkeypatch.setattr(torch.cuda, "stream", made.append)
    side_stream(torch.device("cuda:0"))
    assert made == [recorded[2]._side]


def test_a_capture_that_fails_ends_the_run_and_names_the_first_error(
    recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ending the capture raises too: what the step raised is the cause."""
    _, _, step, recorder = recorded
    recorder.error = RuntimeError("capture was invalidated")
    both(recorded, WARM_UP)
    monkeypatch.setattr(step, "_step", fails)
    with pytest.raises(CaptureError) as raised:
        both(recorded, 1)
    words = str(raised.value)
    assert "(RuntimeError: cannot read a value while capturing)" in words
    assert "--run.engine compile" in words and "\n" not in words
    assert recorder.log[-1] == "back on True" and "replay" not in recorder.log
    assert not step.captured


def fails(x: torch.Tensor) -> None:
    raise RuntimeError("cannot read a value while capturing\nand a page of advice")


def test_a_capture_that_only_its_end_refuses_ends_the_run_too(recorded) -> None:
    recorded[-1].error = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(CaptureError, match="operation not permitted"):
        both(recorded, WARM_UP + 4)


@pytest.mark.gpu
@pytest.mark.dist
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_ddp_is_captured_with_its_reduction(tmp_path: Path) -> None:
    """One NCCL rank: the reduction is in the graph, and changes nothing."""
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    try:
        plain, usual, fast, optimizer = pair()
        networks = as_they_stand(fast)
        with side_stream(GPU):  # two ranks, so that it is wrapped; the group has one
            online = data_parallel(networks.online, World(0, 2, torch.device("cuda:0")))
        networks = dataclasses.replace(networks, online=online)
        step = GraphedStep(fast, networks, optimizer, autocast_dtype=None)
        for x, lr, decay in steps(WARM_UP + 9):
            set_lr(usual, lr)
            options = {"accumulate": 1, "decay": decay}
            wanted = train_step(plain, as_they_stand(plain), usual, [x], **options)
            got = step(x, lr=lr, decay=decay)
            torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-3, atol=1e-3)
        assert step._graph is not None
        torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_replayed_steps_are_the_steps(dtype: torch.dtype | None) -> None:
    plain, usual, fast, optimizer = pair()
    step = GraphedStep(fast, as_they_stand(fast), optimizer, autocast_dtype=dtype)
    options = {"accumulate": 1, "autocast_dtype": dtype}
    for x, lr, decay in steps(WARM_UP + 8):
        set_lr(usual, lr)
        wanted = train_step(plain, as_they_stand(plain), usual, [x], decay=decay, **options)
        got = step(x, lr=lr, decay=decay)
        torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-3, atol=1e-3)
    assert step._graph is not None
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_replay_waits_for_nothing() -> None:
    _, _, fast, optimizer = pair()
    step = GraphedStep(fast, as_they_stand(fast), optimizer, autocast_dtype=None)
    for number, (x, lr, decay) in enumerate(steps(WARM_UP + 3)):
        if number > WARM_UP:
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(x, lr=lr, decay=decay)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert step._graph is not None  # a wait in a replay would have raised above


READS_BACK = """
import sys
import torch
from byol_fast.compiled import Networks, as_they_stand
from byol_fast.errors import CaptureError
from byol_fast.graphed import WARM_UP, GraphedStep
from tests.byol_fast.test_graphed import pair, steps

_, _, fast, optimizer = pair()
networks = as_they_stand(fast)
def loss(a, b):
    return (a - b).square().mean() * float(a[0, 0] < 9)
networks = Networks(networks.online, networks.target, loss)
step = GraphedStep(fast, networks, optimizer, autocast_dtype=None)
home = torch.cuda.current_stream()
try:
    for number, (x, lr, decay) in enumerate(steps(WARM_UP + 1)):
        step(x, lr=lr, decay=decay)
except CaptureError as error:
    assert number == WARM_UP and torch.cuda.current_stream() == home
    print(error)
    sys.exit(7)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_that_reads_back_is_not_captured() -> None:
    """In a process of its own: a failed capture leaves one that is fit for nothing more."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", READS_BACK],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 7, done.stderr
    assert "cannot be captured as a CUDA graph" in done.stdout
