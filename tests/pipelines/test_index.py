"""Indexing a folder: rows, classes, quarantine, reuse, and what it says when it refuses."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import index as index_module
from pipelines import indexbuild, indexfile, progress, scan
from pipelines.errors import BadImage, DataError
from pipelines.index import main, open_index, refuse_if_bad
from pipelines.indexfile import Index, Strings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BYOL_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def jpeg(height: int = 20, width: int = 30, value: int = 90) -> bytes:
    buffer = io.BytesIO()
    pixels = np.full((height, width, 3), value, np.uint8)
    pixels[::2] //= 3
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def fill(root: Path, files: dict[str, bytes | None]) -> Path:
    """Writes files (None: an ordinary picture) and sets the folders' times a minute back."""
    for i, (name, data) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(20 + i) if data is None else data)
    settle(root)
    return root


def settle(root: Path, ago: float = 60.0) -> None:
    """As if the folders had been changed a while ago: an index can be relied on at once."""
    for folder, _, _ in os.walk(root):
        now = os.stat(folder).st_mtime
        os.utime(folder, (now - ago, now - ago))


def three_classes(root: Path) -> Path:
    return fill(root, {f"{c}/{i}.jpg": None for c in ("cat", "dog", "eel") for i in range(4)})


def quietly(root: Path, **options: object) -> Index:
    return open_index(root, progress=False, **options)  # type: ignore[arg-type]


def paths(index: Index) -> list[str]:
    return [os.fsdecode(index.below(row)) for row in range(len(index))]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file that is read from now on."""
    seen: list[str] = []
    real = scan.measure_file

    def counted(path: bytes, *, verify: bool) -> tuple[int, int]:
        seen.append(os.path.basename(os.fsdecode(path)))
        return real(path, verify=verify)

    monkeypatch.setattr(scan, "measure_file", counted)
    return seen


# Rows and classes


def test_rows_are_sorted_sized_and_labelled(tmp_path: Path) -> None:
    index = quietly(three_classes(tmp_path / "data"))
    assert paths(index) == [f"{c}/{i}.jpg" for c in ("cat", "dog", "eel") for i in range(4)]
    assert index.classes == ("cat", "dog", "eel")
    assert index.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert index.labels.dtype == index.sizes.dtype == np.int32
    assert index.sizes.tolist() == [[20 + i, 30] for i in range(12)]
    assert index.verified
    assert index.notes == index.bad == ()


def test_a_class_is_the_first_folder_at_any_depth(tmp_path: Path) -> None:
    files = dict.fromkeys(["b/x/y/2.jpg", "b/1.jpg", "a/z/3.jpg", "a-b/4.jpg"])
    index = quietly(fill(tmp_path / "data", files))
    labelled = dict(zip(paths(index), index.labels.tolist(), strict=True))
    assert index.classes == ("a", "a-b", "b")
    assert labelled == {"a/z/3.jpg": 0, "a-b/4.jpg": 1, "b/1.jpg": 2, "b/x/y/2.jpg": 2}


@pytest.mark.parametrize(
    "names", [["1.jpg", "2.jpg"], ["one/1.jpg", "one/2.jpg"], ["a/1.jpg", "b/2.jpg", "3.jpg"]]
)
def test_unlabelled(tmp_path: Path, names: list[str]) -> None:
    index = quietly(fill(tmp_path / "data", dict.fromkeys(names)))
    assert index.classes == ()
    assert index.labels.tolist() == [-1] * len(names)
    assert any("beside the folders" in note for note in index.notes) == (len(names) == 3)


def test_a_broken_file_in_the_root_does_not_unlabel(tmp_path: Path) -> None:
    files = {"a/1.jpg": None, "b/2.jpg": None, "junk.jpg": b""}
    assert quietly(fill(tmp_path / "data", files)).labels.tolist() == [0, 1]


def test_empty_class_folder_is_warned_of(tmp_path: Path) -> None:
    root = three_classes(tmp_path / "data")
    (root / "void").mkdir()
    index = quietly(root)
    assert index.classes == ("cat", "dog", "eel")
    assert index.notes == ("void holds no images and is no class",)


def test_a_class_of_broken_images_keeps_its_number(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"a/1.jpg": None, "b/2.jpg": b"", "c/3.jpg": None})
    index = quietly(root)
    assert index.classes == ("a", "b", "c")
    assert index.labels.tolist() == [0, 2]
    assert index.notes == ("class b has no readable image left",)


def test_extensions_hidden_and_other_files(tmp_path: Path) -> None:
    names = ["a.JPG", "b.jpeg", "c.Png", ".d.jpg", "e.txt", "f", ".g/h.jpg", "i.jpg.part"]
    index = quietly(fill(tmp_path / "data", dict.fromkeys(names)))
    assert paths(index) == ["a.JPG", "b.jpeg", "c.Png"]
    assert index.ignored == 5


def test_odd_names(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"ü☃/é.jpg": None, "new\nline/ .jpg": None})
    odd = os.path.join(os.fsencode(root), b"latin\xe9")
    os.mkdir(odd)
    with open(os.path.join(odd, b"\xff\xfe.jpg"), "wb") as file:
        file.write(jpeg())
    for _ in range(2):  # made, and read back
        index = quietly(root)
        assert {index.below(row) for row in range(3)} == {
            "ü☃/é.jpg".encode(),
            b"new\nline/ .jpg",
            b"latin\xe9/\xff\xfe.jpg",
        }
        assert set(index.classes) == {"ü☃", "new\\nline", "latin\\udce9"}
        "".join(index.classes).encode("utf-8")  # can be printed anywhere
        settle(root)


def test_links_are_followed_but_never_in_a_circle(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"a/1.jpg": None})
    fill(tmp_path / "elsewhere", {"2.jpg": None})
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "me").symlink_to(".")
    (root / "a" / "self.jpg").symlink_to("self.jpg")
    (root / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    (root / "a" / "one.jpg").symlink_to("1.jpg")
    index = quietly(root)
    assert paths(index) == ["a/1.jpg", "a/one.jpg", "b/2.jpg"]
    assert index.classes == ("a", "b")
    assert sorted(index.notes) == [
        f"a/{name} links to a folder it lies in: not followed" for name in ("me", "up")
    ]
    assert [b.path for b in index.bad] == [b"a/gone.jpg", b"a/self.jpg"]
    assert all(b.reason.startswith("cannot be found") for b in index.bad)


def test_two_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"a/1.jpg": None, "b/2.jpg": None})
    (root / "a" / "to_b").symlink_to("../b")
    (root / "b" / "to_a").symlink_to("../a")
    assert paths(quietly(root)) == ["a/1.jpg", "a/to_b/2.jpg", "b/2.jpg", "b/to_a/1.jpg"]


# Quarantine


def broken_kinds() -> dict[str, tuple[bytes, str]]:
    whole = jpeg(200, 300)
    scan_start = whole.index(b"\xff\xda")
    marker_inside = whole[: scan_start + 200] + b"\xff\xc4\x00\x01" + whole[scan_start + 204 :]
    return {
        "page.jpg": (b"<html><body>404</body></html>", "web page"),
        "empty.png": (b"", "an empty file"),
        "cut.jpg": (whole[: len(whole) // 2], "corrupt JPEG"),
        "flipped.jpg": (marker_inside, "corrupt JPEG"),
        "noise.gif": (bytes(range(64)), "no image of a known format"),
    }


def test_broken_files_are_named_with_a_reason(tmp_path: Path) -> None:
    root = three_classes(tmp_path / "data")
    kinds = broken_kinds()
    fill(root, {f"dog/{name}": data for name, (data, _) in kinds.items()})
    os.mkfifo(root / "eel" / "pipe.jpg")
    index = quietly(root)
    assert len(index) == 12
    reasons = {os.fsdecode(b.path): b.reason for b in index.bad}
    assert reasons.pop("eel/pipe.jpg") == "not a regular file"
    assert reasons.keys() == {f"dog/{name}" for name in kinds}
    for name, (_, reason) in kinds.items():
        assert reason in reasons[f"dog/{name}"]


def test_headers_alone_find_what_headers_show(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {n: data for n, (data, _) in broken_kinds().items()})
    index = quietly(root, verify=False)
    assert paths(index) == ["cut.jpg", "flipped.jpg"]
    assert not index.verified


def test_unreadable_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = three_classes(tmp_path / "data")
    real_open, real_scandir = open, os.scandir

    def refusing_open(path: bytes, *rest: object, **options: object) -> object:
        if os.fsdecode(path).endswith("dog/2.jpg"):
            raise PermissionError(13, "Permission denied")
        return real_open(path, *rest, **options)  # type: ignore[call-overload]

    def refusing_scandir(path: bytes) -> object:
        if os.fsdecode(path).endswith("/eel"):
            raise PermissionError(13, "Permission denied")
        return real_scandir(path)

    monkeypatch.setattr(scan, "open", refusing_open, raising=False)
    monkeypatch.setattr(os, "scandir", refusing_scandir)
    index = quietly(root)
    assert len(index) == 7
    assert [(b.path, b.reason) for b in index.bad] == [
        (b"dog/2.jpg", "cannot be read: Permission denied"),
        (b"eel/", "the folder cannot be listed: Permission denied"),
    ]


def test_a_header_behind_64_kb_of_metadata(tmp_path: Path) -> None:
    data = jpeg()
    metadata = (b"\xff\xe1\xff\xff" + bytes(65533)) * 2
    root = fill(tmp_path / "data", {"a.jpg": data[:2] + metadata + data[2:]})
    assert quietly(root, verify=False).sizes.tolist() == [[20, 30]]


def test_huge_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_MAX_BYTES", 100)
    (tmp_path / "a.jpg").write_bytes(jpeg())
    with pytest.raises(BadImage, match="more than the limit"):
        scan.measure_file(str(tmp_path / "a.jpg"), verify=True)


def test_workers_change_nothing(tmp_path: Path) -> None:
    names = [f"{i:03d}.jpg" for i in range(100)]
    root = fill(tmp_path / "data", {n: (b"" if i % 9 == 4 else None) for i, n in enumerate(names)})
    one = quietly(root, workers=1)
    indexfile.locations(root)[0].unlink()
    many = quietly(root, workers=7)
    assert one.fingerprint == many.fingerprint
    assert one.bad == many.bad
    assert [os.fsdecode(b.path) for b in one.bad] == names[4::9]
    assert one.sizes[:, 0].tolist() == [20 + i for i in range(100) if i % 9 != 4]
    np.testing.assert_array_equal(one.sizes, many.sizes)


# Refusals


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is an empty folder"),
        ({"a/readme.txt": b"x", ".hidden.jpg": b"x"}, "only 2 files of other kinds"),
    ],
)
def test_nothing_to_train_on(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    root = tmp_path / "data"
    root.mkdir()
    fill(root, files)
    with pytest.raises(DataError, match=message) as caught:
        quietly(root)
    assert str(root) in str(caught.value)
    assert ": " in str(caught.value)  # the mend follows
    assert not indexfile.locations(root)[0].exists()


def test_only_dead_links(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "a.jpg").symlink_to("nowhere")
    with pytest.raises(DataError, match="no readable images"):
        quietly(root)


def test_the_root_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = three_classes(tmp_path / "data")

    def refuse(path: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be listed"):
        quietly(root)


def test_too_many_broken_files_are_refused(tmp_path: Path) -> None:
    names = {f"{i:02d}.jpg": (b"" if i < 2 else None) for i in range(20)}
    index = quietly(fill(tmp_path / "data", names))
    refuse_if_bad(index, 0.1)
    with pytest.raises(DataError, match=r"2 of 20 images cannot be used.*00\.jpg: an empty file"):
        refuse_if_bad(index, 0.09)


def test_all_broken_is_refused_whatever_the_share(tmp_path: Path) -> None:
    index = quietly(fill(tmp_path / "data", {"a.jpg": b"", "b.jpg": b""}))
    with pytest.raises(DataError, match="2 of 2"):
        refuse_if_bad(index, 1.0)


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
    with pytest.raises(DataError, match="format 2"):
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


# The command and its progress


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {f"{'ab'[i % 2]}/{i:02d}.jpg": (b"" if i == 7 else None) for i in range(40)}
    root = fill(tmp_path / "data", names)
    assert main([str(root), "--verify", "--json", "--workers", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 39
    assert report["classes"] == ["a", "b"]
    assert report["quarantined"] == [{"name": "b/07.jpg", "reason": "an empty file"}]
    assert report["read"] == 40
    assert report["images_per_second"] > 0
    assert main([str(root)]) == 0
    text = capsys.readouterr().out
    for part in ("39 images (verified)", "classes: 2 (a, b)", "b/07.jpg: an empty file", "read 0"):
        assert part in text


def test_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "missing")]) == 4
    assert "is not a folder" in capsys.readouterr().err
    root = fill(tmp_path / "data", {"a.jpg": b"", "b.jpg": None})
    assert main([str(root)]) == 4
    answer = capsys.readouterr()
    assert "a.jpg: an empty file" in answer.out  # named before it refuses
    assert "1 of 2 images cannot be used" in answer.err


def test_command_as_a_module(tmp_path: Path) -> None:
    broken = {os.fsdecode(b"a/\xff.jpg"): b"", "a/é.jpg": b""}
    root = fill(tmp_path / "data", broken | {f"{c}/1.jpg": None for c in "abcdeü"})
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.index", str(root)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"},
    )
    assert result.returncode == 4
    assert "\\udcff.jpg: an empty file" in result.stdout
    assert "\\xe9.jpg: an empty file" in result.stdout
    assert "classes: 6 (a, b, c, d, e, \\u2026)" in result.stdout
    assert "Traceback" not in result.stderr


def test_plain_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    with progress.Progress("verifying", 200) as bar:
        bar.advance(50)
        assert bar.line(10.0) == "verifying: 50 of 200 images (25.0%), 5/s, 30 s left"
        assert bar.line(4000.0).endswith("3 h 20 min left")
    assert capsys.readouterr().err.startswith("verifying: 50 of 200 images (25.0%)")
    with progress.Progress("listing", None, unit="files") as bar:
        bar.advance(7)
        assert bar.line(7.0) == "listing: 7 files, 1/s"
    capsys.readouterr()
    with progress.Progress("verifying", 200, enabled=False) as bar:
        bar.advance(50)
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.Progress("verifying", 20) as bar:
        bar.advance(20)
    assert "verifying" in terminal.getvalue()
    assert "20/20" in terminal.getvalue()


def test_listing_shows_progress_and_build_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = three_classes(tmp_path / "data")
    with caplog.at_level(logging.INFO):
        open_index(root, progress=False)
    assert "index written to" in caplog.text
    bar = progress.Progress("listing", None, enabled=False)
    assert len(scan.walk(os.fsencode(root), bar).names) == bar.done == 12
    assert indexbuild.root_listing(os.fsencode(root)) != indexbuild.root_listing(b"/")
