"""Files that vanish, change or cannot be read, before a run and while it goes on (F17, F21).

What indexing alone has to do with odd names, links and broken files: tests/pipelines/test_index.py.
A .beton or a shard cut short while it is read: test_beton_store.py and test_tar_store.py there.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipelines
from byol_fast.pretrain import main as pretrain
from pipelines.convert import main as convert
from pipelines.sources import FILL
from pipelines.spec import AugmentSpec
from pipelines.stores.arrays import ArrayStore
from tests.faults.command import BACKBONE
from tests.faults.data_support import BACKENDS, NO_HANG, TINY, command, ended, make_folder, pictures
from tests.faults.test_checkpoints import AS_ANYBODY

IMAGES, BATCH, SIZE = 24, 4, 32
FOLDER_BACKENDS = BACKENDS[:2]  # FFCV reads one file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYOL_FAST_CACHE", str(tmp_path / "cache"))


def in_time(work: Callable[[], Any]) -> Any:
    """The result of `work`; fails where it hangs."""
    result: list[Any] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            result.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(NO_HANG)
    assert not thread.is_alive(), f"no end within {NO_HANG:g} s"
    if errors:
        raise errors[0]
    return result[0]


def loader(data: Path, backend: str, **options: Any) -> pipelines.ViewPipeline:
    options = {"batch_size": BATCH, "threads": 2, "prefetch": 0, **options}
    return pipelines.build(str(data), spec=AugmentSpec(image_size=SIZE), backend=backend, **options)


def crops(pipeline: pipelines.ViewPipeline, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(sample id, crops uint8 `[2, S, S, 3]`) of the steps below `stop`, before any colour."""
    rows = [pipeline.stream.rows(step) for step in range(stop)]
    for batch, got in zip(rows, pipeline.source.crops(iter(rows)), strict=True):
        for item, row in enumerate(batch.ids.tolist()):
            yield row, got[:, item].clone()


def delete(path: Path) -> None:
    path.unlink()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def as_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def other_size(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (9, 7)).save(path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def web_page(path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html><html>404</html>")


MISHAPS: dict[Callable[[Path], None], str] = {
    delete: "No such file",
    as_pipe: "not a regular file",
    as_folder: "Is a directory|not a regular file",
    as_device: "not a regular file",
    as_loop: "symbolic links",
    other_size: "when it was indexed",
    truncated: "corrupt|truncated",
    emptied: "an empty file",
    web_page: "a web page",
}


@pytest.mark.parametrize("backend", FOLDER_BACKENDS)
def test_files_that_go_wrong_while_they_are_read(backend: str, tmp_path: Path) -> None:
    """Every mishap at once, after the first batch: each is named, shown as grey, and the rest of
    the epoch is untouched, to the last bit."""
    folder = make_folder(tmp_path / "images", images=IMAGES)
    files, steps = pictures(folder, IMAGES), IMAGES // BATCH
    undisturbed = loader(folder, backend)
    wanted = in_time(lambda: list(crops(undisturbed, steps)))
    undisturbed.close()

    pipeline = loader(folder, backend)
    later = [row for row, _ in wanted[6 * BATCH // 2 :]][: len(MISHAPS)]  # not begun yet
    assert len(later) == len(MISHAPS)
    running = crops(pipeline, steps)
    got = [in_time(lambda: next(running))]
    for row, mishap in zip(later, MISHAPS, strict=True):
        mishap(files[row])
    got += in_time(lambda: list(running))
    bad = dict(pipeline.source.bad)
    in_time(pipeline.close)

    assert set(bad) == set(later)
    for row, (mishap, reason) in zip(later, MISHAPS.items(), strict=True):
        assert any(text in bad[row] for text in reason.split("|")), (mishap.__name__, bad[row])
    grey = torch.tensor(FILL, dtype=torch.uint8)
    assert [row for row, _ in got] == [row for row, _ in wanted]
    for (row, shown), (_, pixels) in zip(got, wanted, strict=True):
        assert bool((shown == grey).all()) if row in bad else torch.equal(shown, pixels), row


def odd_folder(folder: Path) -> dict[str, str]:
    """Beside good images, whatever a file system holds under an image's name; name -> reason."""
    make_folder(folder, images=100, classes=2)
    odd = folder / "class0"
    os.mkfifo(odd / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(odd)  # the path of a socket is short
        listener.bind("socket.jpg")
    (odd / "zero.jpg").symlink_to("/dev/zero")
    (odd / "tty.jpg").symlink_to("/dev/tty")
    (odd / "dangling.jpg").symlink_to("nowhere.jpg")
    (odd / "self.jpg").symlink_to("self.jpg")
    (odd / "one.jpg").symlink_to("two.jpg")
    (odd / "two.jpg").symlink_to("one.jpg")
    (odd / "folder.jpg").mkdir()  # an empty folder, and no image
    (odd / "up").symlink_to("..")
    return {
        **dict.fromkeys(("pipe.jpg", "socket.jpg", "zero.jpg"), "not a regular file"),
        "tty.jpg": "",  # where there is no terminal it cannot even be looked at
        "dangling.jpg": "No such file",
        **dict.fromkeys(("self.jpg", "one.jpg", "two.jpg"), "symbolic links"),
    }


def test_pipes_sockets_devices_and_links_end_in_quarantine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    expected = odd_folder(folder)
    run = ended(command("pipelines.index", folder, "--verify", "--json"))
    report = json.loads(run.out)
    assert report["images"] == 100 and run.code == 4  # 8 of 108 are more than 5 %
    told = {Path(bad["name"]).name: bad["reason"] for bad in report["quarantined"]}
    assert told.keys() == expected.keys()
    assert all(reason in told[name] for name, reason in expected.items()), told
    assert any("links to a folder it lies in" in note for note in report["notes"])


DROPPED = (
    AS_ANYBODY
    + """
import sys
from pathlib import Path
import pipelines.index
folder, step = Path(sys.argv[1]), sys.argv[2]

def work(folder):
    if step == "index":
        return pipelines.index.main([str(folder), "--verify", "--json"])
    from pipelines.spec import AugmentSpec
    pipeline = pipelines.build(str(folder), spec=AugmentSpec(image_size=32), batch_size=4,
                               threads=2, backend="torch")
    seen = [i for views in pipeline.epoch(0) for i in views.index.tolist()]
    bad = pipeline.stats()["bad"].items()
    print(len(seen), {Path(pipeline.store.name(row)).name: why for row, why in bad})
    pipeline.close()

sys.exit(work(folder))
"""
)


def test_files_without_the_right_to_read_them(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", images=40)
    files = pictures(folder, 40)
    for path in (folder, *folder.iterdir()):
        os.utime(path, (1e9, 1e9))  # changed long ago: the index is relied on
    script = [sys.executable, "-c", DROPPED, str(folder)]
    files[3].chmod(0)
    first = ended([*script, "index"])
    assert first.code == 0, first.err
    report = json.loads(first.out)
    assert report["images"] == 39
    denied, below = "cannot be read: Permission denied", files[3].relative_to(folder).as_posix()
    assert report["quarantined"] == [{"name": below, "reason": denied}]
    files[5].chmod(0)  # after it was indexed
    second = ended([*script, "train"])
    assert second.code == 0, second.err
    assert second.out == f"40 {{{files[5].name!r}: {denied!r}}}\n"  # 10 steps of 4 from 39 rows


ODD_NAMES = [b"latin\xe9.jpg", b"new\nline.jpg", b"\xff\xfe.jpg", "☃ ü.jpg".encode(), b"-rf.jpg"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_that_are_no_text_are_read_like_others(
    backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a folder whose own name is none, and from the .beton made of it."""
    caplog.set_level(logging.DEBUG)
    folder = os.fsencode(tmp_path) + b"/caf\xe9\n"
    data = make_folder(Path(os.fsdecode(folder)), images=8)
    for number, name in enumerate(ODD_NAMES):
        os.rename(os.fsencode(pictures(data, 8)[number]), folder + b"/class0/" + name)
    if backend == "ffcv":
        assert convert([str(data), str(tmp_path / "a.beton")]) == 0
        data = tmp_path / "a.beton"
    pipeline = loader(data, backend)
    seen = in_time(lambda: list(crops(pipeline, 2)))
    assert sorted(row for row, _ in seen) == list(range(8)) and not pipeline.source.bad
    text = "".join(map(pipeline.store.name, range(8))) + caplog.text
    text.encode("utf-8")  # can be printed anywhere
    pipeline.close()


@pytest.mark.parametrize("backend", FOLDER_BACKENDS)
def test_flipped_bits_harm_no_neighbour(backend: str, tmp_path: Path) -> None:
    """A third of the images with a bit flipped, some beyond any decoder's notice, none found
    beforehand: the run goes on, and every sound image is shown to the last bit."""
    folder = make_folder(tmp_path / "images", images=IMAGES)
    steps = IMAGES // BATCH
    clean = loader(folder, backend, verify=False)
    wanted = dict(in_time(lambda: list(crops(clean, steps))))
    clean.close()
    hit = range(0, IMAGES, 3)
    for row in hit:
        path = pictures(folder, IMAGES)[row]
        data = bytearray(path.read_bytes())
        start = data.index(b"\xff\xda") + 14  # behind all headers
        data[start + zlib.crc32(b"%d" % row) % (len(data) - start - 2)] ^= 1 << row % 8
        path.write_bytes(data)
    pipeline = loader(folder, backend, verify=False)
    assert len(pipeline.store) == IMAGES
    shown = dict(in_time(lambda: list(crops(pipeline, steps))))
    pipeline.close()
    assert set(pipeline.source.bad) <= set(hit)
    assert all(torch.equal(shown[row], wanted[row]) for row in wanted if row not in hit)
    assert any(not torch.equal(shown[row], wanted[row]) for row in hit)


def test_an_array_file_cut_short_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 4 and a status that says so, where a mapped file ended the process by SIGBUS."""
    data, out = tmp_path / "images.npy", tmp_path / "run"
    np.save(data, np.random.default_rng(0).integers(0, 256, (400, 40, 40, 3), np.uint8))
    real, reads = ArrayStore.read, list[int]()

    def read(store: ArrayStore, row: int) -> Any:
        reads.append(row)
        if len(reads) == 100:
            os.truncate(data, 10_000)
        return real(store, row)

    monkeypatch.setattr(ArrayStore, "read", read)
    words = [*TINY, "--data", str(data), "--out", str(out), "--backbone", BACKBONE]
    assert pretrain([*words, "--eval-every", "0"]) == 4
    assert f"{data} was cut short while it was read" in capsys.readouterr().err
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "failed" and "cut short" in status["reason"]
