"""Archives of arrays that declare or inflate to what no data is: refused before they are read."""

import io
import json
import zipfile

import numpy as np
import pytest

from pipelines import indexfile, npz
from pipelines.errors import DataError
from pipelines.stores import open_store


def header(shape, dtype="|u1") -> bytes:
    """The beginning of an `.npy` file."""
    file = io.BytesIO()
    about = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


def archive(path, **members) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for name, (head, count) in members.items():
            with out.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(head)
                for _ in range(count >> 20):
                    member.write(bytes(1 << 20))


@pytest.fixture
def unread(monkeypatch):
    """No array is read: what is refused is refused from its header."""

    def read(*args, **kwargs):
        raise AssertionError("an array was inflated")

    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", read)


def test_an_archive_that_inflates_as_no_images_do(tmp_path, unread):
    size = 320 << 20
    archive(tmp_path / "a.npz", images=(header((320, 1024, 1024, 1)), size))
    assert (tmp_path / "a.npz").stat().st_size < size / 900
    with pytest.raises(DataError, match=r"a\.npz.*`images` would inflate from .* to 335,544,320"):
        open_store(tmp_path / "a.npz")
    plain = header((1 << 20,))
    archive(tmp_path / "b.npz", images=(header((1, 1024, 1024)), 1 << 20), labels=(plain, 1 << 20))
    with pytest.raises(DataError, match="labels must be 1 whole numbers"):
        open_store(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"images": (header((1 << 40, 2, 2, 3)), 1 << 20)}, "declares 13,194,139,533,312 bytes"),
        ({"images": (header((1 << 20, 1, 1), "<f4"), 4 << 20)}, "must be uint8 pixels"),
        ({"images": (header((1 << 20,)), 1 << 20)}, r"must be \[N, H, W, 3\]"),
        ({"images": (header((1,), "|O"), 0)}, "objects, which are pickles"),
        (
            {
                "images": (header((1, 1024, 1024)), 1 << 20),
                "classes": (header((1, 1 << 20)), 1 << 20),
            },
            "`classes` must be a list of names",
        ),
        (
            {
                "images": (header((1, 1024, 1024)), 1 << 20),
                "classes": (header((1 << 6,), "<U524288"), 128 << 20),
            },
            "give one name a class",
        ),
    ],
)
def test_what_an_archive_declares_is_checked_first(tmp_path, unread, members, words):
    archive(tmp_path / "a.npz", **members)
    with pytest.raises(DataError, match=words):
        open_store(tmp_path / "a.npz")


def test_images_that_this_machine_cannot_hold(monkeypatch):
    few = npz.Header((1 << 30,), np.dtype(np.uint8), 1 << 30, 1 << 29)
    npz.check(few, "images")
    monkeypatch.setattr(npz.os, "sysconf", lambda name: 1 << 14)
    with pytest.raises(ValueError, match=r"needs 1,073,741,824 bytes.* has 268,435,456.*\.npy"):
        npz.check(few, "images")


def test_an_index_that_inflates(tmp_path, unread):
    archive(tmp_path / "data.index.npz", meta=(header((300 << 20,)), 300 << 20))
    with pytest.raises(DataError, match=r"no readable index|not a readable index.*would inflate"):
        indexfile.load(tmp_path / "data.index.npz", tmp_path)


def test_arrays_that_pass_are_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.arange(5), meta=json.dumps([1]))
    with open(tmp_path / "a.npz", "rb") as file, npz.load(file) as found:
        assert found["a"].tolist() == [0, 1, 2, 3, 4]
