"""Stores: one protocol over folders, arrays and synthetic images, and what `open_store` refuses."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.decode import decode
from pipelines.errors import BadImage, DataError
from pipelines.stores import Store, open_store
from pipelines.stores import arrays as arrays_module
from pipelines.stores.arrays import ArrayStore
from pipelines.stores.folder import FolderStore
from pipelines.stores.synthetic import SyntheticStore


def pictures(n: int = 6, height: int = 9, width: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def write_folder(root: Path, images: np.ndarray, classes: str = "ab") -> Path:
    for i, image in enumerate(images):
        path = root / classes[i % len(classes)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


def check_protocol(store: Store, n: int) -> None:
    """What every store promises."""
    assert isinstance(store, Store)
    assert len(store) == n
    assert store.sizes.shape == (n, 2)
    assert store.labels.shape == (n,)
    assert store.sizes.dtype == store.labels.dtype == np.int32
    assert (store.labels < max(1, len(store.classes))).all()
    assert (store.labels >= -1).all()
    assert isinstance(store.classes, tuple)
    assert isinstance(store.quarantined, tuple)
    assert int(store.fingerprint, 16) >= 0
    assert len(store.fingerprint) == 64
    assert len({store.name(row) for row in range(n)}) == n
    for row in range(n):
        data = store.read(row)
        assert isinstance(data, bytes if store.encoded else np.ndarray)
        pixels = decode(data) if isinstance(data, bytes) else data
        assert pixels.dtype == np.uint8
        assert pixels.shape == (*store.sizes[row], 3)


def test_folder(tmp_path: Path) -> None:
    images = pictures()
    store = open_store(write_folder(tmp_path / "data", images), progress=False)
    assert isinstance(store, FolderStore)
    check_protocol(store, 6)
    assert store.classes == ("a", "b")
    assert store.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert store.name(4) == str(tmp_path / "data" / "b" / "3.png")
    np.testing.assert_array_equal(decode(store.read(4)), images[3])
    assert open_store(str(tmp_path / "data"), progress=False).fingerprint == store.fingerprint


def test_folder_warns_of_what_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_folder(tmp_path / "data", pictures(40))
    (root / "a" / "x.png").write_bytes(b"")
    (root / "void").mkdir()
    store = open_store(root, progress=False)
    assert store.quarantined == ((str(root / "a" / "x.png"), "an empty file"),)
    assert len(store) == 40
    assert "1 of 41 images cannot be used" in caplog.text
    assert "void holds no images" in caplog.text


def test_folder_with_a_file_deleted_or_replaced_while_running(tmp_path: Path) -> None:
    store = open_store(write_folder(tmp_path / "data", pictures()), progress=False)
    Path(store.name(2)).unlink()
    with pytest.raises(BadImage, match="No such file"):
        store.read(2)
    Path(store.name(3)).unlink()
    Path(store.name(3)).mkdir()
    with pytest.raises(BadImage, match="cannot be read"):
        store.read(3)
    assert store.read(4)


def test_folder_is_read_from_many_threads(tmp_path: Path) -> None:
    images = pictures(24)
    store = open_store(write_folder(tmp_path / "data", images, "a"), progress=False)
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda row: decode(store.read(row)), list(range(24)) * 4))
    numbers = [int(Path(store.name(row)).stem) for row in range(24)]
    for row, pixels in enumerate(got):
        np.testing.assert_array_equal(pixels, images[numbers[row % 24]])


def test_folder_share_of_broken_images(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", pictures(8))
    for name in ("x.png", "y.png"):
        (root / "a" / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 10 images .* more than 5\.0%") as caught:
        open_store(root, progress=False)
    assert str(root) in str(caught.value)
    assert len(open_store(root, progress=False, max_bad_share=0.2)) == 8


@pytest.mark.parametrize("kind", ["memory", "pair", "npz", "npz labelled", "npy", "npz compressed"])
def test_arrays(tmp_path: Path, kind: str) -> None:
    images, labels, path = pictures(), np.array([0, 2, 1, 1, -1, 0]), tmp_path / "data.npz"
    match kind:
        case "memory":
            store = open_store(images)
        case "pair":
            store = open_store((images, labels))
        case "npz":
            np.savez(path, images=images)
            store = open_store(path)
        case "npz labelled":
            np.savez(path, images=images, labels=labels, classes=["ant", "bee", "cow"])
            store = open_store(str(path))
        case "npz compressed":
            np.savez_compressed(path, images=images, labels=labels)
            store = open_store(path)
        case _:
            path = tmp_path / "data.npy"
            np.save(path, images)
            store = open_store(path)
    assert isinstance(store, ArrayStore)
    check_protocol(store, 6)
    where = "images" if kind in ("memory", "pair") else str(path)
    assert store.name(5) == f"{where}[5]"
    labelled = kind in ("pair", "npz labelled", "npz compressed")
    assert store.labels.tolist() == (labels.tolist() if labelled else [-1] * 6)
    names = ("ant", "bee", "cow") if kind == "npz labelled" else ("0", "1", "2")
    assert store.classes == (names if labelled else ())
    for row in range(6):
        np.testing.assert_array_equal(store.read(row), images[row])


@pytest.mark.parametrize("shape", [(4, 9, 7), (4, 9, 7, 1)])
def test_grey_arrays(shape: tuple[int, ...]) -> None:
    grey = np.arange(4 * 9 * 7, dtype=np.uint8).reshape(shape)
    store = open_store(grey)
    check_protocol(store, 4)
    for channel in range(3):
        np.testing.assert_array_equal(store.read(3)[:, :, channel], grey[3].reshape(9, 7))


def test_array_fingerprint_is_of_the_content(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = pictures(), np.arange(6)
    first = open_store(images).fingerprint
    assert open_store(images.copy()).fingerprint == first
    assert open_store(np.asfortranarray(images)).fingerprint == first
    changed = images.copy()
    changed[5, 8, 6, 2] ^= 1
    others = [changed, (images, labels), (images, labels[::-1]), images[:, :, ::-1], images[:5]]
    assert len({first, *(open_store(other).fingerprint for other in others)}) == 6
    monkeypatch.setattr(arrays_module, "_HASH_WHOLE", images.nbytes // 3)
    spaced = open_store(images).fingerprint
    changed = images.copy()
    changed[3] ^= 1
    assert open_store(changed).fingerprint != spaced  # rows 0 and 3 are hashed
    assert open_store(images[:5]).fingerprint != spaced


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "must be uint8"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"transpose\(0, 2, 3, 1\)"),
        (np.zeros((2, 4, 4, 4), np.uint8), "must be"),
        (np.zeros((4, 4), np.uint8), "must be"),
        (np.zeros((0, 4, 4, 3), np.uint8), "holds no pixels"),
        ((np.zeros((2, 4, 4, 3), np.uint8), [1]), "labels must be 2 whole numbers"),
        ((np.zeros((2, 4, 4, 3), np.uint8), [0.0, 1.0]), "labels must be 2 whole numbers"),
        ((np.zeros((2, 4, 4, 3), np.uint8), [-2, 1]), "count classes from 0"),
        ((np.zeros((2, 4, 4, 3), np.uint8), [0, 2**31]), "count classes from 0"),
    ],
)
def test_arrays_that_are_refused(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_store(data)  # type: ignore[arg-type]


def test_array_files_that_are_refused(tmp_path: Path) -> None:
    images, path = pictures(), tmp_path / "data.npz"
    np.savez(path, pixels=images)
    with pytest.raises(DataError, match=r"no array `images`, only \['pixels'\]"):
        open_store(path)
    np.savez(path, images=images, labels=[0, 1, 2, 3, 4, 5], classes=["a", "b"])
    with pytest.raises(DataError, match="label 5 has no name"):
        open_store(path)
    np.savez(path, images=np.array([{}] * 2, dtype=object))
    with pytest.raises(DataError, match="cannot be read as arrays"):
        open_store(path)
    np.savez(path, images=images)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="cannot be read as arrays") as caught:
        open_store(path)
    assert str(path) in str(caught.value)


def test_any_damage_of_an_array_file_is_refused_or_harmless(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=pictures(3), labels=[0, 1, 0])
    np.save(tmp_path / "a.npy", pictures(3))
    refused = 0
    for name in ("a.npz", "a.npy"):
        whole = (tmp_path / name).read_bytes()
        for position in range(0, min(len(whole), 800)):
            damaged = bytearray(whole)
            damaged[position] ^= 0x15
            (tmp_path / name).write_bytes(damaged)
            try:
                open_store(tmp_path / name)
            except DataError as error:
                assert str(tmp_path / name) in str(error)
                refused += 1
    assert refused > 100


def test_names_of_classes_in_an_array_file(tmp_path: Path) -> None:
    path, images = tmp_path / "data.npz", pictures(3)
    np.savez(path, images=images, labels=[0, 1, 0], classes=np.array([b"ant", b"bee"]))
    assert open_store(path).classes == ("ant", "bee")
    for wrong in (np.array("ant"), np.array(3), np.array([["ant", "bee"]])):
        np.savez(path, images=images, labels=[0, 0, 0], classes=wrong)
        with pytest.raises(DataError, match="`classes` must be a list of names"):
            open_store(path)


def test_an_array_file_with_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    np.save(tmp_path / "data.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError):
        open_store(tmp_path / "data.npy")
    assert not (tmp_path / "executed").exists()


def test_synthetic() -> None:
    store = open_store("synthetic:5")
    assert isinstance(store, SyntheticStore)
    check_protocol(store, 5)
    assert store.classes == ()
    assert set(store.labels.tolist()) == {-1}
    assert store.sizes[0].tolist() == [256, 256]
    assert store.name(3) == "synthetic[3]"
    again = open_store("synthetic:5")
    np.testing.assert_array_equal(store.read(4), again.read(4))
    assert (store.read(4) != store.read(3)).mean() > 0.9
    assert again.fingerprint == store.fingerprint != open_store("synthetic:6").fingerprint
    assert SyntheticStore(2, (4, 5)).read(1).shape == (4, 5, 3)


@pytest.mark.parametrize("name", ["synthetic:", "synthetic:many", "synthetic:-3", "synthetic:0"])
def test_synthetic_refuses(name: str) -> None:
    with pytest.raises(DataError, match="synthetic:"):
        open_store(name)


def test_what_is_no_data_set(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(DataError, match=f"{missing} does not exist"):
        open_store(missing)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"notes\.md is not a data set"):
        open_store(tmp_path / "notes.md")
    with pytest.raises(DataError, match="does not exist"):
        open_store(tmp_path / "missing.npz")
    with pytest.raises(DataError, match="no data set was named"):
        open_store("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is an empty folder"):
        open_store(tmp_path / "empty", progress=False)


def test_names_that_the_system_does_not_take(tmp_path: Path) -> None:
    for name in ("x" * 300, "x" * 300 + ".txt", "nul\0", "~nobody-of-this-name/x"):
        with pytest.raises(DataError, match="does not exist"):
            open_store(name)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError, match="does not exist"):
        open_store(tmp_path / "loop")


def test_a_folder_above_that_may_not_be_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(DataError, match=r"private/train cannot be looked at \(Permission denied"):
        open_store("private/train")


def test_options_reach_the_index(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pictures(1, 64, 64)[0]).save(buffer, "JPEG")
    root = write_folder(tmp_path / "data", pictures(30))
    (root / "a" / "cut.jpg").write_bytes(buffer.getvalue()[:-200])
    assert len(open_store(root, verify=False, workers=1, progress=False)) == 31
    assert len(open_store(root, verify=True, progress=False)) == 30


def test_progress_can_be_switched_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_store(write_folder(tmp_path / "data", pictures()), progress=False)
    assert capsys.readouterr().err == ""
