"""The command itself: from a folder to an exported backbone, stopped and resumed, and what it says
when it is used wrongly.

One run is a process of its own, as a user starts it; the others are calls in this one, which saves
importing PyTorch. Runs that are killed, signalled or of several ranks are in tests/faults.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT, TINY, assert_same, final, make_folder

from byol_fast.pretrain import main
from byol_fast.watching import metrics


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end without a stop, in a process with hardly an environment."""
    out = tmp_path_factory.mktemp("whole") / "run"
    words = ["--data", folder, "--out", out, *TINY]
    run = subprocess.run(
        [sys.executable, "-m", "byol_fast.pretrain", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (out / "stderr.txt").write_text(run.stderr)
    return out


def pretrain(*words: object) -> int:
    """The exit code; what was said is in capfd."""
    return main([*TINY, *map(str, words)])


def test_a_run_leaves_what_is_promised(whole: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "report.html", "views.npz", "embedding.npz"):
        assert (whole / name).stat().st_size > 0
    status = json.loads((whole / "status.json").read_text())
    assert status == {"state": "done", "step": 24, "total_steps": 24, "reason": ""}
    summary = json.loads((whole / "summary.json").read_text())
    for name in ("knn_raw_pixels", "knn_untrained", "knn_trained"):
        assert 0 <= summary[name] <= 1
    assert summary["images"] == 6 * 64
    assert summary["images_per_second"] > 0
    split = summary["throughput"]
    assert split.keys() == {"decode_wait", "copy", "augment", "step"}
    assert 0 < sum(split.values()) <= 1.05 * summary["training_seconds"]


def test_the_log_has_the_promised_lines(whole: Path) -> None:
    rows = metrics.read(whole / "metrics.jsonl").rows
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 4, 8, 12, 16, 20, 24]
    timing = ("images_per_second", "images_per_second_per_gpu", "data_wait_share")
    gauges = ("grad_norm", "embedding_std", "rankme", "alignment", "uniformity", "probe_loss")
    for name in ("lr", "target_decay", *gauges, *(f"time/{name}" for name in timing)):
        assert all(np.isfinite(row[name]) for row in steps), name
    evaluated = [row["step"] for row in rows if "knn_accuracy" in row]
    assert evaluated == [0, 12, 24]
    assert steps[0]["lr"] == 0.0  # warm-up starts from 0
    assert steps[-1]["target_decay"] > steps[0]["target_decay"]


def test_the_arithmetic_is_logged(whole: Path) -> None:
    assert "16 = 1 rank × 16 × 1" in (whole / "stderr.txt").read_text()


def test_the_exported_backbone_is_the_trained_one(whole: Path) -> None:
    import torchvision

    import byol_fast

    x = torch.randn(2, 3, 32, 32)
    trained = final(whole)["model"]
    for suffix in ("safetensors", "pth"):
        net = byol_fast.load_backbone(
            whole / "exports" / f"backbone.{suffix}",
            **({} if suffix == "safetensors" else {"backbone": "resnet18", "image_size": 32}),
        )
        assert net(x).shape == (2, 512)
        weights = net.state_dict()["layer4.1.conv2.weight"]
        assert torch.equal(weights, trained["online.encoder.backbone.layer4.1.conv2.weight"])
    plain = torchvision.models.resnet18()
    keys = torch.load(whole / "exports" / "backbone.pth", weights_only=True)
    missing, unexpected = plain.load_state_dict(keys, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []


def test_resuming_at_any_step_ends_bitwise_the_same(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    run = ("--data", folder, "--out", tmp_path)
    stops = (7, 12)  # in the middle of an epoch of 4 steps, and at an evaluation
    for stop in stops:
        assert pretrain(*run, "--max-steps", stop) == 0
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["state"], status["step"]) == ("preempted", stop)
    assert pretrain(*run) == 0
    a, b = final(whole), final(tmp_path)
    for state, out in ((a, whole), (b, tmp_path)):
        elapsed = metrics.read(out / "metrics.jsonl").series(metrics.ELAPSED)[1]
        assert elapsed == sorted(elapsed) and state.pop("seconds") >= elapsed[-1] > 0
        for free in ("data", "out"):
            state["config"].pop(free)
        state["config"]["run"].pop("max_steps")
    assert_same(a, b)
    logs = [metrics.reproducible(metrics.read(out / "metrics.jsonl")) for out in (whole, tmp_path)]
    extra = {7}  # a stop logs its own last step
    assert [row for row in logs[1] if row["step"] not in extra] == logs[0]


def test_a_finished_run_repeated_is_done_at_once(whole: Path, folder: Path) -> None:
    before = final(whole)
    assert pretrain("--data", folder, "--out", whole) == 0
    assert_same(before, final(whole))
    assert json.loads((whole / "status.json").read_text())["state"] == "done"
    assert json.loads((whole / "summary.json").read_text())["images_per_second"] > 0


def test_a_folder_with_broken_files_trains_and_names_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(tmp_path / "data", images=64)
    good = (data / "class0" / "000.jpg").read_bytes()
    (data / "class0" / "cut.jpg").write_bytes(good[: len(good) // 2])
    assert pretrain("--data", data, "--out", tmp_path / "run", "--max-steps", 2) == 0
    told = capfd.readouterr().err
    assert "1 broken image" in told and "cut.jpg" in told


def test_unlabelled_images_train(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = make_folder(tmp_path / "data", images=32, classes=1)
    words = ("--data", data / "class0", "--out", tmp_path / "run", "--epochs", 2)
    assert pretrain(*words) == 0
    assert "no labels" in capfd.readouterr().err
    assert "knn_trained" not in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (tmp_path / "run" / "report.html").exists()


def test_one_image_a_class_trains_without_knn(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(tmp_path / "data", images=32, classes=32)
    assert pretrain("--data", data, "--out", tmp_path / "run", "--max-steps", 2) == 0
    assert "without kNN accuracy" in capfd.readouterr().err
    assert "knn" not in (tmp_path / "run" / "metrics.jsonl").read_text()


MISTAKES = {
    "missing path": ("--data /no/such/folder", 4, "/no/such/folder"),
    "empty folder": ("--data EMPTY", 4, "empty"),
    "large batch": ("--data DATA --batch-size 512", 4, "larger than the data set (64"),
    "no backbone": ("--data DATA --backbone resnet51", 2, "did you mean 'resnet50'"),
    "no data": ("", 2, "--data"),
    "typo": ("--data DATA --batchsize 8", 2, "--batch-size"),
    "no gpu": ("--data DATA --device cuda", 2, "--device cpu"),
    "other configuration": ("--data DATA --out WHOLE --base-lr 0.5", 2, "optim.base_lr: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_mend(
    name: str, folder: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if name == "no gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty").mkdir()
    words, code, text = MISTAKES[name]
    places = {"DATA": folder, "EMPTY": tmp_path / "empty", "WHOLE": whole}
    out = () if "--out" in words else ("--out", tmp_path / "run")
    assert pretrain(*out, *(places.get(word, word) for word in words.split())) == code
    told = capfd.readouterr().err
    assert text in told and "Traceback" not in told


def test_other_data_on_resume_is_refused(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = make_folder(tmp_path / "other", seed=5)
    assert pretrain("--data", other, "--out", whole) == 2
    told = capfd.readouterr().err
    assert "belongs to another run" in told and "data: 64 images" in told


@pytest.mark.parametrize("option", [f"--seed={2**63 - 1}", f"--log-every={10**20}"])
def test_the_largest_values_are_taken(option: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([*TINY, "--data", str(folder), "--out", str(out), "--max-steps", "1", option]) == 0
    assert json.loads((out / "status.json").read_text())["step"] == 1


def test_dry_run_prints_the_arithmetic_and_trains_nothing(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pretrain("--data", folder, "--out", tmp_path / "run", "--dry-run") == 0
    said = capfd.readouterr()
    assert "24 steps = 6 epochs × 64 images // 16" in said.out + said.err
    assert not (tmp_path / "run").exists()


def test_dry_run_looks_at_the_network_too(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "--data", str(folder), "--out", str(tmp_path / "run"), "--dry-run"]
    assert main([*words, "--backbone", "resnet19"]) == 2
    assert main([*words, "--hidden-layer", "layer9"]) == 2
    said = capfd.readouterr().err
    assert "resnet19" in said and "layer9" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "package", "message"),
    [
        (("--tracker", "wandb"), "wandb", "W&B is not installed"),
        (("--tracker", "both"), "wandb", "W&B is not installed"),
        (("--backend", "dali:cpu"), "nvidia", "the dali backend needs NVIDIA DALI"),
        (("--backend", "ffcv"), "numba", "the ffcv backend needs FFCV"),
    ],
)
def test_dry_run_misses_the_packages_that_the_run_would_miss(
    folder: Path, tmp_path: Path, capfd, monkeypatch, words, package: str, message: str
) -> None:
    for name in ("dali_source", "dali_graph", "ffcv_source", "ffcv_kernel"):
        monkeypatch.delitem(sys.modules, f"pipelines.sources.{name}", raising=False)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    asked = [*TINY, "--data", str(folder), "--out", str(tmp_path / "run"), "--dry-run"]
    assert main([*asked, *words]) == 2
    said = capfd.readouterr().err
    assert message in said and "Traceback" not in said and not (tmp_path / "run").exists()
