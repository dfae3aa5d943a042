"""Reading `.beton` tables: what FFCV and we write, and every way in which a file can be wrong."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.conversion.betonwriter import BetonWriter
from pipelines.errors import DataError
from pipelines.sources import ffcv_available
from pipelines.stores import betonfile, open_store
from pipelines.stores.betonfile import ALLOCATION, FIELD, HEADER, IMAGE, load, row_type
from tests.pipelines.fake_store import encoded, picture

PIXELS = [picture(20 + i, 30, seed=i) for i in range(6)]
DATA = [encoded(image) if i % 2 else image for i, image in enumerate(PIXELS)]
ROWS = HEADER.itemsize + 2 * FIELD.itemsize
needs_ffcv = pytest.mark.skipif(
    not ffcv_available(), reason="FFCV is not installed (launch/install_ffcv.sh)"
)
ROW = row_type([betonfile.IMAGE_FIELD, betonfile.INT_FIELD]).itemsize


def write(path: Path, *, labelled: bool = True) -> Path:
    """Six images, every second one a JPEG, of the classes 0 1 2 0 1 2."""
    with open(path, "wb") as file:
        writer = BetonWriter(file, len(DATA), labelled=labelled)
        for i, data in enumerate(DATA):
            writer.add(data, 20 + i, 30, i % 3)
        writer.finish()
    return path


def test_layout() -> None:
    assert (HEADER.itemsize, FIELD.itemsize, IMAGE.itemsize, ALLOCATION.itemsize) == (
        *(24, 1041, 13, 24),
    )
    assert row_type([2]).itemsize == 13
    assert row_type([2, 1]).itemsize == row_type([1, 2]).itemsize == 24
    assert row_type([2, 1]).fields["f1"][1] == 16


@pytest.mark.parametrize("labelled", [True, False])
def test_what_was_written_is_found(tmp_path: Path, labelled: bool) -> None:
    path = write(tmp_path / "a.beton", labelled=labelled)
    file, content = load(path), path.read_bytes()
    assert len(file) == 6 and file.size == len(content)
    assert file.sizes.tolist() == [[20 + i, 30] for i in range(6)]
    assert file.labels.tolist() == ([0, 1, 2, 0, 1, 2] if labelled else [-1] * 6)
    assert file.raw.tolist() == [True, False] * 3
    assert (file.image_field, file.label_field) == ("image", "label" if labelled else None)
    for i, data in enumerate(DATA):
        there = content[file.offsets[i] : file.offsets[i] + file.lengths[i]]
        assert there == (data if isinstance(data, bytes) else data.tobytes())


def test_the_digest_is_of_all_tables(tmp_path: Path) -> None:
    path = write(tmp_path / "a.beton")
    file = load(path)
    first, content = file.tables_sha256, path.read_bytes()
    table = file.size - 6 * ALLOCATION.itemsize
    assert load(write(tmp_path / "b.beton")).tables_sha256 == first
    for place in (ROWS + 16, table, HEADER.itemsize + 30):  # a label, a sample number, an argument
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert load(path).tables_sha256 != first
    changed = bytearray(content)
    changed[file.offsets[0]] ^= 1  # a pixel
    path.write_bytes(changed)
    assert load(path).tables_sha256 == first


def patched(at: int, format: str, *values: int) -> Callable[[bytes], bytes]:
    def patch(content: bytes) -> bytes:
        changed = bytearray(content)
        struct.pack_into(format, changed, at % len(content), *values)
        return bytes(changed)

    return patch


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", "has 0 bytes"),
    "a few bytes": (lambda c: c[:23], "has 23 bytes"),
    "foreign": (lambda c: b"PK\x03\x04" * 1000, "no .beton file of version 2"),
    "zeros": (lambda c: bytes(len(c)), "is unfinished"),
    "another version": (patched(0, "<H", 3), r"no .beton file of version 2 \(it begins with 3\)"),
    "an odd page size": (patched(4, "<I", 3 << 20), "no .beton file"),
    "no page size": (patched(4, "<I", 0), "no .beton file"),
    "the writer died": (patched(16, "<Q", 0), "is unfinished"),
    "no samples": (patched(8, "<Q", 0), "holds no images"),
    "too many samples": (patched(8, "<Q", 1 << 60), "no room for the 1,152,921,504,606,846,976"),
    "too many fields": (patched(2, "<H", 65535), "kind|truncated|room"),
    "a table beyond the end": (patched(16, "<Q", 1 << 62), "is truncated"),
    "cut in the table": (lambda c: c[:-1], "is truncated"),
    "cut in the table at an entry": (lambda c: c[:-24], "sample 5 is not in the allocation table"),
    "cut in the images": (lambda c: c[: 8 << 20], "is truncated"),
    "cut in the metadata": (lambda c: c[: ROWS + 10], "is truncated"),
    "cut in the fields": (lambda c: c[:100], "is truncated"),
    "no image field": (patched(24, "B", 1), "has no image field"),
    "an unknown field": (patched(24 + 1041, "B", 255), "'label' of its writer's own kind"),
    "an unknown mode": (patched(ROWS + 2 * ROW, "B", 2), "sample 2 has the unknown mode 2"),
    "no height": (patched(ROWS + 3, "<H", 0), "sample 0 has an impossible size"),
    "a bomb": (patched(ROWS + ROW + 1, "<HH", 60000, 60000), "sample 1 has an impossible size"),
    "another width": (patched(ROWS + 1, "<H", 31), "sample 0 has not as many bytes"),
    "a pointer beyond the end": (patched(ROWS + 5, "<Q", 1 << 63), "sample 0 is not in the alloc"),
    "a pointer between images": (patched(ROWS + 5, "<Q", (8 << 20) + 1), "sample 0 is not in"),
    "a length beyond the end": (patched(-8, "<Q", 1 << 40), "sample 5 lies outside the file"),
    "a negative length": (patched(-8, "<q", -5), "sample 5 lies outside the file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.beton")
    harm, message = DAMAGES[damage]
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)  # where
    assert str(caught.value).count(": ") >= 1  # and how to mend it


def test_an_image_that_lies_in_the_metadata_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.beton")
    content = patched(-24 + 8, "<Q", 48)(patched(ROWS + 5 * ROW + 5, "<Q", 48)(path.read_bytes()))
    path.write_bytes(content)
    with pytest.raises(DataError, match="sample 5 lies outside the file"):
        load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.beton cannot be read \(No such file"):
        load(tmp_path / "a.beton")


def test_every_cut_is_refused_or_whole(tmp_path: Path) -> None:
    """No cut of the file gives anything but an error."""
    path = write(tmp_path / "a.beton")
    content = path.read_bytes()
    cuts = [*range(0, 3000, 97), *range(8 << 20, len(content), 997), len(content) - 1]
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(DataError):
            load(path)


def test_numbers_that_are_no_classes_are_no_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.beton")
    path.write_bytes(patched(ROWS + 16, "<q", 1 << 40)(path.read_bytes()))
    file = load(path)
    assert file.labels.tolist() == [-1] * 6 and "count no classes" in file.notes[0]


def one_row(path: Path, fields_: list[tuple[int, bytes]]) -> Path:
    """One image of 2 x 1 pixels, which every image field holds, and three fields in all."""
    kinds = [kind for kind, _ in fields_]
    fields, rows = np.zeros(3, FIELD), np.zeros(1, row_type(kinds))
    fields["kind"], fields["name"] = kinds, [name for _, name in fields_]
    start = HEADER.itemsize + fields.nbytes + rows.nbytes
    for i, kind in enumerate(kinds):
        if kind == betonfile.IMAGE_FIELD:
            rows[f"f{i}"] = (betonfile.RAW, 2, 1, start)
    header = np.array([(betonfile.VERSION, 3, 8 << 20, 1, start + 6)], HEADER)
    table = np.array([(0, start, 6)], ALLOCATION)
    content = [header, fields, rows, np.arange(6, dtype=np.uint8), table]
    path.write_bytes(b"".join(part.tobytes() for part in content))
    return path


def test_several_numbers_of_which_none_is_named_label(tmp_path: Path) -> None:
    file = load(one_row(tmp_path / "a.beton", [(2, b"image"), (1, b"number"), (1, b"class")]))
    assert file.label_field is None and file.labels.tolist() == [-1]
    assert "none of its whole numbers (number, class) is named label" in file.notes[0]


def test_several_images_of_which_none_is_named_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = one_row(tmp_path / "a.beton", [(2, b"mask"), (2, b"photo"), (1, b"label")])
    assert load(path).image_field == "mask"
    open_store(path)
    assert "of 2 image fields (mask, photo), none of which is named image" in caplog.text
    path = one_row(tmp_path / "b.beton", [(2, b"mask"), (2, b"image"), (1, b"label")])
    assert load(path).image_field == "image" and load(path).notes == ()


# Files of FFCV's own writer


class Samples:
    """What FFCV's writer takes: a tuple for each sample."""

    def __init__(self, make: Callable[[int], tuple[object, ...]]) -> None:
        self.make = make

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, i: int) -> tuple[object, ...]:
        return self.make(i)


def parts(dtype: np.dtype) -> list[tuple[np.dtype, int]]:
    """Types and places of a record's fields; the names are each one's own."""
    assert dtype.names is not None and dtype.fields is not None
    return [dtype.fields[name][:2] for name in dtype.names]


@pytest.mark.slow
@pytest.mark.ffcv
@needs_ffcv
def test_the_layout_is_ffcvs() -> None:
    from ffcv import fields, types

    assert types.CURRENT_VERSION == betonfile.VERSION
    assert parts(types.HeaderType) == parts(HEADER)
    assert parts(types.ALLOC_TABLE_TYPE) == parts(ALLOCATION)
    assert [place for _, place in parts(types.FieldDescType)] == [
        place for _, place in parts(FIELD)
    ]
    assert parts(fields.RGBImageField().metadata_type) == parts(IMAGE)
    made = {
        0: fields.FloatField(),
        1: fields.IntField(),
        2: fields.RGBImageField(),
        3: fields.BytesField(),
        4: fields.NDArrayField(np.dtype("<f4"), (2,)),
        5: fields.JSONField(),
    }
    for kinds in ([2], [2, 1], [1, 2], [0, 3, 2, 4, 1], [5, 2, 2], [3, 2, 3, 1, 1]):
        theirs, ours = types.get_metadata_type([made[kind] for kind in kinds]), row_type(kinds)
        assert ours.itemsize == theirs.itemsize
        assert [place for _, place in parts(ours)] == [place for _, place in parts(theirs)]


@pytest.mark.ffcv
@needs_ffcv
@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("raw", ["image", "label"]),
        ("jpg", ["label", "image"]),
        ("proportion", ["image"]),
        ("smart", ["note", "number", "image", "weight", "label"]),
        ("jpg", ["number", "image", "note"]),
    ],
)
def test_files_of_ffcvs_own_writer(tmp_path: Path, mode: str, names: list[str]) -> None:
    from ffcv import fields
    from ffcv.writer import DatasetWriter

    from pipelines.decode import decode
    from pipelines.stores.beton import BetonStore

    image = fields.RGBImageField(write_mode=mode, jpeg_quality=95, smart_threshold=2000)
    kinds: dict[str, tuple[object, Callable[[int], object]]] = {
        "image": (image, lambda i: PIXELS[i]),
        "label": (fields.IntField(), lambda i: i % 3),
        "number": (fields.IntField(), lambda i: 7 * i),
        "weight": (fields.FloatField(), lambda i: i / 2),
        "note": (fields.BytesField(), lambda i: np.frombuffer(b"abc"[: i % 3], np.uint8)),
    }
    path = tmp_path / "theirs.beton"
    writer = DatasetWriter(str(path), {name: kinds[name][0] for name in names}, num_workers=2)
    samples = Samples(lambda i: tuple(kinds[name][1](i) for name in names))
    writer.from_indexed_dataset(samples, chunksize=1)

    store = BetonStore.open(path)
    assert store.sizes.tolist() == [[20 + i, 30] for i in range(6)]
    labels = [0, 1, 2, 0, 1, 2] if "label" in names else [-1] * 6
    if "number" in names and "label" not in names:
        labels = [0, 7, 14, 21, 28, 35]  # the only whole number is taken to be the label
    assert store.labels.tolist() == labels
    assert store.classes == tuple(str(label) for label in range(max(labels) + 1))
    big = [image.nbytes > 2000 for image in PIXELS]
    raw = {"raw": [True] * 6, "jpg": [False] * 6, "smart": [not x for x in big]}
    assert store.file.raw.tolist() == raw.get(mode, store.file.raw.tolist())
    for row in range(6):
        data = store.read(row)
        assert isinstance(data, bytes) != store.file.raw[row]
        if isinstance(data, bytes):
            assert np.abs(decode(data).astype(int) - PIXELS[row]).mean() < 6
        else:
            np.testing.assert_array_equal(data, PIXELS[row])
