"""A mistake on a benchmark's command line is one line and exit code 2, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import ablation, augment, feeding, fps, loader, overhead, peers, scaling

CPU = ["--device", "cpu", "--batch-size", "2", "--steps", "1"]
SMALL = [*CPU, "--backbone", "resnet18", "--image-size", "32"]
MISTAKES = [
    (fps.main, [*CPU, "--backbone", "resnet19"], "unknown backbone 'resnet19': did you mean"),
    (fps.main, [*CPU, "--engine", "graph"], "there is no GPU"),
    (fps.main, [*SMALL, "--mode", "loader", "--backend", "nosuch"], "backend is auto, torch, dali"),
    (fps.main, ["--nodes", "4"], "--nodes is of --project"),
    (fps.main, ["--target-fps", "nan"], "--target-fps is above 0"),
    (peers.main, [*CPU, "--backbone", "resnet19"], "unknown backbone 'resnet19': did you mean"),
    (peers.main, [*CPU, "--engine", "graph"], "there is no GPU"),
    (ablation.main, [*CPU, "--engine", "compile"], "unrecognized arguments: --engine compile"),
    (scaling.main, ["--step-ms", "0"], "above 0"),
    (scaling.main, ["--image-size", "-1"], "above 0"),
    (augment.main, ["--rounds", "0"], "--rounds is at least 1"),
    (augment.main, ["--batch-size", "-1"], "--batch-size is at least 1"),
    (loader.main, ["--image-size", "0"], "at least 1"),
    (overhead.main, ["--steps", "0"], "--steps is at least 2"),
    (overhead.main, ["--", "--recipe", "quickstrat"], "did you mean quickstart"),
    (overhead.main, ["--steps", "5", "--", "--recipe", "quickstart"], "--log-every 10"),
]


@pytest.mark.parametrize(
    ("main", "words", "said"), MISTAKES, ids=[f"{m.__module__}{w[-2:]}" for m, w, _ in MISTAKES]
)
def test_a_mistake_is_one_line(
    main: Callable[[list[str]], object],
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feeding, "_GENERATED", 2)
    try:
        code = main(words)
    except SystemExit as ending:
        code = ending.code
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "error: " in last and said in last


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("main", [peers.main, ablation.main])
def test_a_gpu_that_is_not_there(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--device", "cuda"]) == 2
    assert "no CUDA device is visible" in capsys.readouterr().err


def test_an_ablation_that_measures_nothing_has_failed(tmp_path: Path) -> None:
    words = [*CPU, "--backbone", "resnet19", "--json", str(tmp_path / "a.json")]
    assert ablation.main(words) == 1
    assert "unknown backbone" in (tmp_path / "a.json").read_text()


@pytest.mark.slow
def test_what_is_bare_takes_as_many_micro_batches_as_what_is_logged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    real = overhead.train_step

    def counted(model: object, networks: object, optimizer: object, batches: list, **options):
        taken.append(len(batches))
        return real(model, networks, optimizer, batches, **options)

    monkeypatch.setattr(overhead, "train_step", counted)
    small = ["--recipe", "quickstart", "--batch-size", "8", "--hidden-size", "8"]
    small += ["--device", "cpu", "--log-every", "2", "--input.accumulate", "2", "--threads", "1"]
    overhead.main(["--steps", "2", "--rounds", "1", "--", *small])
    assert taken and set(taken) == {2}
    assert '"share of log"' in capsys.readouterr().out
