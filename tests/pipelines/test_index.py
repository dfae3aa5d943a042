"""Indexing a folder: rows, classes, quarantine, and what it says when it refuses."""

import os
from pathlib import Path

import numpy as np
import pytest

from pipelines import indexfile, scan
from pipelines.errors import BadImage, DataError
from pipelines.index import refuse_if_bad
from tests.pipelines.index_folders import fill, jpeg, paths, quietly, settle, three_classes

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
    assert index.notes == ("1 folder without images, which are no classes (void)",)


def test_a_class_of_broken_images_keeps_its_number(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"a/1.jpg": None, "b/2.jpg": b"", "c/3.jpg": None})
    index = quietly(root)
    assert index.classes == ("a", "b", "c")
    assert index.labels.tolist() == [0, 2]
    assert index.notes == ("1 class folder without any readable image (b)",)


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
    assert paths(index) == ["a/1.jpg", "b/2.jpg"]
    assert index.classes == ("a", "b")
    assert index.notes == (
        "left out: 2 links to folders that are listed already (a/me → a, a/up → .)",
        "left out: 1 link to images that are listed already (a/one.jpg): copy what is to count "
        "twice",
    )
    assert [b.path for b in index.bad] == [b"a/gone.jpg", b"a/self.jpg"]
    assert all(b.reason.startswith("cannot be found") for b in index.bad)


def test_two_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"a/1.jpg": None, "b/2.jpg": None})
    (root / "a" / "to_b").symlink_to("../b")
    (root / "b" / "to_a").symlink_to("../a")
    index = quietly(root)
    assert paths(index) == ["a/1.jpg", "b/2.jpg"]
    assert "2 links to folders that are listed already (a/to_b → b, b/to_a → a)" in index.notes[0]


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
