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
        with pytest.raises(DataError, match=r"train2018\.json is not a list of images"):
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
    store = open_list(inaturalist(root, annotations=wrong), root, max_bad_share=0.9)
    assert len(store) == 1 and store.name(0).endswith("with blank.png")
    reasons = dict(store.quarantined)
    assert "several categories" in reasons["b/2.png"] and "no annotation" in reasons["c/3.png"]
    assert "category 5" in reasons["image 11"] and "not among" in reasons["image 99"]
    for text in ("{}", "[1]", "{"):
        (root.parent / "other.json").write_text(text)
        with pytest.raises(DataError, match=r"other\.json is not a list"):
            open_list(root.parent / "other.json", root)


def test_broken_lines_and_missing_files_are_named(root):
    path = places(root)
    path.write_text("# comment\nb/2.png 1\njust-a-name\nc/3.png one\na/1.png -1\ngone.png 0\n")
    store = open_list(path, root, max_bad_share=0.9)
    assert len(store) == 1 and store.labels.tolist() == [1]
    reasons = dict(store.quarantined)
    assert set(reasons) == {"line 3", "line 4", "line 5", "gone.png"}
    assert "just-a-name" in reasons["line 3"] and "No such file" in reasons["gone.png"]
    with pytest.raises(DataError, match=r"4 of 5 listed images.*line 3.*--root"):
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
