"""Every setting reaches what it is for: changing one changes the run that is put together."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY, make_folder

from byol_fast import assemble as assembling
from byol_fast import compiled, pretrain
from byol_fast import config as configuration
from byol_fast.assemble import assemble
from byol_fast.config import FLAGS
from byol_fast.distributed import World
from byol_fast.session.opening import open_data
from byol_fast.session.signals import StopSignal
from pipelines.sources.torch_source import TorchSource

# Another value of each setting; DATA, EVAL and OUT stand for folders.
OTHER = {
    "data": "DATA",
    "out": "OUT",
    "recipe": "cifar10",
    "epochs": 7,
    "batch_size": 8,
    "backbone": "resnet34",
    "image_size": 40,
    "backend": "synthetic",
    "seed": 3,
    "input.semantics": "torchvision",
    "input.crop_area_min": 0.5,
    "input.views": "byol",
    "input.verify": "false",
    "input.threads": 3,
    "input.accumulate": 2,
    "optim.base_lr": 0.25,
    "optim.weight_decay": 0.01,
    "optim.warmup_epochs": 2,
    "optim.variant": "mmpretrain",
    "model.stem": "cifar",
    "model.hidden_size": 48,
    "model.hidden_layer": "layer3",
    "model.target_decay": 0.9,
    "model.init": "authors",
    "model.method": "simsiam+directpred+group-ws",
    "run.precision": "bf16",
    "run.max_steps": 5,
    "monitor.eval_every": 1,
    "monitor.eval_data": "EVAL",
    "monitor.log_every": 3,
    "monitor.tracker": "tensorboard",
    "monitor.on_trouble": "stop",
    "checkpoint.every": 9,
    "checkpoint.keep": "2,every=3e",
}
ELSEWHERE = {
    "run.engine": "below",
    "device": "test_pretrain: no gpu",
    "model.bn_sync": "test_elastic: two ranks train like one; test_norm_groups, and below",
    "checkpoint.allow_config_change": "test_pretrain: other configuration, and below",
}
WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("knobs")
    return {
        "train": make_folder(root / "train", images=32),
        "DATA": make_folder(root / "other", images=32, seed=1),
        "EVAL": make_folder(root / "eval", images=16, seed=2),
    }


def put_together(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the parts of a run were made with, as far as a setting can change it."""
    asked: list[bool] = []
    from pipelines import stores

    real = stores.open_store
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(
            stores,
            "open_store",
            lambda *a, **k: (asked.append(k["verify"]), real(*a, **k))[1],
        )
        config = configuration.parse(arguments)
        data = open_data(config, WORLD, StopSignal())
        resolved = pretrain._resolve(config, data, WORLD)
        trainer, folder = assemble(resolved, data, WORLD, stack)
        stream, source = trainer.pipeline.stream, trainer.pipeline.source
        assert trainer.measuring.evaluation is not None
        return {
            "plan": dataclasses.asdict(trainer.plan),
            "spec": stream.spec,
            "stream": (stream.batch_size, stream.accumulate, stream.seed),
            "model": trainer.model.hyper,
            "optimizer": (trainer.optimizer.norm, trainer.optimizer.lr_in_momentum),
            "groups": [(g["weight_decay"], g["adapt"]) for g in trainer.optimizer.param_groups],
            "source": type(source).__name__,
            "threads": source._workers.threads if isinstance(source, TorchSource) else None,
            "sinks": [sink.name for sink in trainer.runlog._sinks],
            "data": data.store.fingerprint,
            "evaluation": trainer.measuring.evaluation.source,
            "out": folder.path.name,
            "verify": asked,
        }


@pytest.fixture(scope="module")
def usual(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("usual") / "run"
    with pytest.MonkeyPatch.context() as patch:
        return put_together(["--data", str(folders["train"]), "--out", str(out), *TINY], patch)


def test_every_setting_is_listed() -> None:
    assert OTHER.keys() | ELSEWHERE.keys() == FLAGS.keys()


def test_without_a_change_nothing_differs(
    usual: dict[str, Any],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--data", str(folders["train"]), "--out", str(tmp_path / "run"), *TINY]
    assert put_together(arguments, monkeypatch) == usual


@pytest.mark.parametrize("name", OTHER)
def test_a_setting_reaches_its_user(
    name: str,
    usual: dict[str, Any],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    value = {**folders, "OUT": tmp_path / "elsewhere"}.get(str(OTHER[name]), OTHER[name])
    arguments = ["--data", str(folders["train"]), "--out", str(tmp_path / "run"), *TINY]
    changed = put_together([*arguments, f"--{name}", str(value)], monkeypatch)
    differs = [part for part in usual if usual[part] != changed[part]]
    assert differs, f"--{name} {value} changes nothing"


def test_a_changed_setting_is_refused_on_resume_unless_allowed(
    folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(folders["train"]), "--out", str(tmp_path), *TINY, "--max-steps"]
    assert pretrain.main([*arguments, "1"]) == 0
    capfd.readouterr()
    changed = [*arguments, "2", "--base-lr", "0.01"]
    assert pretrain.main(changed) == 2
    assert "optim.base_lr: 0.4 → 0.01" in capfd.readouterr().err
    assert pretrain.main([*changed, "--allow-config-change"]) == 0
    assert "optim.base_lr: 0.4 → 0.01" in capfd.readouterr().err


def test_the_engine_reaches_the_compiler(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def spy(model: Any, world: World, **options: Any) -> Any:
        calls.append(options)
        return compiled.as_they_stand(model)

    monkeypatch.setattr(assembling, "compiled", spy)
    arguments = ["--data", str(folders["train"]), *TINY]
    for engine in ("auto", "eager", "compile"):
        given = [*arguments, "--out", str(tmp_path / engine), "--engine", engine]
        put_together(given, monkeypatch)
    assert len(calls) == 1  # auto compiles on a GPU only
    assert calls[0]["batch"] == 16 and calls[0]["image_size"] == 32
    with pytest.raises(ValueError, match="no GPU"):
        given = [*arguments, "--out", str(tmp_path / "graph"), "--engine", "graph"]
        put_together(given, monkeypatch)


def test_whom_batchnorm_shares_with_reaches_every_norm(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def spy(word: str, world: World) -> bool:
        asked.append(word)
        return word != "none"

    monkeypatch.setattr(assembling, "statistics_group", spy)
    for word in ("none", "group"):
        arguments = ["--data", str(folders["train"]), "--out", str(tmp_path / word), *TINY]
        parts = put_together([*arguments, "--bn-sync", word], monkeypatch)
        assert parts["model"]["bn_sync"] is (word == "group")
    assert asked == ["none", "group"]


def test_where_dali_decodes_reaches_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def spy(store: Any, *args: Any, **options: Any) -> Any:
        asked.append((options["backend"], options["decode"]))
        return real(store, *args, **{**options, "backend": "torch"})

    real = assembling.build
    monkeypatch.setattr(assembling, "build", spy)
    for number, word in enumerate(("dali", "dali:cpu", "dali:mixed:0.8", "ffcv")):
        out = str(tmp_path / str(number))
        put_together(
            ["--data", str(folders["train"]), "--out", out, *TINY, "--backend", word], monkeypatch
        )
    assert asked == [("dali", "auto"), ("dali", "cpu"), ("dali", "mixed:0.8"), ("ffcv", "auto")]
