"""F8: a run goes on with other ranks on the same global batch: same rows, near the same loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from faults.harness import SMALL
from support import assert_same, final

from byol_fast.session import split
from byol_fast.watching import metrics

# Every rank writes which rows each of its micro-batches held.
ROWS = """
import json, os
from pipelines.plan import RowStream
real = RowStream.rows
def rows(self, step, micro=0):
    got = real(self, step, micro)
    line = [step, self.rank * self.accumulate + micro, got.ids.tolist(), got.windows.tolist()]
    with open({path!r}, "a") as file:
        file.write(json.dumps(line) + chr(10))
    return got
RowStream.rows = rows
"""
FROM, STEPS = 9, 24  # of SMALL's run: where it changes hands, and its end


def rows_of(path: Path, *, after: int = 0) -> list[list]:
    """Ids and windows of every step in the order of the global batch; prefetched ones once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps: dict[int, dict[int, list]] = {}
    for step, part, ids, windows in lines:
        steps.setdefault(step, {})[part] = list(zip(ids, windows, strict=True))
    return [
        [row for part in sorted(steps[step]) for row in steps[step][part]]
        for step in sorted(steps)
        if step >= after
    ]


def losses(out: Path) -> dict[int, float]:
    rows = metrics.read(out / "metrics.jsonl").rows
    return {int(row["step"] or 0): float(row["loss"] or 0) for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("sync", "before", "after"),
    [
        ("--bn-sync", 2, 1),
        ("--no-bn-sync", 1, 2),
        pytest.param("--bn-sync", 1, 2, marks=pytest.mark.slow),
        pytest.param("--no-bn-sync", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_f8_other_ranks_same_rows(
    runs, whole: Path, tmp_path: Path, before: int, after: int, sync: str
):
    """Against a run that `before` ranks took to the end.

    Where BatchNorm's statistics are over as many images as before, the loss is the same but for the
    order of sums. Else they are over 4 instead of 8, and it is that of a run whose number of ranks
    stayed and whose statistics were changed to 4.
    """
    reference = whole / f"{before}{sync}"
    if not reference.exists():
        path = reference.with_suffix(".rows")
        assert (
            runs(reference, *SMALL, sync, ranks=before, fault=ROWS.format(path=str(path))).wait()
            == 0
        )
    out, path = tmp_path / "run", tmp_path / "rows"
    assert runs(out, *SMALL, sync, "--max-steps", FROM, ranks=before).wait() == 0
    stayed = shutil.copytree(out, tmp_path / "stayed")
    run = runs(out, *SMALL, sync, ranks=after, fault=ROWS.format(path=str(path)))
    assert run.wait() == 0, run.said
    assert f"resumed at step {FROM} of {STEPS}" in run.said
    assert "the batch and the rows stay" in run.said  # the change is logged
    assert rows_of(path) == rows_of(reference.with_suffix(".rows"), after=FROM)
    now = json.loads((out / split.FILE).read_text())
    expected = {(2, 1): (4, 2), (1, 2): (4, 1)}[before, after]
    assert (now["micro_batch"], now["accumulate"]) == expected
    assert now["largest"] == 8 // before
    same_statistics = (sync == "--no-bn-sync" and before == 2) or (
        sync == "--bn-sync" and before == 1
    )
    ours, theirs = losses(out), losses(reference)
    assert ours.keys() == theirs.keys()
    assert {s: ours[s] for s in range(1, FROM + 1)} == {s: theirs[s] for s in range(1, FROM + 1)}
    if not same_statistics:
        assert max(abs(ours[s] - theirs[s]) for s in ours) > 1e-3
        over_four = ("--no-bn-sync",) if before == 2 else (sync, "--input.accumulate", 2)
        other = runs(stayed, *SMALL, *over_four, "--allow-config-change", ranks=before)
        assert other.wait() == 0, other.said
        theirs = losses(stayed)
    assert ours == pytest.approx(theirs, abs=1e-4)
    event = [e for e in metrics.read(out / "metrics.jsonl").events if e.kind == "ranks"]
    assert len(event) == 1 and event[0].step == FROM


@pytest.mark.dist
def test_two_ranks_train_like_one(runs, tmp_path: Path):
    """The same images in the same micro-batches; bn_sync makes two ranks one batch of 8.

    Sums are taken in another order, so equality is up to rounding that 3 steps have amplified.
    """
    words = (*SMALL, "--max-steps", 3, "--base-lr", "0.05", "--bn-sync")
    for ranks in (1, 2):
        run = runs(tmp_path / str(ranks), *words, ranks=ranks)
        run.wait()
        assert set(run.codes.values()) == {0}, run.said
    one, two = (losses(tmp_path / name) for name in "12")
    assert len(one) == 3 and one == pytest.approx(two, abs=1e-3)
    one, two = (final(tmp_path / name)["model"] for name in "12")
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(two[name], value, atol=2e-3, rtol=2e-3, msg=name)


@pytest.mark.dist
def test_f8_there_and_back_is_bitwise_where_the_ranks_are_the_same(runs, tmp_path: Path):
    """1 → 2 → 1 ranks: the last part is what one rank makes of the second part's checkpoint."""
    out, copy = tmp_path / "run", tmp_path / "copy"
    assert runs(out, *SMALL, "--max-steps", 5, ranks=1).wait() == 0
    assert runs(out, *SMALL, "--max-steps", 11, ranks=2).wait() == 0
    shutil.copytree(out, copy)
    for each in (out, copy):
        run = runs(each, *SMALL, ranks=1)
        assert run.wait() == 0, run.said
        assert json.loads((each / split.FILE).read_text())["micro_batch"] == 8
    for part in ("model", "optimizer", "probe"):
        assert_same(final(out)[part], final(copy)[part], part)


def test_f8_ranks_that_do_not_divide_the_batch(runs, tmp_path: Path):
    assert runs(tmp_path / "run", *SMALL, "--max-steps", 3).wait() == 0
    run = runs(tmp_path / "run", *SMALL, ranks=3)
    run.wait()
    assert set(run.codes.values()) == {2}, run.said
    assert "over 3 ranks: go on with 2" in run.said and "Traceback" not in run.said
