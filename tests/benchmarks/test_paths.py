"""A figure names the path that ran, and one of another path than was asked for is none."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    ablation,
    counted,
    feeding,
    fps,
    hardware,
    kernels,
    optimizers,
    peers,
    stepping,
)
from benchmarks.stepping import OtherPath, StepBench, StepSettings
from byol_fast.compiled import Networks, as_they_stand
from byol_fast.distributed import World
from byol_fast.errors import CaptureError
from byol_fast.model import BYOL

CPU = World(0, 1, torch.device("cpu"))
GPU = torch.device("cuda", 0)
SMALL = StepSettings("resnet18", 32, 2, precision="fp32", engine="eager")
TINY = ["--device", "cpu", "--batch-size", "2", "--steps", "1"]
COMPILE = [*TINY, "--engine", "compile"]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that could not be compiled, as training goes on with them."""
    monkeypatch.setattr(stepping, "compiled", lambda model, *_, **__: as_they_stand(model))


@pytest.fixture
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device could do at most takes seconds to find, and is not the question."""
    monkeypatch.setattr(counted, "work_of_an_image", lambda settings: (1.0, 1.0))
    monkeypatch.setattr(hardware, "matmul_flops", lambda *_: 1.0)
    monkeypatch.setattr(hardware, "copy_bytes", lambda *_: 1.0)


def test_eager_networks_are_no_figure_of_compiled_ones(no_compiler: None) -> None:
    bench = StepBench(stepping.replace(SMALL, engine="compile"), CPU)
    assert bench.engine_ran == "eager"
    with pytest.raises(OtherPath, match="engine compile was asked for and eager ran"):
        bench.warm_up(1)


@pytest.mark.parametrize(
    ("seconds", "captured", "ran"),
    [(2.0, True, "graph"), (2.0, False, "compile"), (None, True, "graph of eager networks")],
)
def test_a_graph_is_one_where_it_was_captured(
    seconds: float | None, captured: bool, ran: str
) -> None:
    bench = StepBench(SMALL, CPU)
    bench.settings = stepping.replace(SMALL, engine="graph")
    bench.compile_seconds, bench.graphed = seconds, SimpleNamespace(captured=captured)
    assert bench.engine_ran == ran
    if ran == "graph":
        bench.check_engine()
        return
    with pytest.raises(OtherPath, match=f"engine graph was asked for and {ran} ran"):
        bench.check_engine()


def test_fps_fails_and_leaves_no_row_of_another_path(
    no_compiler: None, no_limits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fps.json"
    assert fps.main([*COMPILE, "--json", str(file)]) == 1
    assert "error: engine compile was asked for and eager ran" in capsys.readouterr().err
    written = json.loads(file.read_text())
    assert written["modes"] == {} and written["command"]


def test_fps_fails_where_the_step_cannot_be_captured(
    no_limits: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise CaptureError("the step cannot be captured")

    monkeypatch.setattr(stepping, "measure", fails)
    assert fps.main(TINY) == 1
    assert "cannot be captured" in capsys.readouterr().err


def test_peers_fail_and_leave_no_row(no_compiler: None, tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    assert peers.main([*COMPILE, "--json", str(file)]) == 1
    assert not file.exists()


def test_an_ablation_with_a_row_that_failed_has_failed(
    no_compiler: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ablation, "_gain", lambda pair, *_: [b.warm_up(1) for b in pair])
    file = tmp_path / "ablation.json"
    assert ablation.main([*TINY, "--only", "compiled", "--json", str(file)]) == 1
    assert "failed: compiled" in capsys.readouterr().err
    row = json.loads(file.read_text())["gains"]["compiled"]
    assert "eager ran" in row["failed"]


def test_no_row_is_measured_after_a_failed_capture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise CaptureError("the step cannot be captured")

    monkeypatch.setattr(ablation, "StepBench", fails)
    file = tmp_path / "ablation.json"
    assert ablation.main([*TINY, "--json", str(file)]) == 1
    assert "cannot be captured" in capsys.readouterr().err
    gains = json.loads(file.read_text())["gains"]
    assert list(gains) == [ablation.CHANGES[0].name]


def test_nothing_is_measured_on_a_lost_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every further row would be the same error under another name."""

    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    lost = World(0, 1, GPU)
    monkeypatch.setattr(ablation, "StepBench", fails)
    monkeypatch.setattr(optimizers, "_update", fails)
    with pytest.raises(RuntimeError, match="cuda:0 is lost"):
        ablation.measure(SMALL, lost, steps=1, warm_up=0)
    with pytest.raises(RuntimeError, match="cuda:0 is lost"):
        optimizers.measure(SMALL, GPU, steps=1)


def test_peers_write_their_rows_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "lightly", lambda *_: (lambda: None, lambda: None))
    monkeypatch.setattr(peers, "lucidrains", lambda *_: 1 / 0)
    monkeypatch.setattr(hardware, "step_seconds", lambda *_: np.ones(1))
    seen: list[set[str]] = []
    peers.measure(SMALL, CPU, steps=1, warm_up=0, each=lambda rows: seen.append(set(rows)))
    assert seen[:3] == [
        {"byol_fast"},
        {"byol_fast", "lightly, as shipped"},
        {"byol_fast", "lightly, as shipped", "byol-pytorch, as shipped"},
    ]


@pytest.mark.parametrize("events", [[], ["aten::add", "cudaMemcpyAsync"]])
def test_counters_that_are_missing_are_not_zero(
    monkeypatch: pytest.MonkeyPatch, events: list[str]
) -> None:
    class Profile:
        def __init__(self, **_: Any) -> None:
            self.names = events

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def events(self) -> list[Any]:
            return [SimpleNamespace(name=name) for name in self.names]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert hardware.launches_and_waits(lambda: None, GPU) == (None, None)
    events += ["cudaLaunchKernel"] * 6 + ["cudaStreamSynchronize"] * 4
    assert hardware.launches_and_waits(lambda: None, GPU) == (2, 1)


def test_a_row_of_the_pipeline_names_its_parts(tmp_path: Path) -> None:
    row = feeding.measure(
        "synthetic:8", SMALL, CPU, backend="auto", steps=1, warm_up=1, train=False
    )
    assert (row["source"], row["decoder"]) == ("SyntheticSource", None)
    assert row["augmentation"] == "reference" and row["engine_ran"] is None


def test_a_compiled_step_on_a_cpu_has_a_row_without_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compiled(model: BYOL, *_: object, **__: object) -> Networks:
        return stepping.replace(as_they_stand(model), compile_seconds=1.0)

    monkeypatch.setattr(stepping, "compiled", compiled)
    monkeypatch.setattr(hardware, "launches_and_waits", lambda *_: 1 / 0)
    limits = dict.fromkeys(
        ("flops", "bytes", "flop_of_an_image", "bytes_of_an_image", "kept_of_an_image"), 1.0
    )
    settings = stepping.replace(SMALL, engine="compile")
    row = stepping.measure(settings, CPU, steps=1, warm_up=1, limits=limits)
    assert (row["engine_ran"], row["launches"], row["host_waits"]) == ("compile", None, None)


def test_generated_images_are_a_batch_at_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(feeding, "generate", lambda folder, images: asked.append(images))
    (tmp_path / "two").mkdir()
    feeding.generated(tmp_path, 256)
    feeding.generated(tmp_path / "two", 8)
    assert asked == [256, 200]


def test_one_rank_takes_the_kernels_of_many() -> None:
    bench = StepBench(stepping.replace(SMALL, grouped=8), CPU)
    try:
        shared = [m for m in bench.model.modules() if getattr(m, "sync", False)]
        assert shared and all(layer._group().size() == 8 for layer in shared)
        assert bench.step().loss.isfinite()
    finally:
        torch.distributed.destroy_process_group()


NAMES = {
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32": "convolutions",
    "cudnn_infer_ampere_scudnn_128x64_dgrad": "convolutions",
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "convolutions",
    "triton_red_fused__native_batch_norm_legit_functional_12": "reductions",
    "triton_poi_fused_add_relu_7": "element-wise",
    "_apply": "LARS and average",
    "_norms": "LARS and average",
    "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>": "layout conversions",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "collectives",
    "Memcpy DtoD (Device -> Device)": "copies and fills",
    "something new": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_put_into_classes_by_name(name: str) -> None:
    assert kernels.class_of(name) == NAMES[name]


def test_a_class_is_shown_beside_what_is_expected_of_it() -> None:
    seen = [("triton_red_a", 500.0), ("triton_red_a", 500.0), ("triton_red_b", 1000.0)]
    seen.append(("sm90_xmma_fprop", 4000.0))
    result = kernels.table(
        seen,
        steps=2,
        batch=10,
        limits={"bytes": 4e9, "flops": 1e12, "flop_of_an_image": 1e8},
        expected={"reductions": 2e5, "convolutions": 4e5},
    )
    assert list(result["classes"]) == ["convolutions", "reductions"]  # slowest first
    row = result["classes"]["reductions"]
    assert (row["ms"], row["launches"], row["expected_mb_per_image"]) == (1.0, 1.5, 0.2)
    assert row["share_of_copy"] == pytest.approx(0.5)  # 2 MB in a millisecond, of 4 GB/s
    assert result["classes"]["convolutions"]["share_of_matmul"] == pytest.approx(0.5)
    assert [row["name"] for row in result["kernels"]][:2] == ["sm90_xmma_fprop", "triton_red_a"]
