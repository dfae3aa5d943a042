"""Partial collapse: a run whose embeddings come to use few of their directions is not called
healthy, in the log and in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from byol_fast import monitor
from byol_fast.report.data import load
from byol_fast.report.verdict import collapse, judge, tiles, verdict
from byol_fast.watching import alarms
from tests.byol_fast import fake_run

# RankMe at every tenth step of the quickstart as it was when its report saw no sign of collapse:
# it began at 93 and ended at 13.8, with a spread of 0.7 of the healthy one.
FALLS = [93.4, 60.0, 40.0, 30.0, 25.0, *[20.0 - 0.4 * i for i in range(16)], 13.8]
# A small network on the same images that learned more, and the same at a quarter of the rate.
STAYS = [59.0, 18.6, 18.0, 18.2, 16.7, 21.0, 21.5, 21.2, 21.6, 21.4, 21.6, 21.6]
WIDE = [59.0, 26.5, 28.1, 31.1, 30.7, 32.8, 32.5, 32.0, 32.6, 32.8, 32.8, 32.8]


def rows(ranks: list[float]) -> list[dict[str, float | None]]:
    spread = 0.7 * fake_run.HEALTHY
    return [
        {"step": 10 * i + 1, "loss": 3.0, "embedding_std": spread, "rankme": rank}
        for i, rank in enumerate(ranks)
    ]


def warnings(ranks: list[float]) -> list[tuple[int, str]]:
    """Log points with a warning, and the warning."""
    given = rows(ranks)
    texts = [alarms.narrowed(row, given[:i], ranks[0]) for i, row in enumerate(given)]
    assert not any(alarms.alarms(row, given[:i]) for i, row in enumerate(given))
    return [(i, text) for i, text in enumerate(texts) if text]


def test_a_fall_is_warned_of_once_and_is_no_alarm() -> None:
    ((at, text),) = warnings(FALLS)
    assert at == alarms.SETTLE + alarms.PATIENCE - 1
    assert f"use {FALLS[at]:.1f} directions (RankMe), 20 % of the 93.4 at the start" in text
    assert "partial (dimensional) collapse" in text and "linear probes" in text


@pytest.mark.parametrize("ranks", [STAYS, WIDE, [10.0, *[2.4] * 4, *[9.0] * 20], [50.0]])
def test_a_run_that_keeps_its_directions_is_not_warned_of(ranks: list[float]) -> None:
    assert warnings(ranks) == []
    assert not alarms.narrow(rows(ranks))


def test_it_comes_back_only_after_a_recovery() -> None:
    again = [100.0] * 6 + [20.0] * 8 + [30.0] * 3 + [20.0] * 8 + [40.0] + [20.0] * 8
    assert [at for at, _ in warnings(again)] == [10, 30]


def test_without_a_first_value_there_is_nothing_to_compare() -> None:
    assert alarms.narrowed({"rankme": 1.0}, [], None) == ""
    assert not alarms.narrow([]) and not alarms.narrow([{"loss": 1.0}, {"rankme": None}])


def test_the_first_value_outlives_the_history_and_a_resume(tmp_path: Path) -> None:
    with monitor.RunLog(tmp_path, total_steps=1000, tensorboard=False, panel="off") as log:
        for i in range(monitor.KEPT_POINTS + 50):
            log.log(i, {"rankme": float("nan") if i == 0 else 90.0 - i / 10})
        assert log.first["rankme"] == 89.9
    resumed = monitor.RunLog(
        tmp_path, total_steps=1000, tensorboard=False, panel="off", resume_step=290
    )
    with resumed as log:
        assert log.first["rankme"] == 89.9 and len(log.history) == monitor.KEPT_POINTS


def report_of(tmp_path: Path, ranks: list[float], **summary: float) -> tuple[str, str, str, str]:
    """State, headline, the verdict's words and the tiles."""
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows(ranks))) + "\n")
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    data = load(tmp_path)
    words, figures = (t.replace("&nbsp;", " ") for t in (verdict(data), tiles(data)))
    return collapse(data), judge(data)[1], words, figures


def test_the_report_does_not_call_it_healthy(tmp_path: Path) -> None:
    learned = {"knn_raw_pixels": 0.524, "knn_untrained": 0.563, "knn_trained": 0.663}
    state, headline, words, figures = report_of(tmp_path, FALLS, **learned)
    assert state == "partial"
    assert headline == "The network learned, but its embeddings use few directions"
    assert "no sign of collapse" not in words and "partial (dimensional) collapse" in words
    assert "use 13.8 directions (RankMe), 15 % of the 93.4 at the start" in words
    assert "RankMe 13.8, 93.4 at the start" in figures


def test_without_accuracies_too(tmp_path: Path) -> None:
    _, headline, _, _ = report_of(tmp_path, FALLS)
    assert headline == "The embeddings use few directions; kNN accuracy was not measured"


@pytest.mark.parametrize("ranks", [STAYS, WIDE])
def test_a_healthy_spectrum_is_named_in_figures(tmp_path: Path, ranks: list[float]) -> None:
    state, headline, words, _ = report_of(tmp_path, ranks, knn_untrained=0.4, knn_trained=0.6)
    assert state == "no" and headline.startswith("The network learned: its features beat")
    assert "There was no sign of collapse. The embeddings use" in words
    assert f"{ranks[-1]:.1f} directions" in words
