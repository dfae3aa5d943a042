"""The store over a `.beton`: rows, threads, pickling, its sidecar, and files that go bad."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines.decode import decode
from pipelines.errors import DataError
from pipelines.stores import Store, open_store
from pipelines.stores.beton import BetonStore
from pipelines.stores.betonfile import load
from pipelines.stores.sidecar import FORMAT, sidecar_path
from tests.pipelines.test_betonfile import DATA, PIXELS, write


def add_sidecar(path: Path, **changes: object) -> None:
    file = load(path)
    entries = {
        "format": FORMAT,
        "sha256": "5" * 64,
        "tables_sha256": file.tables_sha256,
        "bytes": file.size,
        "classes": ["ant", "bee", "cow"],
    }
    sidecar_path(path).write_text(json.dumps(entries | changes))


def test_it_is_a_store(tmp_path: Path) -> None:
    path = write(tmp_path / "a.beton")
    store = open_store(path)
    assert isinstance(store, BetonStore) and isinstance(store, Store)
    assert len(store) == 6 and store.encoded
    assert store.sizes.dtype == store.labels.dtype == np.int32
    assert store.sizes.tolist() == [[20 + i, 30] for i in range(6)]
    assert store.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert store.classes == ("0", "1", "2")  # nothing names them
    assert store.quarantined == ()
    assert store.fingerprint == load(path).tables_sha256
    assert store.name(4) == f"{path}[4]"
    for row, data in enumerate(DATA):
        if isinstance(data, bytes):
            assert store.read(row) == data
        else:
            pixels = store.read(row)
            np.testing.assert_array_equal(pixels, data)
            assert pixels.flags.writeable  # torch takes no other without a copy
    for row in (-1, 6):
        with pytest.raises(IndexError):
            store.read(row)


def test_unlabelled_and_all_pixels(tmp_path: Path) -> None:
    assert open_store(write(tmp_path / "a.beton", labelled=False)).classes == ()
    import tests.pipelines.test_betonwriter as writing

    path = writing.write(tmp_path / "b.beton", [writing.blank(4, 5)] * 2)
    assert not open_store(path).encoded


def test_names_of_classes_and_fingerprint_come_from_its_own_sidecar(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.beton")
    add_sidecar(path)
    store = open_store(path)
    assert store.classes == ("ant", "bee", "cow")
    assert store.fingerprint == "5" * 64
    assert not caplog.records
    add_sidecar(path, classes=["ant"])  # fewer than the labels need
    assert open_store(path).classes == ("0", "1", "2")
    for wrong in (
        {"tables_sha256": "0" * 64},
        {"bytes": 17},
        {"format": FORMAT + 1},
        {"sha256": "no number"},
        {"sha256": None},
        {"classes": 7},
    ):
        add_sidecar(path, **wrong)
        caplog.clear()
        store = open_store(path)
        assert store.classes == ("0", "1", "2")
        assert store.fingerprint == store.file.tables_sha256
        assert "a.beton.json is not used" in caplog.text
    for text in ("", "[1]", "\xff"):
        sidecar_path(path).write_bytes(text.encode("latin1"))
        assert open_store(path).classes == ("0", "1", "2")


def test_many_threads_and_another_process_read_it(tmp_path: Path) -> None:
    store = pickle.loads(pickle.dumps(open_store(write(tmp_path / "a.beton"))))
    with ThreadPoolExecutor(6) as pool:
        read = list(pool.map(store.read, list(range(6)) * 20))
    for row, data in enumerate(read):
        pixels = decode(data) if isinstance(data, bytes) else data
        expected = DATA[row % 6]
        expected = decode(expected) if isinstance(expected, bytes) else PIXELS[row % 6]
        np.testing.assert_array_equal(pixels, expected)


def test_a_file_cut_short_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.beton")
    store = open_store(path)
    with open(path, "r+b") as file:
        file.truncate(int(store.file.offsets[3]) + 10)
    assert store.read(2) is not None
    for row in (3, 4):
        with pytest.raises(DataError, match=r"a.beton was cut short while it was read: it had"):
            store.read(row)


def test_a_file_replaced_while_it_is_read_stays_the_old_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.beton")
    store = open_store(path)
    path.unlink()
    path.write_bytes(b"another")
    assert store.read(1) == DATA[1]


def test_what_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.beton")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="is truncated"):
        open_store(path)
    with pytest.raises(DataError, match="does not exist"):
        open_store(tmp_path / "b.beton")
