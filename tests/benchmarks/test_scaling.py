"""The prediction for many GPUs: what is sent is what two ranks do send; its arithmetic is right."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faults.harness import free_port
from torch import Tensor

from benchmarks import fps, scaling
from benchmarks.scaling import Assumptions, Messages, predict
from benchmarks.stepping import StepBench, StepSettings
from byol_fast import distributed

SETTINGS = StepSettings("resnet18", 32, 2, precision="fp32", engine="eager")


def _rank(rank: int, port: str, folder: str) -> None:
    """Writes what a step's collectives carry, and how many the profiler sees of any kind."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1")
    bench = StepBench(SETTINGS, distributed.start("cpu"))
    whole, buckets, layers = dist.all_reduce, list[int](), list[int]()

    def counted(tensor: Tensor, **options: Any) -> Any:
        layers.append(tensor.numel() * tensor.element_size())
        return whole(tensor, **options)

    def hook(state, bucket):  # torch wants real types in annotations or none
        buckets.append(bucket.buffer().numel() * bucket.buffer().element_size())
        mean = whole(bucket.buffer().div_(2), async_op=True)
        return mean.get_future().then(lambda done: done.value()[0])

    bench.networks.online.register_comm_hook(None, hook)
    for _ in range(2):  # then the buckets have their final order
        bench.step()
    buckets.clear()
    dist.all_reduce = counted
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        bench.step()
    dist.all_reduce = whole
    names = [e.name for e in profile.events() if e.name.startswith("gloo:")]
    found = {"buckets": buckets, "layers": layers, "collectives": names}
    found["predicted"] = vars(scaling.messages(bench.model, bn_sync=True))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.stop()


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_send_what_the_model_says(in_ranks, tmp_path: Path) -> None:
    in_ranks(_rank, 2, free_port(), tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        said = found["predicted"]
        assert len(said["buckets"]) > 2 and len(said["sums"]) == 22
        assert found["buckets"] == said["buckets"]
        assert found["layers"][: len(said["statistics"])] == said["statistics"]
        assert found["layers"][len(said["statistics"]) :] == said["sums"][::-1]
        count = len(said["buckets"]) + len(said["statistics"]) + len(said["sums"])
        assert found["collectives"] == ["gloo:all_reduce"] * count  # and nothing else


SENT = Messages([1_000_000, 30_000_000, 9_000_000], [4096] * 10, [2048] * 5)
EXACT = Assumptions(
    link_gb_s=100, network_gb_s=10, link_us=10, network_us=30, overlap=1, contention=0
)


def made(**changes: Any) -> dict[str, Any]:
    usual = {"step_ms": 100.0, "batch": 256, "gpus": 2, "nodes": 1, "bn_sync": "none"}
    return predict(SENT, **{**usual, "given": EXACT, **changes})


def test_one_gpu_sends_nothing() -> None:
    row = made(gpus=1, bn_sync="world")
    assert (row["step_ms"], row["efficiency"], row["bn_sync_messages"]) == (100.0, 1.0, 0)
    assert row["images_per_second"] == pytest.approx(2560)


def test_gradients_hide_but_for_the_last_bucket() -> None:
    row = made()
    # Two ranks send each byte once: .01 + .01, .01 + .3 and .01 + .09 ms.
    assert row["gradients_ms"] == pytest.approx(0.43)
    assert row["gradients_exposed_ms"] == pytest.approx(0.10)
    assert row["step_ms"] == pytest.approx(100.10)
    short = made(step_ms=0.4)  # a backward of .2 ms hides no more than that
    assert short["gradients_exposed_ms"] == pytest.approx(0.43 - 0.2)


def test_batchnorm_waits_for_every_message() -> None:
    world = made(nodes=2, bn_sync="world")
    group = made(nodes=2, bn_sync="group")
    bytes_ = 10 * 4096 + 5 * 2048
    inside = 15 * 0.010 + bytes_ / 100e6
    assert group["bn_sync_ms"] == pytest.approx(inside)
    assert world["bn_sync_ms"] == pytest.approx(inside + 15 * 0.030 + bytes_ / 2 / 10e6)
    assert made(nodes=2)["bn_sync_ms"] == 0


def test_too_few_cores_are_what_limits() -> None:
    few = made(given=Assumptions(cores=2, images_per_core=500))
    assert few["loader_limits"] and few["images_per_second_per_gpu"] == 1000
    assert not made()["loader_limits"]


def test_the_command_prints_its_assumptions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = ["--backbone", "resnet18", "--image-size", "32", "--nodes", "4"]
    file = tmp_path / "s.json"
    assert scaling.main([*small, "--step-ms", "100", "--cores", "8", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Prediction, not a measurement")
    for word in ("100.0 ms, given", "assumed: 300 GB/s", "8 cores a GPU", "32 GPU(s)", "1 GPU(s)"):
        assert word in text
    saved = json.loads(file.read_text())["projection"]
    assert saved["prediction"] and saved["assumptions"]["cores"] == 8
    assert [row["ranks"] for row in saved["rows"]] == [1, 8, 32]
    with pytest.raises(SystemExit) as ending:
        scaling.main(["--gpus", "0"])
    assert ending.value.code == 2


def test_fps_takes_a_measured_step_of_a_gpu_and_no_processors() -> None:
    options = fps.arguments(["--project", "8", "--nodes", "2"])
    cpu, gpu = (distributed.World(0, 1, torch.device(kind)) for kind in ("cpu", "cuda"))
    step = {"step_ms": [79.0, 80.0, 81.0]}
    assumed = fps.projection(options, SETTINGS, cpu, step)
    assert assumed["settings"]["backbone"] == "resnet50" and "assumed" in assumed["step_source"]
    measured = fps.projection(options, SETTINGS, gpu, step)
    assert measured["settings"]["backbone"] == "resnet18"
    assert measured["rows"][0]["step_alone_ms"] == 80.0
    result = {"target_fps": fps.TARGET, "modes": {}, "projection": measured}
    assert [line.split(":")[0] for line in fps.verdict(result)[1:]] == [
        "predicted for 8 GPUs",
        "predicted for 16 GPUs",
    ]
