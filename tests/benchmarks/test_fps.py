"""fps.py and its parts run here, small, and their arithmetic is right."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    ablation,
    counted,
    feeding,
    fps,
    hardware,
    optimizers,
    peer_updates,
    peers,
    stepping,
)
from benchmarks.stepping import StepSettings
from byol_fast.distributed import World
from byol_fast.model import BYOL
from byol_fast.optim import LARS, param_groups

TINY = ["--device", "cpu", "--batch-size", "2", "--steps", "2", "--image-size", "64"]
TINY += ["--backbone", "resnet18"]
CPU = World(0, 1, torch.device("cpu"))
SMALL = StepSettings("resnet18", 32, 2, precision="fp32", engine="eager")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Every mode without peers, run once; `text` is what stood on the terminal."""
    folder = tmp_path_factory.mktemp("fps")
    modes = ["--mode", "step", "loader", "e2e", "linear-eval", "optim"]
    files = ["--json", str(folder / "fps.json"), "--chart", str(folder / "fps.svg")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(feeding, "_GENERATED", 6)
        done = fps.main([*TINY, "--target-fps", "0.001", "--project", "8", *modes, *files])
    assert done == 0
    ElementTree.parse(folder / "fps.svg")
    return {**json.loads((folder / "fps.json").read_text()), "text": text.getvalue()}


@pytest.mark.slow
def test_every_mode_leaves_a_rate_and_its_spread(result: dict) -> None:
    for mode in ("step", "loader", "e2e", "linear-eval"):
        row = result["modes"][mode]
        low, middle, high = row["images_per_second_per_gpu"]
        assert 0 < low <= middle <= high
        assert row["n"] == 2
    assert result["modes"]["step"]["loss_is_finite"]
    assert result["modes"]["step"]["engine_ran"] == "eager"
    e2e = result["modes"]["e2e"]
    ran = [e2e[name] for name in ("source", "decoder", "augmentation", "engine_ran")]
    assert ran == ["TorchSource", "simplejpeg", "reference", "eager"]
    assert result["modes"]["e2e"]["bad"] == 0
    optim = result["modes"]["optim"]
    assert set(optim) == {*optimizers.OURS, *peer_updates.PEERS}
    assert optim["foreach"]["over_foreach"] == [1.0, 1.0, 1.0]
    assert optim["foreach"]["host_waits"] == 0 < optim["solo-learn's loops"]["host_waits"]
    assert result["command"].startswith("python benchmarks/fps.py")


@pytest.mark.slow
def test_the_table_has_what_is_promised(result: dict, capsys: pytest.CaptureFixture[str]) -> None:
    row = result["modes"]["step"]
    assert row["host_waits"] == 0
    assert 0 < row["flop_share"] < 2 and row["byte_share_estimate"] > 0
    assert row["kept_mb_per_image_counted"] > 0
    assert row["forwards_per_second"] == pytest.approx(8 * row["images_per_second"], rel=1e-3)
    assert 0 <= result["modes"]["e2e"]["wait_share"] <= 1
    on_any_device = (
        "images/s per GPU",
        "in all",
        "ms a step",
        "waiting for data",
        "engine ran: eager",
        "augmentation: reference",
        "waits of the host a step",
        "of a matrix product's FLOP/s",
        "of a copy's bytes/s",
        "forwards/s",
        "kept for backward",
        "Prediction, not a measurement",
        *result["verdict"],
        result["bottleneck"],
    )
    assert [words for words in on_any_device if words not in result["text"]] == []
    gpu = {"launches": 412, "peak_gb": 61.5, "mb_per_image": 90.25, "activation_mb_per_image": 81.5}
    fps.show_mode("step", {**row, **gpu, "host_waits": 0, "compile_seconds": 58.0})
    text = capsys.readouterr().out
    for words in (
        "412 launches a step",
        "0 waits of the host",
        "61.5 GiB at most",
        "90.25 MiB an image",
        "81.5 MiB of activations an image",
        "58 s to compile",
    ):
        assert words in text


@pytest.mark.slow
def test_the_verdict_names_each_mode_and_the_target(result: dict) -> None:
    assert "0 images/s per GPU" in result["verdict"][0]
    rates, predictions = result["verdict"][1:5], result["verdict"][5:]
    assert [line.partition(":")[0] for line in rates] == ["step", "loader", "e2e", "linear-eval"]
    assert all(line.endswith("met") for line in rates)
    assert [line.partition(":")[0] for line in predictions] == ["predicted for 8 GPUs"]


def test_a_run_that_is_ended_leaves_the_modes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(mode: str, *args: object) -> dict:
        if mode == "linear-eval":
            raise KeyboardInterrupt
        return {"foreach": {"text": "1 ms"}}

    monkeypatch.setattr(fps, "_measure", measured)
    file = tmp_path / "fps.json"
    with pytest.raises(KeyboardInterrupt):
        fps.main([*TINY, "--mode", "optim", "linear-eval", "--json", str(file)])
    assert list(json.loads(file.read_text())["modes"]) == ["optim"]


def made(**modes: dict) -> dict:
    return {"target_fps": fps.TARGET, "modes": modes}


STEP = {
    "images_per_second_per_gpu": [600.0, 675.0, 700.0],
    "host_share": 0.2,
    "launches": 900,
    "flop_share": 0.3,
    "byte_share_estimate": 0.6,
    "engine_ran": "eager",
}


def test_the_target_is_explained_and_just_missed() -> None:
    head, line = fps.verdict(made(step=STEP))
    assert "676" in head and "linear evaluation" in head and "8 such forwards" in head
    assert line == "step: 675.0 images/s per GPU, 1.00x: missed"


@pytest.mark.parametrize(
    ("modes", "words"),
    [
        ({"step": STEP, "e2e": {"wait_share": 0.3}}, "30% of the time for data"),
        ({"step": STEP, "e2e": {"wait_share": 0.01}}, "--engine compile"),
        ({"step": {**STEP, "host_share": 0.95}}, "900 launches"),
        ({"step": {**STEP, "flop_share": 0.7}}, "Arithmetic limits"),
        ({"step": {**STEP, "engine_ran": "compile"}}, "fewer passes"),
        ({"step": {**STEP, "host_share": 0.95, "launches": None}}, "of a step; use"),
        ({"loader": STEP}, "675 images/s to each rank"),
        ({}, "No step was measured"),
    ],
    ids=[
        *("data", "memory", "launches", "arithmetic", "compiled", "uncounted", "loader", "nothing")
    ],
)
def test_one_sentence_names_the_bottleneck(modes: dict, words: str) -> None:
    sentence = fps.bottleneck(made(**modes))
    assert words in sentence
    assert sentence.endswith(".")


def test_wrong_usage_and_data_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert fps.main([*TINY, "--mode", "loader", "--data", str(tmp_path / "none")]) == 4
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ending:
        fps.main(["--steps", "0"])
    assert ending.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    assert fps.main(["--device", "cuda"]) == 2


def test_resnet50_takes_the_flops_and_bytes_that_are_known() -> None:
    """8.2 GFLOP a forward at 224 pixels; 8 of them less the first layer's input gradient, and the
    heads. Traffic: 979 MB counted by hand at this fusion, with the sums after layers."""
    settings = StepSettings()
    assert counted.bytes_of_an_image(settings) == pytest.approx(0.9e9, rel=0.15)
    flop, kept = counted.work_of_an_image(StepSettings(image_size=64))
    assert flop == pytest.approx(64.9e9 * (64 / 224) ** 2, rel=0.03)
    # Two views of each convolution's input and output in two bytes: 2 x 21.6 M values at 224.
    assert kept == pytest.approx(2 * 2 * 21.6e6 * (64 / 224) ** 2, rel=0.1)


def test_one_pass_and_two_give_the_same_loss() -> None:
    losses = []
    for one_pass in (True, False):
        bench = stepping.StepBench(stepping.replace(SMALL, batch=4, one_pass=one_pass), CPU)
        losses.append(float(bench.step().loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_step_times_and_limits_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    seconds = hardware.step_seconds(lambda: calls.append(1), CPU.device, 5)
    assert len(calls) == len(seconds) == 5
    assert (seconds >= 0).all()
    assert hardware.percentiles(np.arange(11.0)) == [2.0, 5.0, 8.0]
    monkeypatch.setattr(hardware, "best_seconds", lambda call, device: (call(), 0.5)[1])
    assert hardware.matmul_flops(CPU.device, torch.float32) == 2 * 1024**3 / 0.5
    assert hardware.copy_bytes(CPU.device) == 2 * 2**26 / 0.5


@pytest.mark.slow
def test_ablation_compares_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(change.with_it != change.without for change in ablation.CHANGES)
    some = [c for c in ablation.CHANGES if c.name in ("both views in one pass", "captured")]
    monkeypatch.setattr(ablation, "CHANGES", some)
    gains = ablation.measure(SMALL, CPU, steps=1, warm_up=0)
    assert set(gains) == {change.name for change in ablation.CHANGES}
    for change in some:
        assert ("gain" in gains[change.name]) == ("cpu" in change.devices)
        assert gains[change.name]["predicted"] == change.predicted


@pytest.mark.slow
def test_peers_take_turns_and_the_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    monkeypatch.setitem(__import__("sys").modules, "byol_pytorch", None)
    rows = peers.measure(SMALL, CPU, steps=1, warm_up=0)
    for name in ("byol_fast", "lightly, as shipped", "lightly, channels_last"):
        assert rows[name]["images_per_second_per_gpu"][1] > 0
        # Three rounds, one more when it was made, and ours beside each of the others then.
        assert rows[name]["n"] == (6 if name == "byol_fast" else 4)
        assert rows[name]["first_step_seconds"] > 0
    assert rows["byol_fast"]["ours_over_theirs"] == [1.0, 1.0, 1.0]
    assert "left out" in rows["byol-pytorch, as shipped"]["text"]


def test_peers_stop_making_rows_when_time_is_over() -> None:
    rows = peers.measure(SMALL, CPU, steps=1, warm_up=0, budget=-1.0)
    assert {row["text"] for row in rows.values()} == {"left out: no time"}


@pytest.mark.parametrize("name", peer_updates.PEERS)
def test_a_peers_update_is_a_step_of_lars_and_an_average(name: str) -> None:
    """One step from zero momentum: as ours, but for the norms being summed and the limit."""
    if name == "lightly":
        pytest.importorskip("lightly", reason="lightly is not installed")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8), torch.nn.Flatten())
    model = BYOL(net, image_size=8, projector=(8, 4), predictor=(8, 4))
    for p in model.online.parameters():
        p.grad = torch.randn_like(p)
    ours = copy.deepcopy(model)
    for p, q in zip(ours.online.parameters(), model.online.parameters(), strict=True):
        p.grad = q.grad.clone()
    LARS(param_groups(ours.online, 1.5e-6), 0.1, norm="sum").step_and_average(
        ours.target_ema_params(), ours.online_ema_params(), 0.99
    )
    peer_updates.PEERS[name](model)()
    if name == "lightly":
        torch.testing.assert_close(model.state_dict(), ours.state_dict(), rtol=1e-5, atol=1e-7)
        return
    for p, q in zip(model.online.parameters(), ours.online.parameters(), strict=True):
        assert p.ndim > 1 or torch.equal(p, q)  # biases and norms: plain SGD
    for p, q in zip(model.target_ema_params(), model.online_ema_params(), strict=True):
        assert not torch.equal(p, q)
