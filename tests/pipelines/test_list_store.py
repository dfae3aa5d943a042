"""Lists of images: ImageNet's and Places205's lines, iNaturalist's JSON."""

import json
import os
import threading

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import BadImage, DataError
from pipelines.indexfile import locations
from pipelines.stores import Store, listed, open_store
from pipelines.stores.listfile import read_list

NAMES = ["b/2.png", "a/1.png", "a/with blank.png", "c/3.png"]


@pytest.fixture
def root(tmp_path):
    for i, name in enumerate(NAMES):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8 + i, 10, 3), 20 * i, np.uint8)).save(path)
    return tmp_path / "images"


def places(root, name="train_places205.csv", labels=(1, 0, 0, 2), apart=" "):
    path = root.parent / name
    lines = [f"{n}{apart}{label}" for n, label in zip(NAMES, labels, strict=True)]
    path.write_text("\n".join(lines) + "\n\n")
    return path


def inaturalist(root, name="train2018.json", **changes):
    content = {
        "images": [
            {"id": 10 + i, "file_name": n, "width": 1, "height": 1} for i, n in enumerate(NAMES)
        ],
        "categories": [
            {"id": 7, "name": "Puma"},
            {"id": 2, "name": "Ara"},
            {"id": 9, "name": "Ara"},
        ],
        "annotations": [
            {"id": i, "image_id": 10 + i, "category_id": c} for i, c in enumerate((7, 2, 2, 9))
        ],
    }
    path = root.parent / name
    path.write_text(json.dumps({**content, **changes}))
    return path


def open_list(path, root, **how):
    return open_store(path, root=root, progress=False, workers=1, **how)


@pytest.mark.parametrize(
    ("name", "apart"), [("train_places205.csv", " "), ("meta.txt", "\t"), ("x.csv", ",")]
)
def test_lines_in_the_order_of_the_list(root, name, apart):
    store = open_list(places(root, name, apart=apart), root)
    assert isinstance(store, Store) and len(store) == 4 and store.encoded
    assert store.labels.tolist() == [1, 0, 0, 2] and store.classes == ("0", "1", "2")
    assert store.sizes.tolist() == [[8, 10], [9, 10], [10, 10], [11, 10]]
    assert [store.name(i) for i in range(4)] == [str(root / n) for n in NAMES]
    assert store.read(3) == (root / NAMES[3]).read_bytes() and store.quarantined == ()


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("a.png, 3", "a.png"),
        (" a.png ,3 ", "a.png"),
        ("a b.png , 3", "a b.png"),
        ("a, b.png 3", "a, b.png"),
        ("a, b.png,3", "a, b.png"),
        ('"a, b.png",3', "a, b.png"),
        ('"a ""b"".png","3"', 'a "b".png'),
        ("./a.png,3", "./a.png"),
        ("\ufeffa.png,3\r", "a.png"),
    ],
)
def test_a_line_of_a_csv(tmp_path, line, name):
    (tmp_path / "x.csv").write_text(line)
    listed = read_list(tmp_path / "x.csv")
    assert (listed.paths, listed.labels, listed.bad) == ([os.fsencode(name)], [3], [])


@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.json"])
def test_a_list_of_nothing_is_refused(tmp_path, name):
    for text in ("\n# nothing\n", "") if name != "x.json" else ('{"images": []}', ""):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=rf"{name} .*needs a line `path label`"):
            open_store(tmp_path / name)


def test_json_of_any_other_content_is_refused(root):
    for changes in (
        {"images": [{"id": [1], "file_name": "a.png"}]},
        {"images": [{"id": 1, "file_name": "\ud800.png"}]},
        {"categories": [{"id": float("inf")}]},
        {"annotations": [{"image_id": {}, "category_id": 7}]},
    ):
        with pytest.raises(DataError, match=r"train2018\.json (is not a list of|lists no) images"):
            open_list(inaturalist(root, **changes), root)


def test_the_list_s_own_folder_is_the_default(root):
    path = places(root)
    moved = root / path.name
    path.rename(moved)
    assert len(open_store(moved, progress=False)) == 4
    with pytest.raises(DataError, match="--root"):
        open_list(moved, root / "nowhere")


def test_inaturalist_numbers_classes_by_category(root):
    store = open_list(inaturalist(root), root)
    assert store.labels.tolist() == [1, 0, 0, 2]
    assert store.classes == ("2 Ara", "Puma", "9 Ara")  # a name that two have gets its id
    unlabelled = open_list(inaturalist(root, "test2018.json", annotations=[]), root)
    assert unlabelled.labels.tolist() == [-1] * 4 and unlabelled.classes == ()


def test_what_json_says_wrongly_is_named(root):
    wrong = [
        {"id": 0, "image_id": 10, "category_id": 7},
        {"id": 1, "image_id": 10, "category_id": 2},
        {"id": 2, "image_id": 11, "category_id": 5},
        {"id": 3, "image_id": 12, "category_id": 9},
        {"id": 4, "image_id": 99, "category_id": 9},
    ]
    store = open_list(inaturalist(root, annotations=wrong), root)
    assert len(store) == 4 and store.labels.tolist() == [-1, -1, 2, -1]
    assert store.quarantined == () and store.notes == (
        "unlabelled: 3 of the listed images (b/2.png, a/1.png, c/3.png)",
        "1 image with several categories, which count as none (b/2.png)",
        "left out: 1 annotation of a category that is not listed (image 11: 5)",
        "left out: 1 annotation of images that are not listed (image 99)",
    )
    for text in ("{}", "[1]", "{"):
        (root.parent / "other.json").write_text(text)
        with pytest.raises(DataError, match=r"other\.json is not a list"):
            open_list(root.parent / "other.json", root)


def test_broken_lines_and_missing_files_are_named(root):
    path = places(root)
    path.write_text("# comment\nb/2.png 1\njust-a-name\nc/3.png one\na/1.png -1\ngone.png 0\n")
    store = open_list(path, root, max_bad_share=0.9)
    assert len(store) == 2 and store.labels.tolist() == [1, -1]
    reasons = dict(store.quarantined)
    assert set(reasons) == {"line 3", "line 4", "gone.png"}
    assert "just-a-name" in reasons["line 3"] and "No such file" in reasons["gone.png"]
    with pytest.raises(DataError, match=r"3 of 5 listed images.*line 3.*--root"):
        open_list(path, root)
    path.write_text("nothing here\n")
    with pytest.raises(DataError, match=r"lists no images.*line 1"):
        open_list(path, root)


def test_headers_are_read_once(root, monkeypatch):
    path = places(root)
    first = open_list(path, root)
    assert locations(path)[0].is_file()
    monkeypatch.setattr(listed, "measure", lambda *a, **k: pytest.fail("read again"))
    again = open_list(path, root)
    assert again.fingerprint == first.fingerprint and np.array_equal(again.sizes, first.sizes)
    (root / NAMES[0]).unlink()
    with pytest.raises(BadImage, match="No such file"):
        again.read(0)
    os.utime(path, ns=(1, 1))  # another list: its images are looked at again
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"2\.png"):
        open_list(path, root)


def test_what_was_bad_is_looked_at_again(root, monkeypatch):
    """The list stays as it is while the missing files are copied to their places."""
    path, late = places(root), root / NAMES[2]
    content = late.read_bytes()
    late.unlink()
    with pytest.raises(DataError, match=r"1 of 4 listed images.*No such file"):
        open_list(path, root, verify=True)
    late.write_bytes(content)
    seen = []
    real = listed.measure
    monkeypatch.setattr(listed, "measure", lambda r, p, **k: seen.extend(p) or real(r, p, **k))
    store = open_list(path, root, verify=False)
    assert len(store) == 4 and store.quarantined == () and store.read(2) == content
    assert store.sizes.tolist() == [[8, 10], [9, 10], [10, 10], [11, 10]]
    assert seen == [os.fsencode(NAMES[2])]
    assert open_list(path, root, verify=True).fingerprint == store.fingerprint
    assert len(seen) == 1  # kept, and still verified


def test_a_pipe_in_the_place_of_a_listed_image_is_not_opened(root):
    store = open_list(places(root), root)
    (root / NAMES[1]).unlink()
    os.mkfifo(root / NAMES[1])
    errors = []
    read = threading.Thread(target=lambda: errors.append(error_of(store.read, 1)), daemon=True)
    read.start()
    read.join(60)
    assert not read.is_alive() and "not a regular file" in errors[0]


def error_of(function, *arguments):
    with pytest.raises(BadImage) as caught:
        function(*arguments)
    return str(caught.value)


def test_labels_are_part_of_the_fingerprint(root):
    one = open_list(places(root), root)
    other = open_list(places(root, labels=(0, 1, 0, 2)), root)
    assert one.fingerprint != other.fingerprint


# Lists as they come


def write_list(root, text, name="list.txt"):
    path = root.parent / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("a/1.png", ("a/1.png", -1)),
        ("a/with blank.PNG", ("a/with blank.PNG", -1)),
        ("a/1.png -1", ("a/1.png", -1)),
        ("a/1.png 2.0", ("a/1.png", 2)),
        ("no-ending 3", ("no-ending", 3)),
    ],
)
@pytest.mark.parametrize("name", ["x.txt", "x.csv"])
def test_lines_with_labels_of_all_kinds_and_without(tmp_path, line, found, name):
    (tmp_path / name).write_text(line)
    listed = read_list(tmp_path / name)
    assert (listed.paths, listed.labels, listed.bad) == ([found[0].encode()], [found[1]], [])


@pytest.mark.parametrize("line", ["a, b.png", '"a, b.png"', "a.png,", "a.png,-1", "a.png , 3.0"])
def test_lines_of_a_csv_without_a_number(tmp_path, line):
    (tmp_path / "x.csv").write_text(line)
    listed = read_list(tmp_path / "x.csv")
    assert listed.paths == [b"a, b.png" if "b.png" in line else b"a.png"] and not listed.bad
    assert listed.labels == [3 if "3" in line else -1]


def test_a_list_without_labels(root):
    store = open_list(write_list(root, "\n".join(NAMES)), root)
    assert len(store) == 4 and store.labels.tolist() == [-1] * 4
    assert store.classes == () and store.notes == () and store.quarantined == ()


def test_labels_that_are_names(root):
    text = "filename,label\n" + "\n".join(
        f"{name},{kind}" for name, kind in zip(NAMES, ("dog", "cat", "cat", ""), strict=True)
    )
    store = open_list(write_list(root, text, "x.csv"), root)
    assert store.classes == ("cat", "dog") and store.labels.tolist() == [1, 0, 0, -1]
    assert store.notes == (
        "left out: the first line, as its header (filename,label)",
        "unlabelled: 1 of the listed images (c/3.png)",
    )


def test_labels_of_several_words(root):
    text = "\n".join(f'{name},"golden retriever"' for name in NAMES)
    store = open_list(write_list(root, text, "x.csv"), root)
    assert store.classes == ("golden retriever",) and store.quarantined == ()


def test_names_that_no_file_can_have_are_bad(root):
    text = "\n".join(f"{NAMES[i % 4]} 0" for i in range(40)) + "\nimg/\0.jpg 1"
    store = open_list(write_list(root, text), root)
    assert len(store) == 40
    ((where, reason),) = store.quarantined
    assert where == "line 41" and reason == "has a NUL in its name: img/\\x00.jpg"
    assert "in doubt: 36 images listed before, each taken again" in store.notes[0]
    images = [{"id": i, "file_name": NAMES[i % 4]} for i in range(40)]
    images += [{"id": 40, "file_name": "img/\0.jpg"}, {"id": 41, "file_name": "\ud800.png"}]
    path = inaturalist(root, images=images, annotations=[])
    store = open_list(path, root)
    assert len(store) == 40 and [name for name, _ in store.quarantined] == ["image 40", "image 41"]


def test_utf_16_and_lines_that_begin_with_a_hash(root):
    text = "\n".join([*(f"{name} 1" for name in NAMES), "# a comment", "#recycle/1.png 3"])
    store = open_list(write_list(root, text.encode("utf-16")), root)
    assert len(store) == 4
    assert store.notes == ("left out: 1 line that begin with # (#recycle/1.png 3)",)


def test_advice_that_brings_paths_and_files_together(root):
    def refused(path, below=None):
        with pytest.raises(DataError) as caught:
            open_list(path, below)
        return str(caught.value)

    other = "\n".join(f"x/y/{name} 0" for name in NAMES)
    assert "found without the 'x/y/' in front: remove it" in refused(write_list(root, other), root)
    (root / "lists").mkdir()
    deeper = root / "lists" / "list.txt"
    deeper.write_text("\n".join(NAMES))
    assert f"they are found below {root}: move {deeper} there" in refused(deeper)
    assert f"below {root}, absolute ones as they are" in refused(write_list(root, "z.png"), root)


def test_paths_that_begin_with_a_slash(root):
    path = write_list(root, "\n".join(f"/{name} 0" for name in NAMES))
    store = open_list(path, root)
    assert len(store) == 4 and store.read(0) == (root / NAMES[0]).read_bytes()
    assert store.notes[0].startswith("in doubt: 4 paths that begin with / are looked up below")
    path = write_list(root, "\n".join(f"{root / name} 0" for name in NAMES), "other.txt")
    assert open_list(path, root.parent / "images" / "a").notes == ()


def test_images_listed_in_folders_of_a_nas_are_taken_in_doubt(root):
    (root / "@eaDir").mkdir()
    (root / NAMES[0]).rename(root / "@eaDir" / "1.png")
    store = open_list(write_list(root, "@eaDir/1.png\n" + "\n".join(NAMES[1:])), root)
    assert len(store) == 4 and "taken as listed (@eaDir/1.png)" in store.notes[0]
