"""Pickles as data: what is read, what is refused, and that nothing is ever executed."""

import argparse
import collections
import io
import os
import pickle
import struct
import subprocess
import zipfile

import numpy as np
import pytest
import torch

from byol_fast.errors import CheckpointError
from byol_fast.interop import arrays, files, inert, records

WEIGHTS = {
    "a": torch.arange(12.0).reshape(3, 4).t(),
    "b": torch.nn.Parameter(torch.ones(2)),
    "half": torch.randn(3).half(),
    "count": torch.tensor(5),
    "none": torch.empty(0, 3),
}


class Config(dict):
    """Stands for a program's own class, as mmengine's ConfigDict."""


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_benign_objects_do_not_hinder_the_tensors(tmp_path, zipped):
    tree = {
        "state_dict": collections.OrderedDict(WEIGHTS),
        "args": argparse.Namespace(lr=0.1, out=tmp_path),
        "config": Config(depth=50),
        "method": Config(depth=50).keys,  # mmengine's history buffers hold such: builtins.getattr
        "best": np.float64(71.5),
        "array": np.arange(6, dtype=">i4").reshape(2, 3),
        "epoch": 7,
    }
    torch.save(tree, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pth", weights_only=True)  # torch's own reader refuses it
    found = files.read(tmp_path / "x.pth")
    assert {"argparse.Namespace", "pathlib.PosixPath"} <= set(found.opaque)
    assert any(name.endswith(".Config") for name in found.opaque)
    assert found.tree["epoch"] == 7 and found.tree["best"] == 71.5
    assert records.mapping(found.tree["config"]) == {"depth": 50}
    assert records.mapping(found.tree["args"])["lr"] == 0.1
    assert found.tensor(found.tree["array"]).tolist() == [[0, 1, 2], [3, 4, 5]]
    for key, value in WEIGHTS.items():
        assert found.tensor(found.tree["state_dict"][key]).equal(value.detach())


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_protocol(tmp_path, protocol):
    pairs = {"w": np.random.default_rng(0).random((2, 3)), "f": np.asfortranarray(np.eye(3))}
    pairs["empty"] = np.zeros((0, 2))
    tree = {**pairs, "n": np.int64(4), "set": {1, 2}, "t": (1, 2.5, None, True), "s": "ä" * 300}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(tree, protocol=protocol))
    found = files.read(tmp_path / "x.pkl")
    for key, value in pairs.items():
        assert np.array_equal(found.tensor(found.tree[key]).numpy(), value)
    assert {k: found.tree[k] for k in ("n", "set", "t", "s")} == {
        k: tree[k] for k in ("n", "set", "t", "s")
    }


class Runs:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def harmful(target):
    return {
        "open": Runs(open, str(target), "w"),
        "system": Runs(os.system, f"touch {target}"),
        "popen": Runs(subprocess.Popen, ["touch", str(target)]),
        "eval": Runs(eval, f"open({str(target)!r}, 'w')"),
    }


@pytest.mark.parametrize("kind", ["open", "system", "popen", "eval"])
@pytest.mark.parametrize("how", ["zip", "old", "pickle"])
def test_harm_is_refused_and_not_done(tmp_path, kind, how):
    target, path = tmp_path / "executed", tmp_path / "evil.pth"
    tree = {"state_dict": {"conv1.weight": torch.ones(2)}, "extra": harmful(target)[kind]}
    if how == "pickle":
        path.write_bytes(pickle.dumps({"extra": tree["extra"]}))
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=r"evil.pth was not loaded.*asks to run"):
        files.read(path)
    assert not target.exists()
    if kind == "open":  # the payload works: it is refused for being one
        torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
        assert target.exists()


def test_what_is_not_on_any_list_is_not_called_either(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(collections, "namedtuple", lambda *a: called.append(a))
    blob = b"ccollections\nnamedtuple\n(S'x'\nS'y'\ntR."
    found = inert.load(io.BytesIO(blob))
    assert str(found) == "collections.namedtuple" and found.args == ("x", "y")
    pickle.loads(blob)
    assert called == [("x", "y")]  # Python's own reader does call it


def test_damage_is_said():
    good = pickle.dumps({"w": np.ones(3)}, protocol=2)
    for blob in (good[:-20], b"", b"<html>", b"\x80\x02}q\x00K\x01s.", b"\x80\x02)R.", b"cos\n"):
        with pytest.raises(records.Refused):
            inert.load(io.BytesIO(blob), reduce=arrays.reduce)


def test_a_file_may_point_at_itself(tmp_path):
    loop: dict = {}
    loop["again"] = [loop]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(loop))
    tree = files.read(tmp_path / "x.pkl").tree
    assert tree["again"][0] is tree


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    torch.save({"w": torch.arange(4.0), "x": argparse.Namespace()}, tmp_path / "good.pth")
    with (
        zipfile.ZipFile(tmp_path / "good.pth") as good,
        zipfile.ZipFile(tmp_path / "bad.pth", "w") as bad,
    ):
        for name in good.namelist():
            data = good.read(name)
            bad.writestr(name, data[:8] if name.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match=r"bad.pth was not loaded.*storage 0 is cut short"):
        files.read(tmp_path / "bad.pth")
    view = arrays.View(arrays.Storage("0", torch.float32, 4), torch.float32, 2, (3,), (1,))
    with pytest.raises(ValueError, match="does not fit its storage"):
        view.tensor(torch.zeros(16, dtype=torch.uint8))


def test_a_compressed_zip_is_no_torch_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("x/data.pkl", pickle.dumps({}))
        bomb.writestr("x/data/0", bytes(10**6))
    with pytest.raises(CheckpointError, match="not compressed"):
        files.read(tmp_path / "x.pth")


def test_an_old_torch_file_with_an_impossible_storage(tmp_path):
    torch.save(
        {"w": torch.ones(2), "x": argparse.Namespace()},
        tmp_path / "x.pth",
        _use_new_zipfile_serialization=False,
    )
    blob = (tmp_path / "x.pth").read_bytes()
    size = struct.pack("<q", 2)
    at = blob.rindex(size + torch.ones(2).numpy().tobytes())
    (tmp_path / "x.pth").write_bytes(blob[:at] + struct.pack("<q", 1 << 60) + blob[at + 8 :])
    with pytest.raises(CheckpointError, match="impossible size"):
        files.read(tmp_path / "x.pth")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.pth does not exist"):
        files.read(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        files.read(tmp_path)


def test_an_incomplete_download_and_a_flipped_bit_are_said(tmp_path):
    tree = {"w": torch.arange(4096.0), "x": argparse.Namespace()}
    torch.save(tree, tmp_path / "good.pth")
    blob = bytearray((tmp_path / "good.pth").read_bytes())
    (tmp_path / "half.pth").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(CheckpointError, match=r"half.pth .*incomplete, its end is missing"):
        files.read(tmp_path / "half.pth")
    at = blob.index(tree["w"].numpy().tobytes())
    blob[at + 100] ^= 1
    (tmp_path / "bad.pth").write_bytes(blob)
    found = files.read(tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"bad.pth is damaged: Bad CRC"):
        found.tensor(found.tree["w"])
