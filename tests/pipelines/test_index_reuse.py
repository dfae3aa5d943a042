"""An index kept on disk: when it is read again, made anew, or refused."""

import io
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from pipelines import index as index_module
from pipelines import indexfile, scan
from pipelines.errors import DataError
from pipelines.indexfile import Strings
from tests.pipelines.index_folders import (
    count_reads,
    fill,
    jpeg,
    paths,
    quietly,
    settle,
    three_classes,
)

# Reuse


def forbid_making(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("the index was made again")

    monkeypatch.setattr(index_module, "make_index", fail)


def test_an_unchanged_folder_is_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fill(three_classes(tmp_path / "data"), {"dog/bad.jpg": b""})
    before = root.stat().st_mtime_ns
    made = quietly(root)
    assert root.stat().st_mtime_ns == before
    forbid_making(monkeypatch)
    read = quietly(root)
    assert paths(read) == paths(made)
    assert read.bad == made.bad
    assert (read.classes, read.fingerprint) == (made.classes, made.fingerprint)
    np.testing.assert_array_equal(read.sizes, made.sizes)
    np.testing.assert_array_equal(read.labels, made.labels)


def test_a_folder_changed_just_before_is_listed_again_but_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = three_classes(tmp_path / "data")
    settle(root, ago=-60)  # changed "now"
    made = quietly(root)
    seen = count_reads(monkeypatch)
    assert quietly(root).fingerprint == made.fingerprint
    assert seen == []
    before = (root / "cat").stat()
    (root / "cat" / "new.jpg").write_bytes(jpeg())
    os.utime(root / "cat", ns=(before.st_atime_ns, before.st_mtime_ns))  # a coarse clock
    assert len(quietly(root)) == 13
    assert seen == ["new.jpg"]


def test_a_root_whose_time_stands_still_is_compared_by_names(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"a.jpg": None})
    before = root.stat()
    quietly(root)
    (root / "b.jpg").write_bytes(jpeg())
    os.utime(root, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert paths(quietly(root)) == ["a.jpg", "b.jpg"]


def test_only_what_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(three_classes(tmp_path / "data"), {"dog/bad.jpg": b"", "dog/bad2.jpg": b""})
    old = quietly(root)
    (root / "cat" / "0.jpg").unlink()
    (root / "cat" / "1.jpg").write_bytes(jpeg(50, 60))
    (root / "dog" / "new.jpg").write_bytes(jpeg(70, 80))
    (root / "dog" / "bad2.jpg").write_bytes(jpeg(90, 100))
    (root / "fox").mkdir()
    (root / "fox" / "1.png").write_bytes(b"")
    settle(root, ago=30)
    seen = count_reads(monkeypatch)
    index = quietly(root, workers=1)
    assert sorted(seen) == ["1.jpg", "1.png", "bad2.jpg", "new.jpg"]
    sizes = dict(zip(paths(index), index.sizes.tolist(), strict=True))
    assert "cat/0.jpg" not in sizes
    assert sizes["cat/1.jpg"] == [50, 60]
    assert sizes["dog/new.jpg"] == [70, 80]
    assert sizes["dog/bad2.jpg"] == [90, 100]
    assert sizes["eel/3.jpg"] == [31, 30]
    assert [b.path for b in index.bad] == [b"dog/bad.jpg", b"fox/1.png"]
    assert index.fingerprint != old.fingerprint
    indexfile.locations(root)[0].unlink()
    fresh = quietly(root)
    assert fresh.fingerprint == index.fingerprint
    np.testing.assert_array_equal(fresh.sizes, index.sizes)


def test_an_overwritten_file_is_found_by_refresh(tmp_path: Path) -> None:
    root = three_classes(tmp_path / "data")
    quietly(root)
    (root / "cat" / "1.jpg").write_bytes(jpeg(50, 60))  # changes no folder's time
    assert quietly(root).sizes[1].tolist() == [21, 30]
    assert quietly(root, refresh=True).sizes[1].tolist() == [50, 60]


def test_what_the_system_refused_is_tried_again_once_it_would_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rights and the targets of links change without a trace in sizes and dates."""
    root = three_classes(tmp_path / "data")
    (root / "eel" / "link.jpg").symlink_to(tmp_path / "late.jpg")
    settle(root)
    real = open

    def refusing(path: bytes, *rest: object, **options: object) -> object:
        if os.fsdecode(path).endswith("dog/2.jpg"):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **options)  # type: ignore[call-overload]

    with monkeypatch.context() as denied:
        denied.setattr(scan, "open", refusing, raising=False)
        denied.setattr(os, "access", lambda path, mode: False)
        assert [b.path for b in quietly(root).bad] == [b"dog/2.jpg", b"eel/link.jpg"]
        with monkeypatch.context() as kept:
            forbid_making(kept)
            assert len(quietly(root).bad) == 2  # nothing to be gained
    assert [b.path for b in quietly(root).bad] == [b"eel/link.jpg"]
    (tmp_path / "late.jpg").write_bytes(jpeg(50, 60))
    index = quietly(root)
    assert len(index) == 13 and index.bad == ()
    forbid_making(monkeypatch)
    assert len(quietly(root)) == 13


def test_verifying_after_headers_only_and_not_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = jpeg(200, 300)
    files = {f"{i}.jpg": None for i in range(5)} | {"cut.jpg": whole[: len(whole) // 2]}
    root = fill(tmp_path / "data", files)
    assert len(quietly(root, verify=False)) == 6
    seen = count_reads(monkeypatch)
    assert len(quietly(root, verify=True)) == 5
    assert len(seen) == 6
    seen.clear()
    assert quietly(root, verify=False).verified
    (root / "new.jpg").write_bytes(files["cut.jpg"])  # type: ignore[arg-type]
    settle(root)
    index = quietly(root, verify=False)
    assert (len(index), len(index.bad), index.verified) == (5, 2, True)
    assert seen == ["new.jpg"]


def test_fingerprint_is_of_names_and_sizes(tmp_path: Path) -> None:
    root = three_classes(tmp_path / "data")
    first = quietly(root).fingerprint
    assert len(first) == 64
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    assert quietly(copy).fingerprint == first
    (copy / "cat" / "0.jpg").rename(copy / "cat" / "00.jpg")
    renamed = quietly(copy).fingerprint
    with open(copy / "cat" / "1.jpg", "ab") as file:
        file.write(b"\0")
    assert len({first, renamed, quietly(copy, refresh=True).fingerprint}) == 3


# The file


def damaged(data: bytes) -> dict[str, bytes]:
    rest = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "text": b"no index",
        "zeros": bytes(len(data)),
    }
    for position in range(0, len(data), max(1, len(data) // 40)):
        flipped = bytearray(data)
        flipped[position] ^= 0xFF
        rest[f"flipped at {position}"] = bytes(flipped)
    return rest


def test_a_damaged_index_is_made_again_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = fill(tmp_path / "data", {"a.jpg": None, "b.jpg": None})
    made = quietly(root)
    path = indexfile.locations(root)[0]
    clean = path.read_bytes()
    rebuilt = 0
    for what, data in damaged(clean).items():
        path.write_bytes(data)
        caplog.clear()
        index = quietly(root)
        assert paths(index) == paths(made), what
        assert index.sizes.tolist() == made.sizes.tolist(), what
        if "not a readable index" in caplog.text:
            rebuilt += 1
            assert str(path) in caplog.text
    assert rebuilt >= 30


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_other_formats_and_foreign_files_are_refused(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"a.jpg": None})
    quietly(root)
    path = indexfile.locations(root)[0]
    with np.load(path) as columns:
        arrays = dict(columns)
    meta = json.loads(arrays["meta"].tobytes())

    def write(**changes: object) -> None:
        text = json.dumps(meta | changes).encode()
        np.savez(path, **(arrays | {"meta": np.frombuffer(text, dtype=np.uint8)}))

    write()
    assert len(indexfile.load(path, root)) == 1
    write(format=indexfile.FORMAT + 1)
    with pytest.raises(DataError, match="format 3"):
        indexfile.load(path, root)
    np.savez(path, **(arrays | {"sizes": np.zeros((5, 2), np.int32)}))
    with pytest.raises(DataError, match="do not fit"):
        indexfile.load(path, root)
    np.savez(path, meta=np.array([Payload(tmp_path / "executed")], dtype=object))
    with pytest.raises(DataError, match="not a readable index"):
        indexfile.load(path, root)
    assert not (tmp_path / "executed").exists()
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="single array"):
        indexfile.load(path, root)
    assert len(quietly(root)) == 1


def test_a_failed_write_keeps_the_old_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = three_classes(tmp_path / "data")
    quietly(root)
    path = indexfile.locations(root)[0]
    clean = path.read_bytes()

    def full(file: io.BytesIO, **columns: object) -> None:
        file.write(b"PK\x03\x04 half an index")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    index = quietly(root, refresh=True)
    assert len(index) == 12
    assert path.read_bytes() == clean
    assert "No space left on device" in caplog.text
    assert "BYOL_FAST_CACHE" in caplog.text
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_the_cache_is_used_where_the_parent_cannot_be_written_to(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = three_classes(tmp_path / "data")
    beside, cached = indexfile.locations(root)
    beside.mkdir()  # stands for a place that cannot be written to
    made = quietly(root)
    assert cached.parent == cache
    assert cached.is_file()
    forbid_making(monkeypatch)
    assert quietly(root).fingerprint == made.fingerprint


def test_a_good_index_in_the_cache_wins_over_a_stale_one_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = three_classes(tmp_path / "data")
    quietly(root)
    beside, cached = indexfile.locations(root)
    stale = beside.read_bytes()
    (root / "cat" / "new.jpg").write_bytes(jpeg())
    settle(root, ago=30)
    quietly(root)
    cached.parent.mkdir()
    shutil.move(beside, cached)
    beside.write_bytes(stale)
    forbid_making(monkeypatch)
    assert len(quietly(root)) == 13


def test_locations() -> None:
    beside, cached = indexfile.locations(Path("/data/sets/train/"))
    assert beside == Path("/data/sets/train.index.npz")
    assert cached.name.startswith("train-")
    assert indexfile.locations(Path("/data/sets/../sets/train"))[1] == cached
    assert indexfile.locations(Path("/other/train"))[1] != cached
    assert [path.parent for path in indexfile.locations(Path("/"))] == [cached.parent]


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BYOL_FAST_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)  # in no list of users
    assert indexfile.locations(Path("/data/train")) == [Path("/data/train.index.npz")]


def test_many_at_once(tmp_path: Path) -> None:
    root = three_classes(tmp_path / "data")
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(quietly(root).fingerprint)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert indexfile.load(indexfile.locations(root)[0], root).fingerprint == found[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "data.index.npz"]


def test_strings() -> None:
    items = [b"", b"abc", b"\xff\n", b"", b"x"]
    strings = Strings.of(items)
    assert list(strings) == items
    assert len(strings) == 5
    assert list(Strings.of([])) == []


def test_rows_outside_are_refused(tmp_path: Path) -> None:
    index = quietly(three_classes(tmp_path / "data"))
    for row in (-1, 12):
        with pytest.raises(IndexError):
            index.below(row)
