"""Files made to do harm: nothing in them is executed, and none is written outside its place.

Pickles in checkpoints, weights, arrays and reports: tests/byol_fast/test_checkpoint.py,
test_export.py, test_report.py and tests/pipelines/test_stores.py. Sizes that are checked before
anything is decoded: tests/pipelines/test_image_policy.py.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from byol_fast.cli import main
from pipelines.convert import main as convert
from pipelines.errors import DataError
from pipelines.stores import open_store
from tests.faults.data_support import pictures
from tests.support import make_folder


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What exists once something was executed; shown to work first."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Harm(path)))
    assert path.is_dir()
    path.rmdir()
    return path


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = make_folder(tmp_path_factory.mktemp("images"), images=4)
    return [path.read_bytes() for path in pictures(folder, 4)]


@pytest.mark.parametrize(
    "payload",
    [
        "data: !!python/object/apply:os.mkdir ['{mark}']",
        "!!python/object/new:os.mkdir ['{mark}']",
        "data: !!python/name:os.system",
        "data: " + "[" * 2_000,
    ],
)
def test_configuration_with_a_python_object_is_refused(
    payload: str, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(payload.format(mark=mark))
    assert main(["pretrain", "--config", str(file)]) == 2
    told = capsys.readouterr().err
    assert str(file) in told and "Traceback" not in told
    assert not mark.exists()


ESCAPES = ["../escaped.jpg", "../../escaped.jpg", "a/../../../escaped.jpg", "{outside}/escaped.jpg"]


def hostile_tar(path: Path, outside: Path, jpegs: list[bytes]) -> Path:
    """Images under names that lead elsewhere, and links that do."""
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(ESCAPES):
            info = tarfile.TarInfo(name.format(outside=outside))
            info.size = len(jpegs[number])
            tar.addfile(info, io.BytesIO(jpegs[number]))
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, kind in (("device.jpg", tarfile.CHRTYPE), ("pipe.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    return path


def test_a_tar_is_never_extracted(tmp_path: Path, jpegs: list[bytes]) -> None:
    inside, outside = tmp_path / "data" / "deep", tmp_path / "outside"
    inside.mkdir(parents=True)
    outside.mkdir()
    tar = hostile_tar(inside / "train.tar", outside, jpegs)
    store = open_store(tar, progress=False, max_bad_share=1.0)
    assert [store.read(row) for row in range(len(store))] == jpegs
    reasons = {Path(name).name: reason for name, reason in store.quarantined}
    assert reasons.keys() == {"link.jpg", "hard.jpg"}  # devices and pipes are no members at all
    assert all("without data of its own" in reason for reason in reasons.values())
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"data/deep/train.tar", "data/deep/train.tar.index.npz"}


def test_a_tar_converted_writes_one_file(tmp_path: Path, jpegs: list[bytes]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    tar = hostile_tar(tmp_path / "train.tar", outside, jpegs)
    out = tmp_path / "out" / "train.beton"
    out.parent.mkdir()
    assert convert([str(tar), str(out)]) == 4  # a third of it cannot be used
    assert list(outside.iterdir()) == [] and list(out.parent.iterdir()) == []


def test_an_index_with_a_pickle_is_made_again_and_not_executed(
    tmp_path: Path, mark: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path / "images", images=4)
    objects = np.array([Harm(mark)], dtype=object)
    with open(tmp_path / "images.index.npz", "wb") as file:
        np.savez(file, meta=objects, dirs=objects)
    assert len(open_store(folder, progress=False)) == 4
    assert "indexing again" in caplog.text
    assert not mark.exists()


@pytest.mark.parametrize("content", ["pickle", "list", "deep", "huge"])
def test_a_sidecar_is_data_and_nothing_else(
    content: str, tmp_path: Path, mark: Path, jpegs: list[bytes]
) -> None:
    folder = make_folder(tmp_path / "images", images=4)
    beton = tmp_path / "a.beton"
    assert convert([str(folder), str(beton)]) == 0
    payload = {
        "pickle": pickle.dumps(Harm(mark)),
        "list": json.dumps([1, 2]).encode(),
        "deep": b"[" * 100_000,
        "huge": b'{"sha256": "' + b"0" * 1_000_000 + b'"}',
    }[content]
    (tmp_path / "a.beton.json").write_bytes(payload)
    store = open_store(beton)
    assert len(store) == 4 and len(store.fingerprint) == 64
    assert not mark.exists()


def test_arrays_that_claim_more_than_there_is_are_refused(tmp_path: Path) -> None:
    """A header of a terabyte, and none of it: refused before memory is asked for."""
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**7, 256, 256, 3)}
    np.lib.format.write_array_header_1_0(file, header)
    (tmp_path / "a.npy").write_bytes(file.getvalue() + b"\0" * 100)
    with pytest.raises(DataError, match=r"a\.npy"):
        open_store(tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["step-00000001.pt", "backbone.pth"])
def test_torch_runs_nothing_even_where_the_hash_is_right(
    name: str, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole attack: the sum beside the file is the attacker's too."""
    import hashlib

    path = tmp_path / name
    torch.save({"model": Harm(mark), "step": 1}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(name + ".sha256").write_text(f"{digest}  {name}\n")
    folder = make_folder(tmp_path / "images", images=8)
    code = main(["evaluate", "knn", "--weights", str(path), "--data", str(folder)])
    assert code == 3 and str(path) in capsys.readouterr().err
    assert not mark.exists()
