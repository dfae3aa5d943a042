"""Tar shards as a store: samples, labels, quarantine, the index that is kept, what is refused."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines import index as index_command
from pipelines.decode import decode
from pipelines.errors import BadImage, DataError
from pipelines.stores import Store, open_store, tarbuild, tarshards
from pipelines.stores.openfile import OpenFile, OpenFiles
from pipelines.stores.tar import TarStore
from tests.pipelines.fake_store import encoded, picture


def jpeg(number: int = 0) -> bytes:
    return encoded(picture(20 + number, 30, seed=number))


def write(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, shards: int = 3, each: int = 4) -> Path:
    """Images 0, 1, 2, ... with the labels 0, 1, 2, 0, ..."""
    for shard in range(shards):
        files = {}
        for number in range(shard * each, (shard + 1) * each):
            files[f"{number:04}.jpg"] = jpeg(number)
            files[f"{number:04}.cls"] = str(number % 3).encode()
        write(folder / f"train-{shard:03}.tar", files)
    return folder


def quietly(data: str | Path, **options: object) -> TarStore:
    store = open_store(data, progress=False, **options)  # type: ignore[arg-type]
    assert isinstance(store, TarStore)
    return store


def names(store: Store) -> list[str]:
    return [store.name(row).rpartition(".tar/")[2] for row in range(len(store))]


# Rows


def test_it_is_a_store(tmp_path: Path) -> None:
    store = quietly(write_shards(tmp_path / "data"))
    assert isinstance(store, Store) and store.encoded and len(store) == 12
    assert store.sizes.tolist() == [[20 + i, 30] for i in range(12)]
    assert store.labels.tolist() == [0, 1, 2] * 4
    assert store.sizes.dtype == store.labels.dtype == np.int32
    assert store.classes == ("0", "1", "2") and store.quarantined == ()
    assert store.name(5) == str(tmp_path / "data" / "train-001.tar" / "0005.jpg")
    assert [store.read(row) for row in range(12)] == [jpeg(row) for row in range(12)]
    assert len(store.fingerprint) == 64
    for row in (-1, 12):
        with pytest.raises(IndexError):
            store.read(row)


def test_samples_are_grouped_as_webdataset_does(tmp_path: Path) -> None:
    files = {
        "__meta__": b"x",
        "a/1.seg.png": jpeg(1),  # an image too, and the first
        "a/1.jpg": jpeg(2),
        "a/1.cls": b"4",
        "a.b/1.JPG": jpeg(3),  # a dot in a folder's name splits nothing
        "b/1.json": b"{}",  # another sample, without an image
        "c/2.txt": b"text",
        "c/2.jpeg": jpeg(4),
        "noending": jpeg(5),
        "c/.3.jpg": jpeg(6),
        "c/2.cls": b"1",  # what has no key is between, but ends no sample
        "c/4.webp": encoded(picture(25, 30), "WEBP"),
        "c/2.jpg": jpeg(7),  # the same key again: a sample of its own
    }
    store = quietly(write(tmp_path / "a.tar", files))
    assert names(store) == ["a/1.seg.png", "a.b/1.JPG", "c/2.jpeg", "c/4.webp", "c/2.jpg"]
    assert store.labels.tolist() == [4, -1, 1, -1, -1]
    assert store.index.ignored == 4
    assert store.index.notes == ("1 samples have several images: each one's first is used",)


def test_labels(tmp_path: Path) -> None:
    labels = {
        "cls": b" 7\n",
        "cls2": b"3",
        "CLS": b"2",
        "json": b'{"cls": 5, "label": 6}',
        "JSON": b'{"label": 6, "caption": "a cat"}',
        "Json": b'{"label": "cat"}',
        "jsOn": b'{"label": true}',
        "jSon": b"[1]",
        "jsoN": b"{" * 100_000,
        "jSOn": b"[" * 200_000,
        "Cls": b"cat",
        "cLs": b"-5",
        "clS": b"99999999",
        "txt": b"1",
    }
    files: dict[str, bytes] = {}
    for number, (ending, data) in enumerate(labels.items()):
        files |= {f"{number}.{ending}": data, f"{number}.jpg": jpeg(number)}
    files |= {"both.json": b'{"label": 1}', "both.jpg": jpeg(), "both.cls": b"3"}
    store = quietly(write(tmp_path / "a.tar", files))
    assert store.labels.tolist() == [7, -1, 2, 5, 6, *[-1] * 9, 3]
    assert store.index.notes == ("6 labels are no class numbers and count as none",)
    assert store.classes == tuple(map(str, range(8)))


def test_unlabelled(tmp_path: Path) -> None:
    store = quietly(write(tmp_path / "a.tar", {"1.jpg": jpeg(), "2.jpg": jpeg()}))
    assert store.classes == () and store.labels.tolist() == [-1, -1]


# Which shards


def test_ways_to_name_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", 12, 1)
    (folder / "dataset.json").write_text("{}")
    (folder / ".hidden.tar").write_bytes(b"")
    everything = quietly(folder)
    assert names(everything) == [f"{i:04}.jpg" for i in range(12)]
    for pattern, rows in {
        "train-000.tar": [0],
        "train-{000..011}.tar": range(12),
        "train-{009..011}.tar": [9, 10, 11],
        "train-0{0..1}{0,1}.tar": [0, 1, 10, 11],
        "train-00?.tar": range(10),
        "train-{000..001,1}*.tar": None,
        "*.tar": range(12),
    }.items():
        if rows is None:
            with pytest.raises(DataError, match="does not exist"):
                quietly(folder / pattern)
        else:
            assert names(quietly(str(folder / pattern))) == [f"{i:04}.jpg" for i in rows]
    assert quietly(folder / "*.tar").fingerprint == everything.fingerprint


def test_a_pattern_is_called_as_it_was_given(tmp_path: Path) -> None:
    """The message names a command, which has to find the shards again."""
    folder = write_shards(tmp_path / "data")
    broken_shard(folder / "train-003.tar", 20)
    pattern = str(folder / "train-{000..003}.tar")
    with pytest.raises(DataError) as caught:
        quietly(pattern)
    assert f"{pattern}: 3 of 35 images" in str(caught.value)
    assert f"python -m pipelines.index '{pattern}' names" in str(caught.value)
    assert len(quietly(pattern, max_bad_share=0.2)) == 32


def test_a_pattern_longer_than_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_shards(tmp_path / "data", 50, 1)
    pattern = f"train-{{{','.join(f'{i:03}' for i in range(50))},{'0' * 60}}}.tar"
    (folder / f"train-{'0' * 60}.tar").write_bytes((folder / "train-000.tar").read_bytes())
    assert len(pattern) > 255
    assert len(quietly(folder / pattern)) == 51
    assert "cannot be stored" not in caplog.text
    seen = count_shards_read(monkeypatch)
    assert len(quietly(folder / pattern)) == 51 and seen == []


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data")
    with pytest.raises(DataError, match=r"train-003\.tar does not exist.* pattern .*\{000\.\.004"):
        quietly(folder / "train-{000..004}.tar")
    with pytest.raises(DataError, match=r"none\.tar does not exist"):
        quietly(tmp_path / "none.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(DataError, match="not a regular file"):
        quietly(tmp_path / "pipe.tar")


def test_what_counts_as_a_folder_of_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data")
    assert tarshards.is_tar(folder)
    assert not tarshards.is_tar(tmp_path / "nothing")
    (folder / "picture.jpg").write_bytes(jpeg())
    assert not tarshards.is_tar(folder)
    (folder / "picture.jpg").unlink()
    (folder / "class").mkdir()
    assert not tarshards.is_tar(folder)
    (tmp_path / "empty").mkdir()
    assert not tarshards.is_tar(tmp_path / "empty")


# Broken ones


def broken_shard(path: Path, good: int = 40) -> Path:
    files = {f"{i:02}.jpg": jpeg(i % 7) for i in range(good)}
    files["cut.jpg"] = jpeg(99)[:-300]
    files["page.png"] = b"<html>404</html>"
    write(path, files)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("linked.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "00.jpg"
        tar.addfile(info)
    return path


def test_bad_images_are_quarantined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = broken_shard(tmp_path / "a.tar")
    store = quietly(path, max_bad_share=0.1)
    reasons = dict(store.quarantined)
    assert set(reasons) == {"a.tar/cut.jpg", "a.tar/page.png", "a.tar/linked.jpg"}
    assert "corrupt JPEG" in reasons["a.tar/cut.jpg"] and "a link" in reasons["a.tar/linked.jpg"]
    assert len(store) == 40 and "3 of 43 images cannot be used" in caplog.text
    with pytest.raises(DataError, match=r"3 of 43 images .*more than 5\.0%"):
        quietly(path)


def test_verification(tmp_path: Path) -> None:
    path = broken_shard(tmp_path / "a.tar", 60)
    assert len(quietly(path, verify=False)) == 61  # the header of the one that is cut is sound
    assert len(quietly(path, verify=True)) == 60
    assert len(quietly(path, verify=False)) == 60  # an index that was verified stays so
    os.utime(path, (1, 1))
    assert len(quietly(path, verify=False)) == 60


def test_unsound_shards_are_refused(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "data") / "train-001.tar"
    whole = path.read_bytes()
    for content, message in (
        (whole[:1500], "train-001.tar is truncated"),
        (b"<html>404</html>" * 100, "train-001.tar is no tar file"),
        (b"\x1f\x8b" + whole, r"train-001.tar is compressed with gzip.*gunzip"),
        (b"", "train-001.tar is an empty file"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            quietly(tmp_path / "data")
    gzipped = tmp_path / "zipped" / "a.tar.gz"
    gzipped.parent.mkdir()
    with tarfile.open(gzipped, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    for data in (gzipped, gzipped.parent):
        with pytest.raises(DataError, match="decompress it first"):
            quietly(data)


def test_shards_without_images(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {"1.txt": b"a", "2.txt": b"b"})
    with pytest.raises(DataError, match="holds no images in 1 tar files, only 2 members of other"):
        quietly(path)


def test_a_shard_that_is_cut_or_removed_while_it_is_read(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data")
    store = quietly(folder)
    store.read(0)
    os.truncate(folder / "train-000.tar", 2000)
    with pytest.raises(DataError, match=r"train-000.tar was cut short while it was read: it had"):
        store.read(3)
    (folder / "train-002.tar").unlink()
    with pytest.raises(BadImage, match="No such file"):
        store.read(11)
    assert store.read(5) == jpeg(5)


# The index


def count_shards_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    real = tarbuild.read_shard

    def counted(path: Path) -> tarshards.Samples:
        seen.append(path.name)
        return real(path)

    monkeypatch.setattr(tarbuild, "read_shard", counted)
    return seen


def test_the_index_is_kept_and_made_again_after_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards(tmp_path / "data")
    seen = count_shards_read(monkeypatch)
    first = quietly(folder)
    assert len(seen) == 3 and (tmp_path / "data.index.npz").exists()
    again = quietly(folder)
    assert len(seen) == 3
    for name in ("sizes", "labels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    assert (again.fingerprint, again.classes) == (first.fingerprint, first.classes)
    assert names(again) == names(first) and again.read(7) == first.read(7)
    os.utime(folder / "train-001.tar", (1, 1))
    quietly(folder)
    assert len(seen) == 6
    write(folder / "train-003.tar", {"x.jpg": jpeg()})
    assert len(quietly(folder)) == 13 and len(seen) == 10
    (folder / "train-000.tar").unlink()
    assert len(quietly(folder)) == 9 and len(seen) == 13


def test_a_damaged_or_foreign_index_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_shards(tmp_path / "data")
    quietly(folder)
    path = tmp_path / "data.index.npz"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not an index"):
        path.write_bytes(content)
        caplog.clear()
        assert len(quietly(folder)) == 12
        assert "is not a readable index" in caplog.text
    np.savez(path, meta=np.zeros(3, np.uint8))
    assert len(quietly(folder)) == 12
    assert path.read_bytes() == whole


def test_the_index_goes_to_the_cache_where_the_place_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards(tmp_path / "data")
    (tmp_path / "data.index.npz").mkdir()  # no file can be written there
    assert len(quietly(folder)) == 12
    seen = count_shards_read(monkeypatch)
    assert len(quietly(folder)) == 12 and seen == []
    assert any(name.endswith(".index.npz") for name in os.listdir(tmp_path / "cache"))


def test_the_index_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "data")
    assert index_command.main([str(folder), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "12 images (verified)" in text and "classes: 3 (0, 1, 2)" in text
    assert index_command.main([str(folder / "train-{000..001}.tar"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["read"], report["quarantined"]) == (8, 8, [])
    broken_shard(folder / "train-003.tar", 20)
    assert index_command.main([str(folder), "--verify"]) == 4
    answer = capsys.readouterr()
    assert "train-003.tar/page.png: a web page" in answer.out
    assert "3 of 35 images" in answer.err


# Reading from many places at once


def test_many_threads_and_another_process_read_it(tmp_path: Path) -> None:
    store = pickle.loads(pickle.dumps(quietly(write_shards(tmp_path / "data"))))
    with ThreadPoolExecutor(6) as pool:
        read = list(pool.map(store.read, list(range(12)) * 10))
    assert read == [jpeg(row) for row in range(12)] * 10
    assert decode(read[3]).shape == (23, 30, 3)


def test_only_so_many_files_are_held_open(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}" for i in range(20)]
    for i, path in enumerate(paths):
        path.write_bytes(b"%02d" % i)
    before = len(os.listdir("/proc/self/fd"))
    files = OpenFiles(paths, most=4)
    held = files[0]
    for turn in range(3):
        for i in range(20):
            assert files[i].read(0, 2) == b"%02d" % i
        assert len(os.listdir("/proc/self/fd")) <= before + 5, turn
    assert held.read(0, 2) == b"00"  # closed for others, not for who still has it
    del files, held
    assert len(os.listdir("/proc/self/fd")) == before
    copy = pickle.loads(pickle.dumps(OpenFile(paths[3])))
    assert copy.read(0, 2) == b"03"
