"""Errors of the system while images are read: tried again, or the end with the system's name."""

import errno
import io
import os
import pickle
import resource
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from pipelines import index, reading, scan
from pipelines.conversion.runner import convert
from pipelines.conversion.storage import Storage
from pipelines.errors import BadImage, DataError
from pipelines.sources.torch_source import TorchSource
from pipelines.stores import Store, open_store
from pipelines.stores.arrays import NpyFile
from pipelines.stores.openfile import OpenFiles
from tests.pipelines.fake_store import encoded, picture, rows_of

IMAGES = 12
PASSING = [errno.EIO, errno.ESTALE, errno.EINTR, errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0))


def images() -> dict[str, bytes]:
    return {f"{i:02}.jpg": encoded(picture(40, 50, i)) for i in range(IMAGES)}


def folder(path: Path) -> Path:
    path.mkdir()
    for name, data in images().items():
        (path / name).write_bytes(data)
    return path


def data_set(kind: str, path: Path) -> Path:
    if kind == "folder":
        return folder(path / "images")
    if kind == "list":
        folder(path / "images")
        names = "".join(f"images/{name} 0\n" for name in images())
        (path / "list.txt").write_text(names)
        return path / "list.txt"
    if kind == "npy":
        np.save(path / "a.npy", np.stack([picture(40, 50, i) for i in range(IMAGES)]))
        return path / "a.npy"
    if kind == "tar":
        source = folder(path / "source")
        (path / "shards").mkdir()
        for number in range(2):
            with tarfile.open(path / "shards" / f"{number}.tar", "w") as tar:
                for name in sorted(os.listdir(source))[number::2]:
                    tar.add(source / name, name)
        return path / "shards"
    mode: Any = "raw" if kind == "raw beton" else "jpeg"
    source = folder(path / "source")
    convert(source, path / "a.beton", storage=Storage(mode), workers=1, progress=False)
    return path / "a.beton"


KINDS = ["folder", "list", "npy", "tar", "beton", "raw beton"]


class Stutter:
    """Makes the system's reads fail: `of` says which ones, counted from 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error, self.reads = errno.EIO, 0
        self.of: Callable[[int], bool] = lambda number: False
        real = {name: getattr(os, name) for name in ("pread", "preadv")}

        def counted(name: str) -> Callable[..., Any]:
            def read(*arguments: Any) -> Any:
                number, self.reads = self.reads, self.reads + 1
                if self.of(number):
                    raise OSError(self.error, os.strerror(self.error))
                return real[name](*arguments)

            return read

        for name in ("pread", "preadv"):
            monkeypatch.setattr(os, name, counted(name))
        opened = scan.open_regular

        def open_regular(path: Any, flags: int) -> int:
            number, self.reads = self.reads, self.reads + 1
            if self.of(number):
                raise OSError(self.error, os.strerror(self.error))
            return opened(path, flags)

        for module in ("scan", "stores.folder", "stores.listed", "stores.openfile"):
            monkeypatch.setattr(f"pipelines.{module}.open_regular", open_regular)


@pytest.fixture
def stutter(monkeypatch: pytest.MonkeyPatch) -> Stutter:
    return Stutter(monkeypatch)


def opened(path: Path) -> Store:
    return open_store(path, progress=False, workers=1, max_bad_share=0)


@pytest.mark.parametrize("error", PASSING)
@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_once_is_tried_again(
    kind: str, error: int, tmp_path: Path, stutter: Stutter
) -> None:
    data = data_set(kind, tmp_path)
    wanted = [np.asarray(opened(data).read(row)) for row in range(IMAGES)]
    for left in tmp_path.glob("*.index.npz"):
        left.unlink()
    stutter.error, stutter.of = error, lambda number: number % 3 == 1
    store = opened(data)
    assert len(store) == IMAGES and store.quarantined == ()
    for row in range(IMAGES):
        np.testing.assert_array_equal(np.asarray(store.read(row)), wanted[row])
    assert stutter.reads > IMAGES


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_on_failing_ends_the_run_with_its_name(
    kind: str, tmp_path: Path, stutter: Stutter
) -> None:
    data = data_set(kind, tmp_path)
    store = opened(data)
    stutter.of = lambda number: True
    with pytest.raises(DataError, match=r"cannot be read: Input/output error \(EIO\), 3 times"):
        store.read(3)
    source = TorchSource(store, image_size=32, device="cpu", threads=1)
    with pytest.raises(DataError, match="EIO"):
        next(source.crops(rows_of(store, [range(4)])))  # type: ignore[arg-type]
    source.close()
    assert source.bad == {}
    stutter.of = lambda number: False
    assert len(np.asarray(store.read(3)).tobytes()) > 0


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_nothing_is_quarantined_for_it(
    kind: str, tmp_path: Path, stutter: Stutter, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_set(kind, tmp_path)
    stutter.error, stutter.of = errno.EMFILE, lambda number: number > 9
    assert index.main([str(data), "--verify", "--workers", "1"]) == 4
    text = capsys.readouterr().err
    assert "Too many open files (EMFILE)" in text and "ulimit -n" in text
    stutter.of = lambda number: False
    assert index.main([str(data), "--verify", "--workers", "1"]) == 0
    assert f"{IMAGES} images (verified)" in capsys.readouterr().out


def test_what_a_shard_could_not_give_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index of an earlier version may hold it for broken."""
    data = data_set("tar", tmp_path)
    real = scan.decode.verify
    failing = [True]

    def verify(image: bytes) -> tuple[int, int]:
        if failing:
            failing.pop()
            raise BadImage("cannot be read: Stale file handle")
        return real(image)

    monkeypatch.setattr(scan.decode, "verify", verify)
    assert len(open_store(data, progress=False, workers=1, max_bad_share=1)) == IMAGES - 1
    assert len(open_store(data, progress=False, workers=1)) == IMAGES


@pytest.mark.parametrize("kind", ["npy", "tar", "beton", "raw beton"])
def test_short_reads_are_completed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_set(kind, tmp_path)
    wanted = [np.asarray(opened(data).read(row)) for row in range(IMAGES)]
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 100), at))
    monkeypatch.setattr(os, "preadv", lambda fd, rooms, at: preadv(fd, [rooms[0][:100]], at))
    store = opened(data)
    for row in range(IMAGES):
        np.testing.assert_array_equal(np.asarray(store.read(row)), wanted[row])


@pytest.mark.parametrize("kind", ["npy", "tar", "beton", "raw beton"])
def test_a_file_cut_short_while_it_is_in_use_ends_the_run(kind: str, tmp_path: Path) -> None:
    data = data_set(kind, tmp_path)
    store = pickle.loads(pickle.dumps(opened(data)))
    file = data / "0.tar" if kind == "tar" else data
    os.truncate(file, 600)
    with pytest.raises(DataError, match=rf"{file.name} (was cut short|ends early)"):
        for row in range(IMAGES):
            store.read(row)


def test_a_stale_handle_is_replaced_unless_the_file_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    (file,) = [OpenFiles([path])[0]]
    number = file.fd
    file._open_again()
    assert file.fd == number and file.read(2, 3) == b"234"
    path.unlink()
    path.write_bytes(b"another one")
    file._open_again()
    assert file.read(2, 3) == b"234"


def test_arrays_in_a_file_are_read_row_by_row(tmp_path: Path) -> None:
    for array in (
        np.stack([picture(8, 9, i) for i in range(7)]),
        np.arange(7 * 72, dtype=np.uint8).reshape(7, 8, 9),
    ):
        np.save(tmp_path / "a.npy", array)
        store: Any = opened(tmp_path / "a.npy")
        assert isinstance(store.images, NpyFile)
        assert store.fingerprint == open_store(array).fingerprint
        for part in (slice(0, 7), slice(1, 3), slice(0, 7, 3), slice(5, 99), slice(3, 3)):
            np.testing.assert_array_equal(store.images[part], array[part])
        with pytest.raises(IndexError):
            store.images[7]
        np.save(tmp_path / "a.npy", np.asfortranarray(array))
        assert opened(tmp_path / "a.npy").fingerprint == store.fingerprint


@pytest.fixture
def few_handles() -> Iterator[int]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(os.listdir("/proc/self/fd")) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_no_more_shards_are_held_open_than_the_limit_allows(
    tmp_path: Path, few_handles: int
) -> None:
    for shard in range(120):
        with tarfile.open(tmp_path / f"{shard:03}.tar", "w") as tar:
            info = tarfile.TarInfo(f"{shard}.jpg")
            info.size = len(data := encoded(picture(8, 8, shard)))
            tar.addfile(info, io.BytesIO(data))
    store = opened(tmp_path)
    assert len(store) == 120 and store.quarantined == ()
    for row in range(120):
        store.read(row)
    assert len(os.listdir("/proc/self/fd")) < few_handles - 5


def test_shards_are_closed_where_the_process_needs_the_handles(
    tmp_path: Path, few_handles: int
) -> None:
    paths = [tmp_path / str(number) for number in range(60)]
    for path in paths:
        path.write_bytes(b"0123456789")
    files = OpenFiles(paths)
    files.most = 512  # as under a limit that was higher
    for number in range(60):
        assert files[number].read(2, 3) == b"234"
    assert files.most < 60


def test_errors_of_a_file_stay_its_own(tmp_path: Path) -> None:
    data = data_set("folder", tmp_path)
    store = opened(data)
    (data / "03.jpg").unlink()
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        store.read(3)


def test_a_decoder_without_memory_condemns_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_set("folder", tmp_path)

    def fails(*arguments: Any, **options: Any) -> None:
        raise ValueError("Insufficient memory (case 4)")

    with monkeypatch.context() as patch:
        patch.setattr(simplejpeg, "decode_jpeg", fails)
        assert index.main([str(data), "--verify"]) == 1
    assert "out of memory" in capsys.readouterr().err
    assert index.main([str(data), "--verify"]) == 0
