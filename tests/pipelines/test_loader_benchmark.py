"""benchmarks/loader.py: its rivals do the same work, its arithmetic holds, and it runs."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from benchmarks import chart, figures, loader, turns, usage
from benchmarks.make_data import generate, make_stores, make_tar
from benchmarks.rows import DALI, FFCV, PEERS, Chain, Row, Work, all_rows, open_chain, plan, prepare
from pipelines.sources import dali_available, ffcv_available
from pipelines.stores import Store, open_store

ROOT = Path(__file__).resolve().parents[2]
SIZE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("data"), 6)


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    return open_store(folder, verify=False, progress=False)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def work(folder: Path) -> Work:
    return Work({"folder": str(folder)}, image_size=SIZE, batch_size=3, images=6)


@pytest.fixture
def opened(work: Work) -> Iterator[Callable[[Row], list[Any]]]:
    chains: list[Chain] = []

    def open_row(row: Row) -> list[Any]:
        chains.append(open_chain(row, prepare(row, work)))
        batches = list(chains[-1].batches())
        assert batches
        return batches

    yield open_row
    for chain in chains:
        chain.close()


def test_generated_images_weigh_what_imagenets_do(store: Store) -> None:
    assert store.sizes.tolist() == [[375, 500]] * 6
    weight = np.mean([len(store.read(row)) for row in range(6)])
    assert 90_000 < weight < 130_000


def test_a_turn_is_the_same_rows_for_all_and_goes_on_over_small_data(
    work: Work, store: Store
) -> None:
    longer = Work(work.stores, image_size=SIZE, batch_size=3, images=12)
    assert [batch.ids.tolist() for batch in plan(longer, store)[:2]] == [
        batch.ids.tolist() for batch in plan(work, store)
    ]
    ids = np.concatenate([batch.ids for batch in plan(longer, store)])
    assert sorted(ids.tolist()) == sorted([*range(6), *range(6)])


@pytest.mark.parametrize("threads", [1, 2])
def test_pillow_cuts_what_the_source_cuts(opened: Callable[[Row], list[Any]], threads: int) -> None:
    ours, theirs = opened(Row("torch crops", 1)), opened(Row("pil crops", threads))
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == (2, 3, SIZE, SIZE, 3) and a.dtype == b[0].dtype == torch.uint8
        assert (a.int() - torch.stack(b).int()).abs().max() <= 2  # the same but for roundings


@pytest.mark.parametrize(
    "kind", ["pil views", "lightly transform", "torchvision v2", "torch views"]
)
def test_views_are_normalised_batches(kind: str, opened: Callable[[Row], list[Any]]) -> None:
    if kind == "lightly transform":
        pytest.importorskip("lightly")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of its decoders
        batches = opened(Row(kind))
    for batch in batches:
        views = batch if isinstance(batch, torch.Tensor) else torch.stack(batch)
        assert views.shape == (2, 3, 3, SIZE, SIZE) and views.dtype == torch.float32
        assert views.min() >= -2.2 and views.max() <= 2.7  # 0 and 1, normalised
        assert views.std() > 0.3
        assert not torch.equal(views[0], views[1])


@pytest.mark.dali
@pytest.mark.skipif(not dali_available(), reason="NVIDIA DALI is not installed")
def test_dalis_graph_is_a_row(opened: Callable[[Row], list[Any]]) -> None:
    for batch in opened(Row(DALI, decode="cpu")):
        assert [view.shape for view in batch] == [(3, 3, SIZE, SIZE)] * 2


@pytest.mark.ffcv
@pytest.mark.slow
@pytest.mark.skipif(not ffcv_available(), reason="FFCV is not installed")
def test_ffcvs_loader_is_a_row(folder: Path, tmp_path: Path) -> None:
    made, missing = make_stores(str(folder), ["beton"], tmp_path)
    assert not missing
    row = Row(FFCV, store="beton")
    chain = open_chain(row, prepare(row, Work(made, image_size=SIZE, batch_size=3, images=12)))
    batches = [[view.clone() for view in batch] for batch in chain.batches()]
    assert len(batches) == 4  # of a file with two
    assert all(v.shape == (3, SIZE, SIZE, 3) and v.dtype == torch.uint8 for b in batches for v in b)


def test_the_first_turn_is_long_enough_to_try_decoders(
    monkeypatch: pytest.MonkeyPatch, work: Work
) -> None:
    monkeypatch.setattr("benchmarks.rows.TRIAL", 5)
    chain = open_chain(row := Row("torch crops", decode="auto"), prepare(row, work))
    assert [len(list(chain.batches())) for _ in range(3)] == [6, 2, 2]
    chain.close()


def test_a_turn_counts_images_and_the_first_one_the_way_to_the_first_batch(work: Work) -> None:
    turner = turns.Turner(Row("torch crops"), work)
    first, second = turner.turn(), turner.turn()
    assert turner.chain is not None
    turner.chain.close()
    assert first["images"] == second["images"] == 6
    assert 0 < first["first_batch_seconds"] < first["seconds"]
    assert second["first_batch_seconds"] == first["first_batch_seconds"]
    assert second["processor_seconds"] > 0 and first["gpu_mb"] == 0
    assert second["host_mb"] >= second["imports_mb"] > 10


def test_worker_processes_count() -> None:
    before = usage.processor_seconds()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        own = usage.time.process_time()
        assert pool.apply(_burn, (0.2,)) == 1
        assert usage.processor_seconds() - before > 0.15 > usage.time.process_time() - own


def _burn(seconds: float) -> int:
    until = usage.time.process_time() + seconds
    while usage.time.process_time() < until:
        pass
    return 1


def test_rows_name_what_runs_and_each_is_there_once() -> None:
    rows = all_rows(["folder", "beton", "tar"], [1, 4], ["cpu", "mixed"], "cuda")
    labels = [row.label for row in rows]
    assert len(set(labels)) == len(labels)
    assert {row.kind for row in rows if row.peer} == set(PEERS)
    assert "lightly transform, folder, 4 processes" in labels
    assert (
        "dali crops, tar, mixed, 4 threads" in labels and "torch crops, beton, 1 thread" in labels
    )
    assert {row.store for row in rows if "ffcv" in row.kind} == {"beton"}
    assert {row.store for row in rows if row.peer and "ffcv" not in row.kind} == {"folder"}
    on_cpu = all_rows(["folder"], [1], ["cpu"], "cpu")
    assert not any("ffcv" in row.kind or row.kind == "dali views" for row in on_cpu)


def test_tar_shards_hold_the_same_bytes_and_labels(store: Store, tmp_path: Path) -> None:
    (shard,) = make_tar(store, tmp_path / "tar").iterdir()
    with tarfile.open(shard) as tar:
        assert tar.getnames()[:3] == ["00000000.jpg", "00000000.cls", "00000001.jpg"]
        members = [tar.extractfile(name) for name in ("00000004.jpg", "00000004.cls")]
        assert [m.read() for m in members if m] == [store.read(4), b"0"]


def test_a_store_that_cannot_be_made_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.make_data.sys.executable", "false")  # a command that fails
    made, missing = make_stores(str(folder), ["folder", "beton"], tmp_path)
    assert made == {"folder": str(folder)} and list(missing) == ["beton"]


def turn(seconds: float, processor: float) -> dict[str, float]:
    memory = {"host_mb": 10 * seconds, "imports_mb": 5, "gpu_mb": 0}
    times = {"seconds": seconds, "processor_seconds": processor, "first_batch_seconds": 0.25}
    return {"images": 100, **memory, **times}


SLOW = [turn(4, 2), turn(8, 4), turn(2, 1)]
FAST = [turn(1, 1), turn(2, 2), turn(0.5, 0.5)]


def test_percentiles_and_ratios_are_taken_within_a_round() -> None:
    measured = {Row("pil crops"): SLOW, Row("torch crops", 2): FAST}
    result = figures.summarise(measured, needed=200)
    row = result["rows"]["torch crops, folder, 2 threads"]
    assert row["images_per_second"][1] == 100 and row["n"] == 3 and row["host_mb"] == 20
    assert row["first_batch_seconds"] == 0.25 and not row["peer"] and row["work"] == "crops"
    (ratio,) = result["ratios"].values()
    assert ratio["of"] == ["torch crops, folder, 2 threads", "pil crops, folder, 1 thread"]
    assert ratio["clock"] == [4.0] * 3 and ratio["core"] == [2.0] * 3
    estimate = result["estimates"]["torch crops, folder, 2 threads"]
    assert estimate["share"] == {"1": 0.5, "4": 0.125, "8": 0.0625}
    assert estimate["cores_a_rank"] == 2.0
    assert "estimates" not in figures.summarise(measured)


def test_a_rival_has_as_many_threads_where_there_is_one() -> None:
    rows = [Row("lightly transform"), Row("lightly transform", 4), Row("pil crops")]
    measured = {row: SLOW for row in rows} | {Row("torch crops", n): FAST for n in (1, 4)}
    pairs = [ratio["of"] for ratio in figures.summarise(measured)["ratios"].values()]
    assert [(a.split(", ")[2], b.split(", ")[2]) for a, b in pairs if "lightly" in b] == [
        ("1 thread", "1 thread"),
        ("4 threads", "4 processes"),
    ]
    assert len([b for _, b in pairs if "pil crops" in b]) == 2


def test_the_picture_sorts_rows_and_tells_ours_from_others() -> None:
    measured = {Row("pil crops"): SLOW, Row("torch crops"): FAST, Row("synthetic crops"): FAST}
    conditions = {"device": "cpu", "cpu": "A & B <x>", "data": "/d/photos", "commit": "abc"}
    conditions |= {"image_size": 224, "batch_size": 64, "versions": {"torch": "2"}}
    drawn = chart.draw({**figures.summarise(measured), **conditions})
    assert "href" not in drawn and "prefers-color-scheme: dark" in drawn
    svg = ElementTree.fromstring(drawn)
    texts = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    names = [t for t in texts if t and "crops, folder" in t]
    assert names == ["torch crops, folder, 1 thread", "pil crops, folder, 1 thread"]
    assert "2.0× pil crops" in texts and any("A & B <x>" in (t or "") for t in texts)
    bars = [r for r in svg.iter("{http://www.w3.org/2000/svg}rect") if r.get("height") == "16"]
    assert [bar.get("class") for bar in bars] == ["ours", "peer"]
    assert float(bars[0].get("width", 0)) == pytest.approx(2 * float(bars[1].get("width", 0)), 0.01)


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--only", "pil corps"], 2, "'pil corps' is in no row's name"),
        (["--threads", "0"], 2, "at least 1"),
        (["--batch-size", "64", "--images", "32"], 2, "--images at least a batch"),
        (["--data", "SIX"], 4, "holds 6 images: use --batch-size 6 or less"),
        (["--decode", "mixed"], 2, "'mixed' is on a GPU"),
        (["--decode", "gpu"], 2, "got 'gpu'"),
        (["--data", "/nowhere/at/all"], 4, "/nowhere/at/all is not a folder"),
        (["--data", "EMPTY"], 4, "empty folder"),
    ],
)
def test_what_cannot_be_measured_is_said(
    argv: list[str],
    code: int,
    said: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [{"EMPTY": str(tmp_path), "SIX": str(folder)}.get(word, word) for word in argv]
    try:
        assert loader.main(argv) == code
    except SystemExit as error:
        assert error.code == code
    assert said in capsys.readouterr().err


def test_nothing_left_to_measure_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {"left_out": {"lightly transform": "No module named 'lightly'"}, "failed": {}}
    monkeypatch.setattr(loader, "measure", lambda *args: ({}, lost))
    assert loader.main(["--data", str(folder), "--batch-size", "6"]) == 4
    assert "No module named 'lightly'" in capsys.readouterr().err


def said(row: Row, work: Work) -> list[dict[str, Any]]:
    """What a row's process answers when it is asked for one turn."""
    ours, theirs = multiprocessing.Pipe()
    serving = threading.Thread(target=turns.serve, args=(theirs, row, work))
    serving.start()
    answers = [ours.recv()]
    if "ready" in answers[0]:
        ours.send("go")
        answers.append(ours.recv())
        ours.send(None)
    serving.join()
    return answers


def test_a_rows_process_says_what_is_missing_and_what_failed(
    work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    (missing,) = said(Row("absent crops"), work)
    assert "pipelines.sources.absent_source" in missing["left_out"]
    ready, failed = said(Row("torch crops", threads=-1), work)
    assert ready == {"ready": True} and "threads must be at least 1" in failed["failed"]
    assert "Traceback" in capsys.readouterr().err
    ready, one = said(Row("synthetic crops"), work)
    assert one["turn"]["images"] == 6


class FakeRunner:
    """A row's process that answers at once; what happens at a kind's turn is in `happens`."""

    order: ClassVar[list[str]] = []
    happens: ClassVar[dict[tuple[str, int], Any]] = {}

    def __init__(self, row: Row, work: Work) -> None:
        self.kind = row.kind

    def answer(self) -> dict[str, Any]:
        missing = self.kind == "lightly transform"
        return {"left_out": "not installed"} if missing else {"ready": True}

    def turn(self) -> dict[str, Any]:
        self.order.append(self.kind)
        event = self.happens.get((self.kind, self.order.count(self.kind)), {"turn": turn(1, 1)})
        if isinstance(event, BaseException):
            raise event
        return event

    def stop(self, *, wait: float = 30.0) -> None:
        self.order.append(f"end of {self.kind}")


@pytest.fixture
def fake_runner(monkeypatch: pytest.MonkeyPatch) -> type[FakeRunner]:
    monkeypatch.setattr(turns, "Runner", FakeRunner)
    FakeRunner.order.clear()
    FakeRunner.happens.clear()
    return FakeRunner


def test_rows_take_turns_and_those_that_drop_out_are_named(fake_runner: type[FakeRunner]) -> None:
    rows = [Row("torch crops"), Row("lightly transform"), Row("dali crops"), Row("pil crops")]
    fake_runner.happens["dali crops", 3] = {"failed": "it died"}
    measured, lost = turns.measure(rows, Work({}), seconds=0)
    assert {row.kind: len(some) for row, some in measured.items()} == {
        "torch crops": turns.LEAST_ROUNDS,
        "pil crops": turns.LEAST_ROUNDS,
    }
    assert lost["left_out"] == {rows[1].label: "not installed"}
    assert lost["failed"] == {rows[2].label: "it died"}
    assert fake_runner.order[1:7] == ["torch crops", "dali crops", "pil crops"] * 2
    assert {f"end of {row.kind}" for row in rows} <= set(fake_runner.order)


def test_turns_are_seen_after_each_round(fake_runner: type[FakeRunner]) -> None:
    rows, seen = [Row("torch crops"), Row("pil crops")], list[list[int]]()
    fake_runner.happens["pil crops", 4] = KeyboardInterrupt()
    turns.measure(rows, Work({}), 1000, lambda some: seen.append([len(t) for t in some.values()]))
    assert seen == [[1, 1], [2, 2]]  # the first turn of each is to warm up


@pytest.mark.parametrize(("at", "complete"), [(4, 2), (2, 0)])
def test_an_interruption_keeps_the_complete_rounds(
    at: int, complete: int, fake_runner: type[FakeRunner]
) -> None:
    rows = [Row("torch crops"), Row("pil crops")]
    fake_runner.happens["pil crops", at] = KeyboardInterrupt()
    measured, lost = turns.measure(rows, Work({}), seconds=1000)
    assert [len(some) for some in measured.values()] == [complete] * (2 if complete else 0)
    assert lost["left_out"] == {"the rounds after an interruption": f"{complete} were complete"}
    assert {"end of torch crops", "end of pil crops"} <= set(fake_runner.order)


@pytest.mark.slow
def test_it_runs_as_a_script(folder: Path, tmp_path: Path) -> None:
    result, picture = tmp_path / "out" / "loader.json", tmp_path / "out" / "loader.svg"
    tiny = ["--image-size", "32", "--images", "6", "--batch-size", "3", "--seconds", "0"]
    command = [sys.executable, str(ROOT / "benchmarks" / "loader.py"), "--data", str(folder), *tiny]
    command += ["--only", "torch crops", "pil crops", "--threads", "1", "--needed", "100"]
    command += ["--json", str(result), "--chart", str(picture)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    written = json.loads(result.read_text())
    names = {"pil crops, folder, 1 thread", "torch crops, folder, 1 thread"}
    assert set(written["rows"]) == names and set(written["estimates"]) == names
    assert all(row["n"] >= 3 for row in written["rows"].values())
    assert written["command"].startswith("python benchmarks/loader.py --data")
    assert written["versions"]["torch"] == torch.__version__
    assert "torch crops, folder, 1 thread / pil crops" in done.stdout
    assert "estimate, not measured" in done.stdout
    assert "torch crops" in picture.read_text()


def test_a_row_that_works_ahead_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([5.0, 5.2, 5.4, 5.6, 5.601, 9.0])  # it works until the fourth look
    monkeypatch.setattr(turns, "processor_seconds", lambda: next(used))
    monkeypatch.setattr(turns.time, "sleep", lambda seconds: None)
    turns.rest(most=600)
    assert next(used) == 9.0
    looks: list[float] = []
    clock = iter(range(100))
    monkeypatch.setattr(turns, "processor_seconds", lambda: looks.append(0) or float(len(looks)))
    monkeypatch.setattr(turns.time, "perf_counter", lambda: float(next(clock)))
    turns.rest(most=5)  # one that never rests is not waited for without end
    assert len(looks) == 5
