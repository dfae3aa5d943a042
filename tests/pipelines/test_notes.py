"""What is left out of a data set or taken in doubt is counted and named, each time it is opened."""

import json
import logging
import os
import tarfile
from pathlib import Path

import pytest

from pipelines import index as index_command
from pipelines.errors import DataError
from pipelines.indexnotes import split_of
from pipelines.notes import note
from pipelines.stores import open_store
from tests.pipelines.index_folders import fill, jpeg, paths, quietly
from tests.pipelines.test_tar_store import names, write, write_shards


def classes(*names: str, each: int = 2) -> dict[str, bytes | None]:
    return {f"{name}/{i}.jpg": None for name in names for i in range(each)}


def test_a_note_is_one_line() -> None:
    assert note(1, "left out: # file(s)", ["a\nb"]) == "left out: 1 file (a\\nb)"
    assert note(4000, "# file(s)", "abcd", "mend it") == "4,000 files (a, b, c, …): mend it"


# Folders


@pytest.mark.parametrize(
    "name",
    ["@eaDir", "@EADIR", "#recycle", "@Recycle", "__MACOSX", "$RECYCLE.BIN", "lost+found"],
)
def test_folders_of_a_nas_or_a_system_are_left_out(tmp_path: Path, name: str) -> None:
    files = classes("ant", "bee") | {f"ant/{name}/0.jpg/SYNOFILE_THUMB_M.jpg": None}
    index = quietly(fill(tmp_path / "data", files | {f"{name}/x/y.jpg": None}))
    assert paths(index) == list(classes("ant", "bee")) and index.classes == ("ant", "bee")
    assert index.notes == (
        f"left out: 2 folders that a NAS or the system keeps ({name}, ant/{name})",
    )


def test_hidden_folders_and_images_are_left_out(tmp_path: Path) -> None:
    files = classes("ant", "bee") | dict.fromkeys(
        [".thumbnails/1.jpg", "ant/.ipynb_checkpoints/0.jpg", "ant/.@__thumb/0.jpg", "ant/._0.jpg"]
    )
    index = quietly(fill(tmp_path / "data", files | {"ant/.DS_Store": b"x"}))
    assert len(index) == 4 and index.ignored == 5
    assert index.notes == (
        "left out: 3 hidden folders (.thumbnails, ant/.@__thumb, ant/.ipynb_checkpoints)",
        "left out: 1 hidden file that end like images (ant/._0.jpg)",
        "left out: 1 other file, no ending 1 (ant/.DS_Store)",
    )


def test_folders_of_previews_are_taken_in_doubt(tmp_path: Path) -> None:
    index = quietly(fill(tmp_path / "data", classes("ant", "ant/Thumbs", "bee")))
    assert len(index) == 6
    assert (
        "in doubt: 1 folder named like previews, whose images are taken (ant/Thumbs)"
        in (index.notes[0])
    )


def test_folders_named_like_masks_are_taken_in_doubt(tmp_path: Path) -> None:
    files = classes("JPEGImages", "SegmentationClass", "x/masks/deep", "thumbs/ab/cd")
    index = quietly(fill(tmp_path / "data", files | classes("mask_rcnn", "labelled")))
    assert len(index) == 12
    assert "1 folder named like previews, whose images are taken (thumbs)" in index.notes[0]
    assert "2 folders named like masks or labels" in index.notes[1]
    assert "(SegmentationClass, x/masks)" in index.notes[1]


@pytest.mark.parametrize("ending", ["jfif", "jpe", "JPE", "jif", "pgm", "PNM", "TIFF"])
def test_endings_that_are_read(tmp_path: Path, ending: str) -> None:
    index = quietly(fill(tmp_path / "data", {f"a.{ending}": None}))
    assert len(index) == 1 and index.notes == ()


def test_files_of_other_endings_are_counted_by_what_they_are(tmp_path: Path) -> None:
    files = {f"{i}.HEIC": b"x" for i in range(5)} | {"a.jxl": b"x", "b.zip": b"x", "b.txt": b"x"}
    files |= {"c.jpg_large": jpeg(), "d": jpeg(), "e.mat": b"x", "0.jpg": jpeg()}
    index = quietly(fill(tmp_path / "data", files))
    assert len(index) == 1
    assert [each.rpartition(": ")[0] if "rename" in each else each for each in index.notes] == [
        "left out: 6 files of image formats that are not read, .heic 5, .jxl 1 (0.HEIC, a.jxl, …): "
        "convert them to JPEG or PNG",
        "left out: 2 files that hold images under another ending, .jpg_large 1, no ending 1 "
        "(c.jpg_large, d)",
        "left out: 1 archive, .zip 1 (b.zip): give tar shards by their own names or folder, "
        "unpack others",
        "left out: 2 other files, .txt 1, .mat 1 (b.txt, e.mat)",
    ]


def test_a_folder_without_images_says_what_is_there(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {f"{i}.heic": b"x" for i in range(9)})
    with pytest.raises(DataError, match=r"only 9 files of other kinds.*not read, \.heic 9"):
        quietly(root)


# Links


def test_a_link_to_a_folder_that_is_listed_is_not_followed(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", classes("v1", "v2"))
    (root / "latest").symlink_to("v2")
    (root / "absolute").symlink_to(root / "v1")
    index = quietly(root)
    assert paths(index) == list(classes("v1", "v2")) and index.classes == ("v1", "v2")
    assert index.notes == (
        "left out: 2 links to folders that are listed already (absolute → v1, latest → v2)",
    )


def test_links_out_of_the_folder_are_followed_once(tmp_path: Path) -> None:
    fill(tmp_path / "store", classes("ant", "bee"))
    root = fill(tmp_path / "data", {".hidden/cow/0.jpg": None})
    for name, target in {
        "ant": "../store/ant",
        "bee": "../store/bee",
        "bee2": "../store/bee",
        "cow": ".hidden/cow",  # not listed by itself
        "up": "..",  # holds the root, and the store, of which ant is listed already
    }.items():
        (root / name).symlink_to(target)
    index = quietly(root)
    assert paths(index) == ["ant/0.jpg", "ant/1.jpg", "bee/0.jpg", "bee/1.jpg", "cow/0.jpg"]
    doubled = index.notes[1]
    assert doubled.startswith("left out: 4 links to folders that are listed already")
    assert f"bee2 → {tmp_path}/store/bee" in doubled and "up/data → ." in doubled


def test_links_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", classes("ant", "bee"))
    (root / "cow").symlink_to(tmp_path / "not-mounted")
    assert quietly(root).notes == ("left out: 1 link that lead nowhere (cow)",)


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", classes("ant", "bee"))
    (tmp_path / "here").symlink_to(root)
    (root / "cow").symlink_to("ant")
    assert paths(quietly(tmp_path / "here")) == list(classes("ant", "bee"))


def test_links_to_images_are_taken_once(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"a/1.jpg": None, "b/2.jpg": None, ".store/3.jpg": None})
    (root / "a" / "0.jpg").symlink_to("../b/2.jpg")
    (root / "a" / "3.jpg").symlink_to("../.store/3.jpg")
    (root / "b" / "3.jpg").symlink_to("../.store/3.jpg")
    index = quietly(root)
    assert paths(index) == ["a/1.jpg", "a/3.jpg", "b/2.jpg"] and index.labels.tolist() == [0, 0, 1]
    assert index.sizes[:, 0].tolist() == [20, 22, 21]
    assert index.notes[1].startswith(
        "left out: 2 links to images that are listed already (a/0.jpg, b/3.jpg)"
    )


def test_hard_links_are_taken_and_counted(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", classes("a", "b"))
    os.link(root / "a" / "0.jpg", root / "b" / "2.jpg")
    os.link(root / "a" / "1.jpg", tmp_path / "elsewhere.jpg")
    index = quietly(root)
    assert len(index) == 5
    assert index.notes == (
        "in doubt: 1 hard link to other images here, each taken as an image (b/2.jpg)",
    )


# Splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[
            ("train", "train"),
            ("Train", "train"),
            ("train2017", "train"),
            ("training_set", "train"),
        ],
        *[("val", "val"), ("valid", "val"), ("validation", "val"), ("VAL_images", "val")],
        *[("test", "test"), ("testing-data", "test"), ("testA", "test"), ("ILSVRC2012_val", "val")],
        *[("trainers", None), ("bullet train", None), ("testament", None), ("valley", None)],
        *[("images", None), ("ant", None), ("2017", None), ("latest", None), ("devil", None)],
    ],
)
def test_names_of_splits(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_train_and_val_beside_each_other_are_told(tmp_path: Path) -> None:
    files = classes("train/a", "train/b", each=3) | classes("val/a", "val/b", each=1)
    index = quietly(fill(tmp_path / "data", files))
    assert index.classes == ("train", "val")
    assert "splits of a data set" in index.notes[0] and "train 6, val 2" in index.notes[0]
    assert index.notes[0].endswith(f"{tmp_path / 'data' / 'train'}")


@pytest.mark.parametrize("parent", ["images", "a/b"])
def test_splits_further_below(tmp_path: Path, parent: str) -> None:
    files = classes(f"{parent}/valid/x", f"{parent}/test/x")
    index = quietly(fill(tmp_path / "data", files))
    assert len(index.notes) == 1 and f"the folders in {parent} are splits" in index.notes[0]


def test_classes_that_hold_splits_each(tmp_path: Path) -> None:
    index = quietly(fill(tmp_path / "data", classes("a/train", "a/val", "b/train", "b/val")))
    assert "in a and 1 more folders are splits" in index.notes[0]
    assert "train 4, val 4" in index.notes[0] and "as classes" not in index.notes[0]


def test_a_class_called_train_alone_is_no_split(tmp_path: Path) -> None:
    assert quietly(fill(tmp_path / "data", classes("bus", "train"))).notes == ()


def test_one_folder_around_all_classes_is_told(tmp_path: Path) -> None:
    index = quietly(fill(tmp_path / "data", classes("train/a", "train/b")))
    assert index.classes == ()
    assert "all images lie in one folder, train: name that folder for the 2" in index.notes[0]


# Shards beside other things


def test_shards_beside_images_are_asked_about(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data")
    (folder / "preview.png").write_bytes(jpeg())
    with pytest.raises(DataError, match=r"3 tar files .* 1 image beside them.*'?/.*\*\.tar"):
        open_store(folder, progress=False)
    assert len(open_store(f"{folder}/*.tar", progress=False)) == 12
    (folder / "preview.png").rename(folder / "x.txt")
    (folder / "meta").mkdir()
    assert len(open_store(folder, progress=False)) == 12
    (folder / "meta" / "logo.png").write_bytes(jpeg())
    with pytest.raises(DataError, match="only one kind can be read"):
        open_store(folder, progress=False)


def test_an_archive_beside_the_images_is_noted(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", classes("ant", "bee", each=9))
    write(root / "ant.tar", {f"{i}.jpg": jpeg() for i in range(9)})
    store = open_store(root, progress=False)
    assert len(store) == 18 and "left out: 1 archive, .tar 1 (ant.tar)" in "".join(store.notes)
    write(root / "devkit.tar", {"x.mat": b"x"})  # two, but not numbered ones
    assert len(open_store(root, progress=False)) == 18
    (root / "devkit.tar").unlink()
    for part in range(2):
        write(root / f"part{part}.tar", {f"{i}.jpg": jpeg(300) for i in range(9)})
    with pytest.raises(DataError, match="3 tar files"):
        open_store(root, progress=False)


def test_shards_in_sub_folders_and_other_files_beside_them(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_shards(root / "b", 2)
    write_shards(root / "a" / "c", 1, 2)
    (root / "a" / "sizes.json").write_text("{}")
    (root / "again").symlink_to("b")
    (root / "@eaDir").mkdir()
    store = open_store(root, progress=False)
    assert len(store) == 10 and [store.name(i)[len(str(root)) + 1 :] for i in (0, 2, 6)] == [
        "a/c/train-000.tar/0000.jpg",
        "b/train-000.tar/0000.jpg",
        "b/train-001.tar/0004.jpg",
    ]
    assert store.notes == (
        "left out: 1 folder that a NAS or the system keeps (@eaDir)",
        "left out: 1 link to folders that are listed already (again → b)",
        "left out: 1 other file, .json 1 (a/sizes.json)",
    )


def test_shards_of_several_splits_in_one_folder(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", 2)
    write(folder / "cc3m-val-000.tar", {"x.jpg": jpeg()})
    note = "".join(open_store(folder, progress=False).notes)
    assert "the shards are splits" in note and "(train 2, val 1 shards)" in note
    assert note.endswith(f"such as '{folder}/train-*.tar'")
    assert open_store(f"{folder}/{{train-000,cc3m-val-000}}.tar", progress=False).notes == ()


def test_shards_that_are_links_to_others_or_hold_the_same(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", 2)
    (folder / "latest.tar").symlink_to("train-001.tar")
    (folder / "copy.tar").write_bytes((folder / "train-000.tar").read_bytes())
    write(folder / "none.tar", {"a.txt": b"x"})
    write(tmp_path / "elsewhere.tar", {"e.jpg": jpeg()})
    (folder / "e.tar").symlink_to(tmp_path / "elsewhere.tar")
    for data in (folder, folder / "*.tar"):
        store = open_store(data, progress=False)
        assert len(store) == 4 + 4 + 4 + 1
        notes = "\n".join(store.notes)
        assert "left out: 1 link to shards that are listed already (latest.tar)" in notes
        assert "left out: 1 shard without images (none.tar)" in notes
        assert "in doubt: 1 shard with the names and sizes of another's images" in notes


def test_folders_inside_a_shard(tmp_path: Path) -> None:
    files = dict.fromkeys(["./train/a/1.jpg", "./train/b/1.jpg", "./val/a/1.jpg"], jpeg())
    store = open_store(write(tmp_path / "a.tar", files), progress=False)
    assert "(images: train 2, val 1), so" in store.notes[0]
    assert store.notes[0].endswith("pack one of them by itself")
    assert store.notes[1].startswith("unlabelled: 3 folders inside the shards, which are no class")


# What is in shards


def test_concatenated_shards_are_read_on(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"{i}", {f"{i}.jpg": jpeg(), f"{i}.cls": b"1"}) for i in range(3)]
    whole = tmp_path / "all.tar"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts) + bytes(3 << 20))
    store = open_store(whole, progress=False)
    assert names(store) == ["0.jpg", "1.jpg", "2.jpg"] and store.labels.tolist() == [1, 1, 1]
    assert all(store.read(row) == jpeg() for row in range(3))
    assert "2 further tars behind an end mark" in store.notes[0]
    whole.write_bytes(parts[0].read_bytes() + b"signature")
    assert (
        "left out: what lies behind the end mark of 1 shard"
        in (open_store(whole, progress=False).notes[0])
    )


def test_a_further_tar_that_is_cut_is_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "1", {"1.jpg": jpeg()}).read_bytes()
    (tmp_path / "a.tar").write_bytes(one + one[:700])
    with pytest.raises(DataError, match="is truncated"):
        open_store(tmp_path / "a.tar", progress=False)


def test_a_member_written_again_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {"1.jpg": jpeg(), "2.jpg": jpeg()})
    with tarfile.open(path, "a") as tar:
        tar.add(tmp_path / "a.tar", "other.bin")
    (tmp_path / "new.jpg").write_bytes(jpeg(40))
    with tarfile.open(path, "a") as tar:
        tar.add(tmp_path / "new.jpg", "1.jpg")
    store = open_store(path, progress=False)
    assert names(store) == ["1.jpg", "2.jpg", "1.jpg"]
    assert "1 image with the name of another in the same shard (a.tar/1.jpg)" in store.notes[0]


def test_frames_numbered_behind_a_dot_are_samples(tmp_path: Path) -> None:
    files = {"frame.cls": b"5"} | {f"frame.{i:04}.jpg": jpeg(20 + i) for i in range(4)}
    files |= {"frame.0002.cls": b"7", "b.1.2.jpg": jpeg(), "b.1.3.jpg": jpeg()}
    store = open_store(write(tmp_path / "a.tar", files), progress=False)
    assert len(store) == 6 and store.labels.tolist() == [5, 5, 7, 5, -1, -1]
    assert store.notes[0].startswith("in doubt: 6 images that agree up to the first dot")


def test_images_that_share_a_sample_are_counted(tmp_path: Path) -> None:
    files = {f"{i}.{side}.jpg": jpeg() for i in range(4) for side in ("left", "right", "up")}
    store = open_store(write(tmp_path / "a.tar", files), progress=False)
    assert names(store) == [f"{i}.left.jpg" for i in range(4)]
    assert store.notes[0].startswith("left out: 8 images of samples that have several (a.tar/0.ri")


@pytest.mark.parametrize(
    ("label", "number"),
    [("1", 1), (" 1 ", 1), (1.0, 1), ("2.0", 2), (None, -1), (-1, -1), ("-1", -1)],
)
def test_labels_that_are_numbers_in_other_words(tmp_path: Path, label: object, number: int) -> None:
    files = {"0.jpg": jpeg(), "0.json": json.dumps({"label": label}).encode()}
    store = open_store(write(tmp_path / "a.tar", files), progress=False)
    assert store.labels.tolist() == [number] and store.notes == ()


@pytest.mark.parametrize("label", ["cat", 1.5, True, [1], {"id": 1}, "", "1e3", float("nan"), -2])
def test_labels_that_are_no_numbers_are_counted(tmp_path: Path, label: object) -> None:
    files = {"0.jpg": jpeg(), "0.json": json.dumps({"label": label}).encode()}
    store = open_store(write(tmp_path / "a.tar", files), progress=False)
    assert store.labels.tolist() == [-1]
    assert "1 label are no class numbers" in store.notes[0] and "a.tar/0.jpg" in store.notes[0]


def test_a_tar_of_tars_says_how_to_unpack_it(tmp_path: Path) -> None:
    inner = write(tmp_path / "n01.tar", {"n01_1.JPEG": jpeg()}).read_bytes()
    outer = write(tmp_path / "d" / "all.tar", {"n01.tar": inner, "n02.tar": inner})
    for data in (outer, outer.parent):
        with pytest.raises(DataError, match=rf"2 tar files .*n01\.tar.*tar -xf {outer} -C DIR"):
            open_store(data, progress=False)
    write(outer, {"n01.tar": inner, "x.jpg": jpeg()})
    assert "1 tar file inside the shards" in open_store(outer, progress=False).notes[0]


def test_service_folders_in_shards_are_left_out(tmp_path: Path) -> None:
    names_ = ["./a/1.jpg", "__MACOSX/a/._1.jpg", "a/@eaDir/1.jpg/S.jpg", ".cache/2.jpg"]
    store = open_store(write(tmp_path / "a.tar", dict.fromkeys(names_, jpeg())), progress=False)
    assert names(store) == ["./a/1.jpg"]
    assert "left out: 3 members in hidden folders" in store.notes[0]


# Every command, each time


def test_an_index_that_is_used_again_repeats_its_notes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    root = fill(tmp_path / "data", classes("ant", "bee") | {"ant/@eaDir/0.jpg": None})
    shards = write_shards(tmp_path / "shards")
    write(shards / "x.tar", {"0.a.jpg": jpeg(), "0.b.jpg": jpeg()})
    for data, words in ((root, "that a NAS"), (shards, "samples that have several")):
        for _ in range(2):
            caplog.clear()
            with caplog.at_level(logging.INFO):
                open_store(data, progress=False)
            assert caplog.text.count(words) == 1
            assert index_command.main([str(data)]) == 0
            assert capsys.readouterr().out.count(words) == 1
        assert "index written" not in caplog.text
        open_store(data, progress=False, quiet=True)
