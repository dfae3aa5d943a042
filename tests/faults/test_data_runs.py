"""What a whole run does with bad, slow or changed data (F7, F13, F17, F19, F20, F22, F23).

The command is called in this process, which saves importing PyTorch again for each run; what ends a
process is done to one of its own. F20 is shown by tests/byol_fast/test_pretrain.py (empty folder,
batch larger than the data, unlabelled images, one image a class) and tests/pipelines/test_index.py
(empty class); F18 by tests/pipelines/test_image_policy.py; F22's converter by test_convert.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pipelines
from byol_fast import assemble, checkpoint
from byol_fast.config import parse
from byol_fast.distributed import World
from byol_fast.model import BYOL
from byol_fast.pretrain import main as pretrain
from byol_fast.session.opening import agree_on_parts
from pipelines.convert import main as convert
from pipelines.errors import BadImage, DataError
from pipelines.parts import Held
from pipelines.sources import reader
from pipelines.sources.torch_source import resize_crop
from pipelines.spec import AugmentSpec
from pipelines.stores import Store, open_store
from pipelines.stores.beton import BetonStore
from pipelines.stores.folder import FolderStore
from tests.faults.data_support import BACKENDS, NO_HANG, TINY, ended, make_folder, pictures

SHORT = [*TINY, "--eval-every", "0", "--log-every", "1"]


def small(backbone: str, hidden_layer: int | str, image_size: int, **options: Any) -> BYOL:
    """In the place of the network asked for: what is tried here is the way of the data."""
    layers = [nn.Conv2d(3, 8, 4, 4, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return BYOL(network, -1, image_size, **options)


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, a network that costs nothing, and PyTorch's settings as they were."""
    monkeypatch.setenv("BYOL_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assemble, "BYOL", small)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "images", images=48, classes=1)


@pytest.fixture(scope="module")
def beton(unlabelled: Path) -> Path:
    out = unlabelled.with_suffix(".beton")
    assert convert([str(unlabelled), str(out)]) == 0
    return out


def run(data: Path, out: Path, *more: Any) -> int:
    return pretrain(["--data", str(data), "--out", str(out), *SHORT, *map(str, more)])


def refused(
    capsys: pytest.CaptureFixture[str], code: int, data: Path, out: Path, *texts: str
) -> None:
    """The run ends with the code and all of the texts in one clear error."""
    assert run(data, out) == code
    told = capsys.readouterr().err
    assert "Traceback" not in told and all(text in told for text in texts), told
    assert not (out / "checkpoints").exists()


# F7: other workers, another backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_go_on_with_other_workers_and_another_backend(backend: str, beton: Path) -> None:
    """The second half of an epoch and a step into the next, by whatever goes on with it."""

    def rows(backend: str, threads: int, prefetch: int, start: int) -> list[Any]:
        pipeline = pipelines.build(
            str(beton),
            spec=AugmentSpec(image_size=32),
            batch_size=10,
            seed=3,
            backend=backend,
            threads=threads,
            prefetch=prefetch,
        )
        stream, got = pipeline.stream, []
        for step, views in enumerate(pipeline.steps(start, 7), start):
            planned = stream.rows(step)
            assert views.index.tolist() == planned.ids.tolist()
            got.append((views.index.tolist(), planned.windows.tolist(), planned.colours.tolist()))
        pipeline.close()
        return got

    whole = rows("torch", threads=1, prefetch=0, start=0)
    assert len(whole) == 7 and len({tuple(ids) for ids, *_ in whole}) == 7
    for threads, prefetch in ((1, 4), (3, 0), (5, 2)):
        assert rows(backend, threads, prefetch, start=3) == whole[3:]


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_run_goes_on_with_another_backend(backend: str, beton: Path, tmp_path: Path) -> None:
    assert run(beton, tmp_path, "--backend", "torch", "--threads", 1, "--max-steps", 2) == 0
    assert run(beton, tmp_path, "--backend", backend, "--threads", 3, "--max-steps", 4) == 0
    state = checkpoint.latest(tmp_path / "checkpoints")
    assert state is not None and state["step"] == 4


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_every_backend_trains_alike_from_one_beton(
    backend: str, beton: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same rows and windows; pixels that differ by a level or so."""
    losses = {}
    for name in ("torch", backend):
        torch.manual_seed(0)
        assert run(beton, tmp_path / name, "--backend", name, "--max-steps", 4) == 0
        assert f"cut by the {name} backend" in capfd.readouterr().err
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(losses[backend]) == 4 and losses[backend] == pytest.approx(losses["torch"], rel=0.05)


# F13: workers that die


class Death(BaseException):
    """No `Exception`: what only the very last resort catches."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", [MemoryError, SystemExit, KeyboardInterrupt, Death])
def test_a_loader_thread_that_dies_ends_the_run_with_its_error(
    how: type[BaseException], backend: str, beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipelines.build(
        str(beton), spec=AugmentSpec(image_size=32), batch_size=8, threads=3, backend=backend
    )
    real, dying = BetonStore.read, threading.Event()

    def read(store: BetonStore, row: int) -> Any:
        if dying.is_set():
            raise how("out of luck")
        return real(store, row)

    monkeypatch.setattr(BetonStore, "read", read)
    views, done = pipeline.steps(0, 1000), threading.Event()
    next(views)
    caught: list[BaseException] = []

    def consume() -> None:
        try:
            for _ in views:
                dying.set()
        except BaseException as error:
            caught.append(error)
        pipeline.close()
        done.set()

    threading.Thread(target=consume, daemon=True).start()
    assert done.wait(NO_HANG), "the consumer or the closing hangs"
    assert isinstance(caught[0], how) and "out of luck" in str(caught[0])


CRASHING = """
import os, signal, sys
from pipelines.stores.folder import FolderStore
real, reads = FolderStore.read, []
def read(store, row):  # on a loader's thread
    reads.append(row)
    if len(reads) == 60 and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os.kill(os.getpid(), int(sys.argv[2]))
    return real(store, row)
FolderStore.read = read
from byol_fast import assemble
from byol_fast.pretrain import main
from tests.faults.test_data_runs import small
assemble.BYOL = small
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
def test_a_loader_thread_that_crashes_takes_the_process_along_and_repeating_mends_it(
    unlabelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault in a decoder's compiled code: the process is gone at once, never half alive."""
    out = tmp_path / "run"
    assert run(unlabelled, out, "--max-steps", 1) == 0  # its checkpoint is on the disk
    words = [sys.executable, "-c", CRASHING, tmp_path / "crashed", int(signal.SIGSEGV)]
    words += ["--data", unlabelled, "--out", out, *SHORT, "--checkpoint.every", "1"]
    words += ["--max-steps", "5", "--threads", "2"]
    first = ended([*map(str, words)], limit=120)
    assert first.code == -signal.SIGSEGV and (tmp_path / "crashed").exists()
    capsys.readouterr()
    assert run(unlabelled, out, "--checkpoint.every", 1, "--max-steps", 5) == 0
    told = capsys.readouterr().err
    assert "resumed at step" in told and "resumed at step 5" not in told
    assert json.loads((out / "status.json").read_text())["step"] == 5


# F17: broken images


def test_broken_images_are_counted_in_the_run_and_refused_past_the_threshold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "images", images=100, classes=1)
    files = pictures(folder, 100)
    whole = files[0].read_bytes()
    marker = whole.index(b"\xff\xda") + 60
    damages = {
        files[1]: (whole[: len(whole) // 2], "corrupt JPEG"),
        files[2]: (whole[:marker] + b"\xff\xc4\x00\x01" + whole[marker + 4 :], "corrupt JPEG"),
        files[3]: (b"", "an empty file"),
        files[4]: (b"<html><body>403</body></html>", "a web page"),
    }
    for path, (data, _) in damages.items():
        path.write_bytes(data)
    out = tmp_path / "run"
    assert run(folder, out, "--batch-size", 48, "--epochs", 1) == 0
    told = capsys.readouterr().err
    assert "4 broken images are left out" in told
    for path, (_, reason) in damages.items():
        assert any(path.name in line and reason in line for line in told.splitlines()), path
    assert json.loads((out / "summary.json").read_text())["quarantined"] == 4
    assert "4 broken images were found beforehand" in (out / "report.html").read_text()
    for path in files[5:8]:  # 7 of 100: something larger is wrong
        path.write_bytes(b"")
    os.utime(files[5].parent)
    refused(capsys, 4, folder, tmp_path / "other", str(folder), "7 of 100 images", "more than 5.0%")


# F19: extreme shapes

SHAPES = [(1, 1), (1, 2000), (2000, 1), (4000, 3), (3, 4000), (2, 2), (31, 33)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_shapes_give_the_windows_of_the_plan(backend: str, tmp_path: Path) -> None:
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number, (height, width) in enumerate(SHAPES):
        smooth = np.linspace(20, 220, height * width).reshape(height, width, 1)
        pixels = (smooth + rng.integers(-9, 9, (1, 1, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=95, subsampling=0)
    data = folder
    if backend == "ffcv":
        data = tmp_path / "images.beton"
        assert convert([str(folder), str(data)]) == 0
    pipeline = pipelines.build(
        str(data), spec=AugmentSpec(image_size=24), batch_size=7, threads=2, backend=backend
    )
    assert pipeline.store.sizes.tolist() == [list(shape) for shape in SHAPES]
    reference = open_store(folder, progress=False)
    for step in range(3):  # three epochs: other windows in each
        rows = pipeline.stream.rows(step)
        (got,) = pipeline.source.crops([rows])
        for item, row in enumerate(rows.ids.tolist()):
            data_read = reference.read(row)
            assert isinstance(data_read, bytes)
            pixels = pipelines.decode.decode(data_read)
            for view in range(2):
                wanted = resize_crop(pixels, rows.windows[item, view].tolist(), 24).int()
                worst = int((got[view, item].int() - wanted).abs().max())
                assert worst <= (0 if backend == "torch" else 12), (SHAPES[row], view, worst)
    assert pipeline.source.bad == {}
    pipeline.close()


# F22: foreign and truncated .beton files


@pytest.mark.parametrize("damage", ["foreign", "empty", "truncated", "header", "pipe"])
def test_a_run_from_a_damaged_beton_is_refused(
    damage: str, beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = tmp_path / "train.beton", beton.read_bytes()
    if damage == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(
            {
                "foreign": b"PK\x03\x04" + b"\0" * 5000,
                "empty": b"",
                "truncated": data[: len(data) // 2],
                "header": b"\xff" * 64 + data[64:],
            }[damage]
        )
    refused(capsys, 4, path, tmp_path / "run", str(path))


# F23: slow storage


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_slow_storage_is_waited_for_and_named(
    backend: str, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second for every file: the run completes, and its report says where the time went."""
    real = FolderStore.read

    def read(store: FolderStore, row: int) -> bytes:
        time.sleep(0.5)
        return real(store, row)

    monkeypatch.setattr(FolderStore, "read", read)
    more = ["--backend", backend, "--threads", 2, "--batch-size", 6, "--epochs", 1]
    assert run(unlabelled, tmp_path, *more) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shares = [line["time/data_wait_share"] for line in lines if "time/data_wait_share" in line]
    assert len(shares) == 8 and max(shares[1:]) > 0.5, shares
    split = json.loads((tmp_path / "summary.json").read_text())["throughput"]
    assert split["decode_wait"] > 4 and max(split, key=split.get) == "decode_wait", split
    report = (tmp_path / "report.html").read_text()
    assert "Training stood waiting for images" in report
    assert "the loader is the bottleneck" in report


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_disk_that_goes_away_ends_the_run(
    backend: str,
    unlabelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Grey pixels take the place of single images, not of all that are left to train on."""
    monkeypatch.setattr(reader, "ALL_BAD", 16)
    real, seen = FolderStore.read, list[int]()

    def read(store: FolderStore, row: int) -> bytes:
        seen.append(row)
        if len(seen) > 60 or len(seen) % 4 == 0:
            raise BadImage("cannot be read: Stale file handle")
        return real(store, row)

    monkeypatch.setattr(FolderStore, "read", read)
    assert run(unlabelled, tmp_path, "--backend", backend, "--batch-size", 4) == 4
    assert 60 < len(seen) < 6 * 48
    told = capsys.readouterr().err
    assert "none of the last 16 images could be read or decoded" in told
    assert "Stale file handle" in told and "Traceback" not in told
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and "none of the last 16" in status["reason"]
    monkeypatch.setattr(FolderStore, "read", real)
    assert run(unlabelled, tmp_path, "--backend", backend, "--batch-size", 4) == 0


# A changed data set on resume


def test_a_data_set_that_changed_is_refused_on_resume_unless_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = make_folder(tmp_path / "images", images=32, classes=1), tmp_path / "run"
    assert run(folder, out, "--max-steps", 1) == 0
    moved = folder.rename(tmp_path / "moved")  # the same images elsewhere are the same data
    assert run(moved, out, "--max-steps", 2) == 0
    pictures(moved, 1)[0].unlink()
    capsys.readouterr()
    assert run(moved, out, "--max-steps", 3) == 2
    told = capsys.readouterr().err
    assert "belongs to another run" in told and "data: 32 images" in told and "31 images" in told
    assert run(moved, out, "--max-steps", 3, "--allow-config-change") == 0
    state = checkpoint.latest(out / "checkpoints")
    assert state is not None and state["step"] == 3 and state["data"]["images"] == 31


def test_ranks_whose_images_differ_are_refused(unlabelled: Path, tmp_path: Path) -> None:
    """As where one machine has an older copy: row 7 would be another image there."""
    mine = open_store(unlabelled, progress=False)
    other = open_store(make_folder(tmp_path / "images", images=48, seed=9), progress=False)
    config = parse(["--data", str(unlabelled)])

    def world(store: Store, elsewhere: bool) -> World:
        held = [Held.of(store), Held.of(other if elsewhere else mine)]
        return cast(World, SimpleNamespace(gather=lambda mine: held))

    assert len(agree_on_parts(mine, config, world(mine, elsewhere=False))) == 1
    for of_rank_0, elsewhere in ((other, False), (mine, True)):  # here, or on some other rank
        with pytest.raises(DataError, match="does not hold the same images on every machine"):
            agree_on_parts(mine, config, world(of_rank_0, elsewhere))
