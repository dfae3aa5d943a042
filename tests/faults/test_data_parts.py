"""Nodes that hold only their part of the data: a process each, with a working folder of its own."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from faults.harness import SMALL, Run, assert_same, assert_same_run, final
from faults.test_divergence import NOT_FINITE
from PIL import Image
from support import make_folder

from byol_fast.watching import metrics
from pipelines.convert import main as convert
from pipelines.stores import open_store

pytestmark = pytest.mark.dist

DATA = ("--data", "parts:train.beton")
TORCH = ("--backend", "torch")  # FFCV's kernel takes seconds to compile
FROM, STEPS = 9, 24  # where a run changes hands, and its end: 3 epochs of 64 images, 8 a step

# Rank r works in the r-th node's folder, and writes which samples its micro-batches held.
NODES = """
import json, os
os.chdir({nodes!r}[int(os.environ["RANK"])])
from pipelines.plan import RowStream
real = RowStream.rows
def rows(self, step, micro=0):
    got = real(self, step, micro)
    ids = (self.place.first + got.ids).tolist()
    line = [step, self.place.first, self.place.rank * self.accumulate + micro, ids]
    with open({rows!r}, "a") as file:
        file.write(json.dumps([*line, got.windows.tolist()]) + chr(10))
    return got
RowStream.rows = rows
"""

Start = Callable[..., Run]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three nodes: 32 images each in 4 classes, as a folder, a .beton and a tar file.

    The first one's part comes after the second one's, so rank 0's sample ids do not start at 0.
    The tar file of the third one has no image of class 3.
    """
    root = tmp_path_factory.mktemp("nodes")
    folders = [root / name for name in ("x", "y", "z")]
    for seed, node in enumerate(folders):
        make_folder(node / "train", images=32, seed=seed)
        assert convert([str(node / "train"), str(node / "train.beton")]) == 0
    found = sorted(folders[:2], key=lambda node: open_store(node / "train.beton").fingerprint)
    for node in (*found, folders[2]):
        with tarfile.open(node / "train.tar", "w") as tar:
            for path in sorted((node / "train").rglob("*.jpg"))[: 24 if node == folders[2] else 32]:
                for suffix, data in (
                    (".jpg", path.read_bytes()),
                    (".cls", path.parent.name[-1].encode()),
                ):
                    member = tarfile.TarInfo(path.stem + suffix)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return [found[1], found[0], folders[2]]


@pytest.fixture
def start(runs: Callable[..., Run]) -> Start:
    """Starts a run with a rank on each of the nodes."""

    def started(out: Path, on: Sequence[Path], *arguments: object, fault: str = "") -> Run:
        rows = str(out.with_suffix(".rows"))
        place = NODES.format(nodes=[str(node) for node in on], rows=rows)
        words = (*SMALL, *TORCH, *(() if "--data" in arguments else DATA), *arguments)
        if len(on) > 1:
            return runs(out, *words, ranks=len(on), fault=place + fault)
        return runs(out, *words, fault=f"import os; os.chdir({str(on[0])!r})")

    return started


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def whole(kept: Path, start: Start, nodes: list[Path]) -> Path:
    """A run of two nodes from start to end."""
    if not (kept / "whole").exists():
        run = start(kept / "whole", nodes[:2])
        assert run.wait() == 0, run.said
    return kept / "whole"


@pytest.fixture
def half(kept: Path, start: Start, nodes: list[Path], tmp_path: Path) -> Path:
    """A copy of a run of two nodes that was stopped after step FROM."""
    if not (kept / "half").exists():
        run = start(kept / "half", nodes[:2], "--max-steps", FROM)
        assert run.wait() == 0, run.said
    return Path(shutil.copytree(kept / "half", tmp_path / "run"))


def rows_of(out: Path, *, after: int = 0, stop: int = STEPS) -> list[list]:
    """Ids and windows of every step: of one part, then of the next, each in its own order."""
    steps: dict[int, dict[tuple[int, int], list]] = {}
    for line in out.with_suffix(".rows").read_text().splitlines():
        step, first, part, ids, windows = json.loads(line)
        steps.setdefault(step, {})[first, part] = list(zip(ids, windows, strict=True))
    return [
        [row for key in sorted(steps[step]) for row in steps[step][key]]
        for step in sorted(steps)
        if after <= step < stop
    ]


def test_each_node_shuffles_its_part(whole: Path) -> None:
    said = whole.with_name("whole.output").read_text()
    assert "data: 64 images in 2 parts, each shuffled within itself" in said
    assert "4 rows (1/2) of each step, so an image is shown 1 times an epoch" in said
    assert "shown equally often" not in said
    assert f"{STEPS} steps = 3 epochs × 64 images // 8" in said
    rows = rows_of(whole)
    for epoch in range(3):
        steps = rows[8 * epoch : 8 * epoch + 8]
        for part in range(2):
            ids = [row[0] for step in steps for row in step[4 * part : 4 * part + 4]]
            assert sorted(ids) == list(range(32 * part, 32 * part + 32))
    log = metrics.read(whole / "metrics.jsonl").rows
    assert [row["epoch"] for row in log if "loss" in row][-1] == 3.0
    assert "kNN looks for neighbours in rank 0's part" in said
    assert "the probe learns from rank 0's rows" in said
    assert [row for row in log if "knn_accuracy" in row]
    assert len(final(whole)["data"]["parts"]) == 2


def test_a_resumed_run_is_bitwise_the_same(
    whole: Path, half: Path, start: Start, nodes: list[Path]
) -> None:
    run = start(half, nodes[:2])
    assert run.wait() == 0, run.said
    assert_same_run(whole, half)


def test_nodes_that_swap_their_ranks_go_on_with_the_same_steps(
    whole: Path, half: Path, start: Start, nodes: list[Path]
) -> None:
    """All but what rank 0 measures on its own images: gauges, probe and kNN."""
    run = start(half, [nodes[1], nodes[0]])
    assert run.wait() == 0, run.said
    assert rows_of(half, after=FROM) == rows_of(whole, after=FROM)
    for part in ("model", "optimizer"):
        assert_same(final(whole)[part], final(half)[part], part)


def test_more_ranks_of_the_same_shares_read_the_same_rows(
    whole: Path, half: Path, start: Start, nodes: list[Path]
) -> None:
    run = start(half, [nodes[0], nodes[1], nodes[1], nodes[0]], "--max-steps", FROM + 2)
    assert run.wait() == 0, run.said
    assert "ranks 0, 3 on" in run.said and "the batch and the rows stay" in run.said
    assert rows_of(half, after=FROM, stop=FROM + 2) == rows_of(whole, after=FROM, stop=FROM + 2)


@pytest.mark.parametrize(
    ("on", "texts"),
    [
        ((0, 0), ("is missing: start the node that holds it", "1/2 of each step → 1")),
        ((0, 2), ("is missing: start the node", "is new: its node holds other images")),
        ((0, 0, 0, 1), ("1/2 of each step → 3/4", "1/2 of each step → 1/4", "in proportion")),
    ],
)
def test_other_parts_or_shares_are_refused_on_resume(
    half: Path, start: Start, nodes: list[Path], on: tuple[int, ...], texts: tuple[str, ...]
) -> None:
    run = start(half, [nodes[n] for n in on])
    run.wait()
    assert set(run.codes.values()) == {2}, run.said
    for text in ("belongs to another run", "--checkpoint.allow-config-change", *texts):
        assert text in run.said
    assert "Traceback" not in run.said and final(half)["step"] == FROM


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_that_cannot_be_opened_ends_all_ranks(
    start: Start, nodes: list[Path], tmp_path: Path, rank: int
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    if rank == 0:
        content = (nodes[0] / "train.beton").read_bytes()
        (broken / "train.beton").write_bytes(content[: len(content) // 2])
    on = [nodes[0], nodes[0]]
    on[rank] = broken
    run = start(tmp_path / "run", on)
    run.wait()
    assert set(run.codes.values()) == {4}, run.said
    assert f", rank {rank}: train.beton" in run.said and "Traceback" not in run.said
    assert ("does not exist" if rank else "truncated") in run.said, run.said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_images_without_the_word_are_refused(
    start: Start, nodes: list[Path], tmp_path: Path
) -> None:
    run = start(tmp_path / "run", nodes[:2], "--data", "train.beton")
    run.wait()
    assert set(run.codes.values()) == {4}, run.said
    assert "or say --data parts:train.beton" in run.said


def test_one_part_is_the_ordinary_run(start: Start, nodes: list[Path], tmp_path: Path) -> None:
    for name, data in (("parts", "parts:train"), ("ordinary", "train")):
        run = start(tmp_path / name, [nodes[0]] * 2, "--data", data, "--max-steps", 3)
        assert run.wait() == 0, run.said
        assert ("so there is one part" in run.said) == (name == "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "ordinary")
    ours, theirs = (final(tmp_path / name)["data"] for name in ("parts", "ordinary"))
    assert ours == theirs  # so one goes on where the other has stopped


def test_tar_shards_with_other_classes_train_without_probe(
    start: Start, nodes: list[Path], tmp_path: Path
) -> None:
    """Part of the classes on one node: said, and no reason not to train."""
    out = tmp_path / "run"
    data = ("--data", "parts:train.tar", "--monitor.eval-data", nodes[2] / "train.tar")
    run = start(out, [nodes[0], nodes[2]], *data, "--max-steps", 2)
    assert run.wait() == 0, run.said
    assert "the parts do not hold the same classes" in run.said and "3 classes (0 … 2" in run.said
    assert "shown 1.17 times an epoch" in run.said  # 56 images / 2 / 24
    assert "images are not shown equally often" in run.said
    assert "so kNN looks for neighbours in --monitor.eval-data" in run.said
    assert run.said.count("do not hold the same classes") == 1  # rank 0 tells it for all
    assert "kNN accuracy is measured on" in run.said
    assert final(out)["probe"] == {}


def test_a_skipped_steps_rows_are_told_by_their_ranks_and_replayed(
    start: Start, nodes: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    fault = NOT_FINITE.format(kinds={1: "loss nan"}, ranks="01")
    run = start(out, nodes[:2], "--max-steps", 2, fault=fault)
    assert run.wait() == 0, run.said
    (told,) = json.loads((out / "diverged-step.json").read_text())["steps"]
    second, first = ([row["index"] for row in told["rows"] if row["rank"] == r] for r in (0, 1))
    assert first + second == [row[0] for row in rows_of(out)[1]]
    assert min(second) >= 32 > max(first)
    assert all(row["name"] == f"train.beton[{row['index'] % 32}]" for row in told["rows"])

    index = rows_of(out)[0][4 + 3][0]  # rank 0's fourth row of the first step: in the second part
    words = ("--config", out / "config.yaml", "--replay", f"epoch=0,index={index}")
    run = start(out, nodes[:1], *words)
    assert run.wait() == 0 and f"train.beton[{index - 32}], epoch 0" in run.said, run.said
    picture = np.asarray(Image.open(out / f"replay-epoch0-index{index}.png"))
    shown = np.load(out / "views.npz")["views"][:, 3]
    assert np.array_equal(picture[:, :8], shown[0]) and np.array_equal(picture[:, -8:], shown[1])
    elsewhere = start(out, nodes[1:2], *words)
    assert elsewhere.wait() == 2 and "has 32 images" in elsewhere.said, elsewhere.said
    foreign = start(out, nodes[2:3], *words)
    assert foreign.wait() == 2 and "is none of the parts" in foreign.said, foreign.said
