"""The command itself: from a folder to an exported backbone, stopped and resumed, on one or two
ranks, and what it says when it is used wrongly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT, TINY, assert_same, final, make_folder

from byol_fast.pretrain import main
from byol_fast.watching import metrics
from pipelines.sources import dali_available, ffcv_available

NO_DALI = pytest.mark.skipif(not dali_available(), reason="NVIDIA DALI is not installed")
NO_FFCV = pytest.mark.skipif(not ffcv_available(), reason="FFCV is not installed")


@pytest.fixture(scope="module")
def losses() -> dict[str, list[float]]:
    """What each backend's run lost; torch's comes first."""
    return {}


def finished(run: subprocess.CompletedProcess[str]) -> None:
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def whole(folder: Path, pretrain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end without a stop."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run = pretrain(["--data", folder, "--out", out, *TINY])
    finished(run)
    (out / "stderr.txt").write_text(run.stderr)
    return out


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


@pytest.mark.parametrize("stops", [(1,), (7,), (12, 23)])
def test_resuming_at_any_step_ends_bitwise_the_same(
    whole: Path, folder: Path, pretrain, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    for stop in stops:  # 7 and 23 lie in the middle of an epoch of 4 steps
        finished(pretrain(["--data", folder, "--out", tmp_path, *TINY, "--max-steps", stop]))
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["state"], status["step"]) == ("preempted", stop)
    finished(pretrain(["--data", folder, "--out", tmp_path, *TINY]))
    a, b = final(whole), final(tmp_path)
    for state in (a, b):
        state.pop("seconds")
        for free in ("data", "out"):
            state["config"].pop(free)
        state["config"]["run"].pop("max_steps")
    assert_same(a, b)
    logs = [metrics.reproducible(metrics.read(out / "metrics.jsonl")) for out in (whole, tmp_path)]
    extra = {stop for stop in stops} - {1, 12}  # a stop logs its own last step
    assert [row for row in logs[1] if row["step"] not in extra] == logs[0]


def test_kill_and_repeat_ends_bitwise_the_same(
    whole: Path, folder: Path, pretrain, tmp_path: Path
) -> None:
    args = ["--data", folder, "--out", tmp_path, *TINY, "--checkpoint.every", "5"]
    victim = subprocess.Popen(
        [sys.executable, "-m", "byol_fast.pretrain", *map(str, args)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "checkpoints").glob("step-*.pt")):
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    finished(pretrain(args))
    assert_same(final(whole)["model"], final(tmp_path)["model"])
    assert_same(final(whole)["optimizer"], final(tmp_path)["optimizer"])


def test_sigterm_saves_and_exits_75(folder: Path, pretrain, tmp_path: Path) -> None:
    args = ["--data", folder, "--out", tmp_path, *TINY, "--epochs", "500"]
    run = subprocess.Popen(
        [sys.executable, "-m", "byol_fast.pretrain", *map(str, args)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    deadline = time.monotonic() + 120
    while "loss" not in (
        (tmp_path / "metrics.jsonl").read_text() if list(tmp_path.glob("m*")) else ""
    ):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 75, errors
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "preempted" and "SIGTERM" in status["reason"]
    assert final(tmp_path)["step"] == status["step"]


@pytest.mark.dist
def test_two_ranks_under_torchrun_train_like_one(folder: Path, pretrain, tmp_path: Path) -> None:
    """The same images in the same micro-batches; bn_sync makes two ranks one batch of 16.

    Sums are taken in another order, so equality is up to rounding that 3 steps have amplified.
    """
    args = ["--data", folder, *TINY, "--max-steps", "3", "--log-every", "1", "--base-lr", "0.05"]
    finished(pretrain([*args, "--out", tmp_path / "one"]))
    finished(pretrain([*args, "--out", tmp_path / "two"], ranks=2))
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    losses = [
        [
            row["loss"]
            for row in metrics.read(tmp_path / name / "metrics.jsonl").rows
            if "loss" in row
        ]
        for name in ("one", "two")
    ]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    for name, value in one["model"].items():
        if value.is_floating_point():
            torch.testing.assert_close(two["model"][name], value, atol=2e-3, rtol=2e-3, msg=name)


@pytest.mark.dist
def test_resume_on_another_number_of_ranks(folder: Path, pretrain, tmp_path: Path) -> None:
    args = ["--data", folder, "--out", tmp_path, *TINY]
    finished(pretrain([*args, "--max-steps", "5"], ranks=2))
    run = pretrain(args)
    finished(run)
    assert "resumed at step 5 of 24" in run.stderr
    assert final(tmp_path)["step"] == 24


def test_a_finished_run_repeated_is_done_at_once(whole: Path, folder: Path, pretrain) -> None:
    before = final(whole)
    finished(pretrain(["--data", folder, "--out", whole, *TINY]))
    assert_same(before, final(whole))
    assert json.loads((whole / "status.json").read_text())["state"] == "done"
    assert json.loads((whole / "summary.json").read_text())["images_per_second"] > 0


def test_a_folder_with_broken_files_trains_and_names_them(pretrain, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data", images=64)
    good = (data / "class0" / "000.jpg").read_bytes()
    (data / "class0" / "cut.jpg").write_bytes(good[: len(good) // 2])
    run = pretrain(["--data", data, "--out", tmp_path / "run", *TINY, "--max-steps", "2"])
    finished(run)
    assert "1 broken image" in run.stderr and "cut.jpg" in run.stderr


def test_unlabelled_images_train(pretrain, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data", images=32, classes=1)
    run = pretrain(["--data", data / "class0", "--out", tmp_path / "run", *TINY])
    finished(run)
    assert "no labels" in run.stderr
    assert "knn_trained" not in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (tmp_path / "run" / "report.html").exists()


def test_one_image_a_class_trains_without_knn(pretrain, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data", images=32, classes=32)
    run = pretrain(["--data", data, "--out", tmp_path / "run", *TINY, "--max-steps", "2"])
    finished(run)
    assert "without kNN accuracy" in run.stderr
    assert "knn" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "backend",
    [
        "torch",
        pytest.param("dali", marks=[pytest.mark.dali, NO_DALI]),
        pytest.param("ffcv", marks=[pytest.mark.ffcv, NO_FFCV]),
    ],
)
def test_every_backend_trains_from_one_beton(
    backend: str, pretrain, folder: Path, tmp_path: Path, losses: dict[str, list[float]]
) -> None:
    beton, out = tmp_path / "train.beton", tmp_path / "run"
    command = [sys.executable, "-m", "pipelines.convert", str(folder), str(beton)]
    subprocess.run(command, check=True, capture_output=True)
    short = ["--max-steps", "4", "--log-every", "1", "--eval-every", "0"]
    run = pretrain(["--data", beton, "--out", out, *TINY, *short, "--backend", backend])
    finished(run)
    assert f"cut by the {backend} backend" in run.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses[backend] = [row["loss"] for row in rows if "loss" in row]
    assert len(losses[backend]) == 4
    # The same rows and windows; pixels that differ by a level or so.
    assert losses[backend] == pytest.approx(losses["torch"], rel=0.05)


def mistake(name: str, folder: Path, whole: Path, tmp_path: Path) -> tuple[list[str], int, str]:
    """Arguments, exit code and a pattern of the message for each mistake."""
    (tmp_path / "empty").mkdir()
    data, out = ["--data", str(folder)], ["--out", str(tmp_path / "run")]
    return {
        "missing path": ([*out, "--data", "/no/such/folder"], 4, "/no/such/folder"),
        "empty folder": ([*out, "--data", str(tmp_path / "empty")], 4, "empty"),
        "large batch": ([*data, *out, "--batch-size", "512"], 4, "larger than the data set (64"),
        "no backbone": ([*data, *out, "--backbone", "resnet51"], 2, "did you mean 'resnet50'"),
        "no data": (out, 2, "--data"),
        "typo": ([*data, *out, "--batchsize", "8"], 2, "--batch-size"),
        "no gpu": ([*data, *out, "--device", "cuda"], 2, "--device cpu"),
        "other configuration": (
            [*data, "--out", str(whole), "--base-lr", "0.5"],
            2,
            "optim.base_lr: ",
        ),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "missing path",
        "empty folder",
        "large batch",
        "no backbone",
        "no data",
        "typo",
        "no gpu",
        "other configuration",
    ],
)
def test_a_mistake_is_told_with_its_mend(
    name: str, folder: Path, whole: Path, pretrain, tmp_path: Path
) -> None:
    if name == "no gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    args, code, text = mistake(name, folder, whole, tmp_path)
    run = pretrain([*TINY, *args])
    assert run.returncode == code, run.stderr
    assert text in run.stderr
    assert "Traceback" not in run.stderr


def test_other_data_on_resume_is_refused(whole: Path, pretrain, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", seed=5)
    run = pretrain(["--data", other, "--out", whole, *TINY])
    assert run.returncode == 2
    assert "belongs to another run" in run.stderr and "data: 64 images" in run.stderr


def test_no_loadable_checkpoint_is_exit_3(folder: Path, pretrain, tmp_path: Path) -> None:
    args = ["--data", folder, "--out", tmp_path, *TINY]
    finished(pretrain([*args, "--max-steps", "2"]))
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    run = pretrain(args)
    assert run.returncode == 3
    assert "step-00000002.pt" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("option", [f"--seed={2**63 - 1}", f"--log-every={10**20}"])
def test_the_largest_values_are_taken(option: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([*TINY, "--data", str(folder), "--out", str(out), "--max-steps", "1", option]) == 0
    assert json.loads((out / "status.json").read_text())["step"] == 1


def test_dry_run_prints_the_arithmetic_and_trains_nothing(
    folder: Path, pretrain, tmp_path: Path
) -> None:
    run = pretrain(["--data", folder, "--out", tmp_path / "run", *TINY, "--dry-run"])
    finished(run)
    assert "24 steps = 6 epochs × 64 images // 16" in run.stdout + run.stderr
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
