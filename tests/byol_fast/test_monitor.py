"""The log survives kills, full disks and foreign writers; alarms come on time, and only then."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import textwrap
import types
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from byol_fast import monitor
from byol_fast.watching import alarms, gauges, metrics, sinks


def open_log(out: Path, **changes: object) -> monitor.RunLog:
    options: dict = {"total_steps": 100, "tensorboard": False, "panel": "off"}
    return monitor.RunLog(out, **{**options, **changes})


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- metrics.jsonl


def test_rows_and_events_are_json_lines_with_the_step_first(tmp_path: Path):
    with open_log(tmp_path) as log:
        log.log(10, {"loss": 1.5, "epoch": 2, "rankme": np.float32(3.5), "lr": torch.tensor(0.25)})
        log.event(10, "checkpoint", "kept τ")
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == (
        '{"step": 10, "loss": 1.5, "epoch": 2, "rankme": 3.5, "lr": 0.25}\n'
        '{"step": 10, "event": "checkpoint", "text": "kept τ"}\n'
    )


def test_lines_are_in_the_file_at_once(tmp_path: Path):
    log = open_log(tmp_path)
    log.log(1, {"loss": 1.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
    log.sync()
    log.close()
    log.close()
    log.log(2, {"loss": 1.0})
    assert len(lines(tmp_path)) == 1


def test_floats_come_back_bit_for_bit(tmp_path: Path):
    values = [1 / 3, 1e-300, 0.1 + 0.2, float(np.nextafter(1.0, 2.0))]
    with open_log(tmp_path) as log:
        for step, value in enumerate(values):
            log.log(step, {"loss": value})
    assert metrics.read(tmp_path / "metrics.jsonl").series("loss")[1] == values


def test_what_is_not_finite_is_null_and_an_event_where_it_begins(tmp_path: Path):
    with open_log(tmp_path) as log:
        for step, loss in enumerate([1.0, math.nan, math.inf, 1.0, -math.inf]):
            log.log(step, {"loss": loss})
    read = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in read.rows] == [1.0, None, None, 1.0, None]
    assert [(e.step, e.kind) for e in read.events] == [(1, "not-finite"), (4, "not-finite")]
    assert "nan" in read.events[0].text and "-inf" in read.events[1].text
    assert np.isnan(read.series("loss")[1][1])


def test_timing_is_left_out_of_a_comparison(tmp_path: Path):
    for name, rate in (("a", 100.0), ("b", 90.0)):
        with open_log(tmp_path / name) as log:
            log.log(1, {"loss": 2.0, metrics.IMAGES_PER_SECOND: rate})
    a, b = (metrics.read(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert a.rows != b.rows
    assert metrics.reproducible(a) == metrics.reproducible(b) == [{"step": 1, "loss": 2.0}]
    timing = {n for n in metrics.METRICS if n.startswith(metrics.TIMING)}
    assert timing == {
        metrics.IMAGES_PER_SECOND,
        metrics.IMAGES_PER_SECOND_PER_GPU,
        metrics.DATA_WAIT_SHARE,
        metrics.ELAPSED,
    }


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', '{"step": 3}', "\x00\x00\x00"])
def test_resume_drops_later_lines_and_a_torn_one(tmp_path: Path, torn: str):
    with open_log(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, {"loss": float(step)})
            log.event(step, "note", str(step))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    with open_log(tmp_path, resume_step=3) as log:
        assert [v["loss"] for v in log.history if "loss" in v] == [1.0, 2.0, 3.0]
        log.log(4, {"loss": 40.0})
    read = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in read.rows] == [1.0, 2.0, 3.0, 40.0]
    assert [e.step for e in read.events] == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resumed_log_equals_an_uninterrupted_one(tmp_path: Path):
    def run(out: Path, first: int, last: int, resume: int | None) -> None:
        with open_log(out, resume_step=resume) as log:
            for step in range(first, last):
                log.log(step, {"loss": 1 / step})

    run(tmp_path / "whole", 1, 20, None)
    run(tmp_path / "halves", 1, 14, None)
    run(tmp_path / "halves", 10, 20, 9)
    whole, halves = (
        (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "halves")
    )
    assert whole == halves


def test_a_fresh_start_keeps_the_old_log_aside(tmp_path: Path):
    for loss in (1.0, 2.0):
        with open_log(tmp_path) as log:
            log.log(1, {"loss": loss})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]
    assert '"loss": 1.0' in (tmp_path / "metrics.jsonl.old").read_text()


def test_other_ranks_touch_nothing(tmp_path: Path):
    out = tmp_path / "run"
    with open_log(out, rank=1, world_size=2, tensorboard=True) as log:
        log.log(1, {"loss": math.nan})
        log.event(1, "alarm", "x")
        log.sync()
    assert not out.exists()


def test_an_unwritable_log_is_refused_with_path_and_mend(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(monitor.LogError, match=r"metrics\.jsonl.*--out"):
        open_log(tmp_path / "file" / "run")


def test_a_path_that_is_not_utf8_can_be_logged(tmp_path: Path):
    with open_log(tmp_path) as log:
        log.event(1, "skipped", "rows in run\udcff/é")
    assert metrics.read(tmp_path / "metrics.jsonl").events[0].text == "rows in run\udcff/é"


def test_a_full_disk_is_told_once_and_loses_nothing(tmp_path: Path):
    code = textwrap.dedent("""
        import logging, resource, sys
        from pathlib import Path
        from byol_fast import monitor
        logging.basicConfig(format="WARN %(message)s")
        out = Path(sys.argv[1])
        log = monitor.RunLog(out, total_steps=9, tensorboard=True, panel="off")
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (120, hard))  # a file grows no further
        for step in range(9):
            log.log(step, {"loss": 1.0})
        print("HELD", (out / "metrics.jsonl").read_text().count("\\n"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        log.log(9, {"loss": 2.0})
        log.close()
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(monitor.__file__).parents[1],
        check=True,
    )
    assert [row["step"] for row in lines(tmp_path)] == list(range(10))
    held = int(done.stdout.split("HELD ")[1].split()[0])
    assert 0 < held < 9
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARN")]
    assert len(warnings) == 2  # one for each of the two files
    assert "metrics.jsonl" in "".join(warnings) and "TensorBoard stopped" in "".join(warnings)


# --- TensorBoard and W&B


def test_tensorboard_reads_what_was_written(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_log(tmp_path, tensorboard=True) as log:
        for step in range(1, 6):
            log.log(step, {"loss": step / 4, "rankme": 7, "lr": 1e300})
        log.event(2, "alarm", "watch τ")
    with open_log(tmp_path, tensorboard=True, resume_step=3) as log:
        log.log(4, {"loss": 9.0})
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
        (4, 9.0),
    ]
    assert read.Scalars("lr")[0].value == math.inf
    text = read.Tensors("events/alarm")[0]
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (2, "watch τ")


def test_training_goes_on_without_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "tensorboard").write_text("a file in the way")
    with caplog.at_level(logging.WARNING), open_log(tmp_path, tensorboard=True) as log:
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 1.0})
    assert len(lines(tmp_path)) == 2
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "TensorBoard cannot write" in caplog.text


def fake_wandb(monkeypatch: pytest.MonkeyPatch, fail: str = "") -> list[tuple]:
    calls: list[tuple] = []

    class Run:
        def log(self, values: dict, step: int) -> None:
            if fail == "log":
                raise RuntimeError("network gone")
            calls.append(("log", values, step))

        def finish(self) -> None:
            calls.append(("finish",))

    def init(**options: object) -> Run:
        if fail == "init":
            raise RuntimeError("server says no")
        calls.append(("init", options))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(sinks, "_has_key", lambda: False)
    return calls


def test_wandb_is_offline_without_a_key_and_goes_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = fake_wandb(monkeypatch)
    with open_log(tmp_path, wandb=True, config={"seed": 3}) as log:
        log.log(1, {"loss": 1.0})
    with open_log(tmp_path, wandb=True, resume_step=1):
        pass
    with open_log(tmp_path, wandb=True):
        pass
    inits = [call[1] for call in calls if call[0] == "init"]
    assert inits[0]["mode"] == "offline" and inits[0]["config"] == {"seed": 3}
    assert inits[0]["id"] == inits[1]["id"] != inits[2]["id"]
    assert ("log", {"loss": 1.0}, 1) in calls and ("finish",) in calls


@pytest.mark.parametrize("fail", ["init", "log"])
def test_trouble_with_wandb_is_told_once(
    fail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    fake_wandb(monkeypatch, fail)
    with caplog.at_level(logging.WARNING), open_log(tmp_path, wandb=True) as log:
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 1.0})
    assert len(lines(tmp_path)) == 2
    assert len(caplog.records) == 1 and "W&B" in caplog.text


def test_wandb_asked_for_and_missing_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[wandb\]'"):
        open_log(tmp_path / "run", wandb=True)
    assert not (tmp_path / "run").exists()


def test_a_gone_terminal_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    log = open_log(tmp_path)

    def broken(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(log._display, "log", broken)
    with caplog.at_level(logging.WARNING):
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 1.0})
    log.close()
    assert len(lines(tmp_path)) == 2 and len(caplog.records) == 1


def test_a_gone_terminal_does_not_change_how_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    log = open_log(tmp_path)

    def gone() -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(log._display, "close", gone)
    log.log(1, {"loss": 1.0})
    log.close()
    assert len(lines(tmp_path)) == 1


def test_without_a_standard_output_nothing_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after >&-
    with open_log(tmp_path) as log:
        log.log(1, {"loss": 1.0})
        log.event(1, "end", "done")
    assert len(lines(tmp_path)) == 2


# --- alarms


def measure(z: torch.Tensor) -> dict[str, float]:
    return {
        "loss": 1.0,
        "embedding_std": gauges.embedding_std(z).item(),
        "rankme": gauges.rankme(z).item(),
    }


def replay(points: list[dict[str, float]], dim: int) -> dict[int, list[str]]:
    """Alarms by the index of the log point at which they were raised."""
    history: list[dict[str, float]] = []
    raised = {}
    for i, values in enumerate(points):
        if found := monitor.alarms(values, history, dim=dim):
            raised[i] = found
        history.append(values)
    return raised


def shrinking(points: int, dim: int, start: int, factor: float) -> list[torch.Tensor]:
    """Embeddings that a network without a predictor would give: from `start` on all images are
    drawn to one point, nearer by `factor` at each log point."""
    generator = torch.Generator().manual_seed(5)
    centre = torch.randn(1, dim, generator=generator)
    clouds = []
    for i in range(points):
        size = 1.0 if i < start else factor ** (i - start + 1)
        clouds.append((1 - size) * centre + size * torch.randn(128, dim, generator=generator))
    return clouds


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("factor", [0.5, 0.8])
def test_a_collapse_is_told_once_and_within_the_stated_delay(dim: int, factor: float):
    points = [measure(z) for z in shrinking(60, dim, start=20, factor=factor)]
    raised = replay(points, dim)
    bad = alarms.STD_LOW * alarms.healthy_std(dim)
    begun = next(i for i, p in enumerate(points) if p["embedding_std"] < bad)
    first = min(raised)
    assert first == begun + alarms.PATIENCE - 1
    texts = [text for found in raised.values() for text in found]
    assert sum("spread" in text for text in texts) == 1
    assert sum("RankMe" in text for text in texts) <= 1
    assert "same point" in texts[0] and "predictor" in texts[0]
    assert monitor.collapsed(points, dim=dim) and not monitor.collapsed(points[:20], dim=dim)


def test_a_collapse_from_the_first_step_is_told_when_the_start_is_over():
    raised = replay([measure(z) for z in shrinking(30, 64, start=0, factor=0.3)], 64)
    assert min(raised) == alarms.SETTLE + alarms.PATIENCE - 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5])
def test_healthy_noise_never_alarms(seed: int, scale: float):
    generator = torch.Generator().manual_seed(seed)
    centre = scale * torch.randn(1, 256, generator=generator)  # a common part is no collapse
    points = [measure(centre + torch.randn(96, 256, generator=generator)) for _ in range(60)]
    assert replay(points, 256) == {}
    assert not monitor.collapsed(points)


def test_a_short_dip_and_flicker_at_the_threshold_do_not_alarm_again():
    healthy = alarms.healthy_std(256)

    def points(shares: list[float]) -> list[dict[str, float]]:
        return [{"embedding_std": share * healthy} for share in shares]

    start = [0.8] * 10
    dip = start + [0.1] * (alarms.PATIENCE - 1) + [0.8] * 5 + [0.1] * (alarms.PATIENCE - 1)
    assert replay(points(dip), 256) == {}
    between = (alarms.STD_LOW + alarms.STD_OK) / 2
    flicker = start + [0.1, between] * 20
    assert list(replay(points(flicker), 256)) == [10 + 2 * (alarms.PATIENCE - 1)]
    twice = start + [0.1] * 8 + [0.9] + [0.1] * 8
    assert len(replay(points(twice), 256)) == 2


def test_log_points_without_gauges_do_not_count():
    healthy = alarms.healthy_std(256)
    low = {"embedding_std": 0.1 * healthy}
    points: list[dict[str, float]] = [{"embedding_std": healthy}] * 10
    for _ in range(alarms.PATIENCE - 1):
        points += [low, {"knn_accuracy": 0.5}]
    assert replay(points, 256) == {}
    assert list(replay([*points, low], 256)) == [len(points)]


def test_without_history_a_bad_point_is_no_alarm_and_no_error():
    """Ranks other than 0 keep none; a dip must not end them."""
    assert alarms.alarms({"embedding_std": 0.0, "rankme": 1.0}, deque()) == []


def test_dimensional_collapse_is_seen_by_the_rank():
    points = [{"embedding_std": 0.06, "rankme": 40.0}] * 10
    points += [{"embedding_std": 0.06, "rankme": 1.5}] * 10
    raised = replay(points, 256)
    assert list(raised) == [10 + alarms.PATIENCE - 1]
    assert "1.5 of 256 directions" in raised[14][0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_not_finite_is_told_at_once_and_once(bad: float | None):
    points = [{"loss": 1.0, "grad_norm": 1.0}] * 2 + [{"loss": bad, "grad_norm": 1.0}] * 3
    points += [{"loss": 1.0, "grad_norm": bad}]
    raised = replay(points, 256)  # type: ignore[arg-type]
    assert list(raised) == [2, 5]
    assert "loss is not a finite number" in raised[2][0] and "learning rate" in raised[2][0]
    assert "gradient norm" in raised[5][0]


def test_alarms_go_on_across_a_resume(tmp_path: Path):
    low = 0.05 * alarms.healthy_std(256)
    with open_log(tmp_path) as log:
        for step in range(12):
            log.log(step, {"embedding_std": alarms.healthy_std(256) if step < 10 else low})
    with open_log(tmp_path, resume_step=11) as log:
        raised = []
        for step in range(12, 20):
            values = {"embedding_std": low}
            if monitor.alarms(values, log.history):
                raised.append(step)
            log.log(step, values)
    assert raised == [10 + alarms.PATIENCE - 1]


def test_every_metric_has_a_label_and_a_sentence():
    constants = {v for k, v in vars(metrics).items() if k.isupper() and isinstance(v, str)}
    assert constants - {metrics.TIMING} == set(metrics.METRICS)
    for metric in metrics.METRICS.values():
        assert metric.label and metric.help.endswith(".")
        assert metric.kind in ("number", "share", "rate", "seconds")


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.123456, "number", "0.1235"),
        (3.07e-7, "number", "3.07e-07"),
        (0.0, "number", "0"),
        (0.4567, "share", "45.7 %"),
        (12345.6, "rate", "12,346"),
        (3.26, "rate", "3.3"),
        (59.7, "seconds", "1:00"),
        (3725, "seconds", "1:02:05"),
        (math.nan, "number", "not finite"),
        (None, "share", "not finite"),
    ],
)
def test_figures_for_people(value: float | None, kind: str, text: str):
    assert metrics.short(value, kind) == text
