"""Files that are given as weights and hold none: named as what they are, by command and library."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from byol_fast import load_backbone
from byol_fast.errors import CheckpointError
from byol_fast.interop import networks

PAGE = "<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>"
INDEX = {"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors", "b": "m-2.safetensors"}}


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as out:
        out.addfile(tarfile.TarInfo("byol.pth"))
    return file.getvalue()


def packed(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name in names:
            out.writestr(name, b"content")
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


KINDS = {
    "byol.pth": (PAGE.encode(), "a web page"),
    "byol.safetensors": (PAGE.encode(), "a web page"),
    "byol.ckpt": (b"\xef\xbb\xbf\r\n  <html>", "a web page"),
    "wide.pth": (PAGE.encode("utf-16"), "a web page"),
    "head.bin": (b"<!-- moved --><head></head>", "a web page"),
    "denied.pth": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "error message",
    ),
    "gone.pth": (b'{"error": "Entry not found"}', "error message .JSON"),
    "config.json": (json.dumps({"architectures": ["ResNet"]}).encode(), "JSON text"),
    "half.pth": (b'{"weight_map": {"a"', "begins as JSON"),
    "model.safetensors.index.json": (json.dumps(INDEX).encode(), "index of 2 shards .m-2.*1-of-2"),
    "plain.pth": (b"404: Not Found", "it is text .'404: Not Found'"),
    "limit.safetensors": (b"Too many requests, come back later", "is text .*come back later"),
    "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "annex.pth": (b"/annex/objects/SHA256E-s3--00.pth", "git annex get"),
    "packed.pth": (gzip.compress(b"x" * 100), "a gzip file.*gunzip"),
    "packed.pt": (bz2.compress(b"x" * 100), "a bzip2 file"),
    "packed.ckpt": (lzma.compress(b"x" * 100), "an xz file"),
    "weights.pth.tar": (tar(), "a tar archive"),
    "folder.pth": (packed("run/byol.pth", "run/log.txt"), "zip archive that holds run/byol.pth"),
    "papers.pth": (packed("a.txt"), "torch.save did not write"),
    "arrays.pth": (packed("a.npy", "b.npy"), "NumPy arrays"),
    "keras.pth": (packed("config.json", "model.weights.h5"), "a Keras model"),
    "program.pt2": (packed("x/archive_format", "x/data/a"), "an exported program"),
    "array.pth": (array(), "a single NumPy array"),
    "empty.pth": (b"", "is empty"),
    "zeros.pth": (bytes(5000), "zeros"),
    "image.pth": (b"\xff\xd8\xff\xe0 JFIF", "an image"),
    "net.onnx": (b"\x08\x0a\x12\x07pytorch\x1a\x032.0", "an ONNX model"),
    "net.pth": (b"\x08\x0a\x12\x07pytorch\x1a\x032.0", "an ONNX model"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "model.ckpt.data-00000-of-00001": (b"\x01\x02\x03\x04" * 20, "TensorFlow checkpoint"),
    "checkpoint": (b'model_checkpoint_path: "model.ckpt-9"\n', "TensorFlow"),
    "cut.pth": (packed("x/data.pkl")[:40], "incomplete, its end is missing"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_weights_file_is_named(tmp_path, name):
    content, words = KINDS[name]
    (tmp_path / name).write_bytes(content)
    for read in (networks.read, load_backbone):
        with pytest.raises(CheckpointError, match=rf"(?s){tmp_path / name}.*{words}"):
            read(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_torchscript_is_named(tmp_path):
    torch.jit.trace(torch.nn.ReLU(), torch.ones(1)).save(str(tmp_path / "encoder.pt"))
    for read in (networks.read, load_backbone):
        with pytest.raises(CheckpointError, match=r"a TorchScript archive.*torch\.jit\.load"):
            read(tmp_path / "encoder.pt")


def test_another_whole_module_is_named(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "net.pth")
    for read in (networks.read, load_backbone):
        with pytest.raises(CheckpointError, match=r"no layout known here .0.weight|Sequential"):
            read(tmp_path / "net.pth")


def test_the_content_counts_and_not_the_suffix(tmp_path):
    import safetensors.torch

    state = {"conv1.weight": torch.ones(64, 3, 7, 7), "layer1.0.conv1.weight": torch.ones(1)}
    safetensors.torch.save_file(state, tmp_path / "x.bin")
    assert networks.read(tmp_path / "x.bin").container == "safetensors"
    for length in range(0x8B1F - 64, 0x8B1F + 8, 8):  # looks like gzip's sign
        header = json.dumps({"__metadata__": {"x": "y" * (length - 25)}}).encode().ljust(length)
        (tmp_path / "y.pth").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(CheckpointError, match="no state dict"):
            networks.read(tmp_path / "y.pth")


def test_a_file_without_rights_is_named(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.pth").write_bytes(b"x")
    monkeypatch.setattr("byol_fast.filekinds.other_kind", refused)
    with pytest.raises(CheckpointError, match=r"x.pth cannot be read: Permission denied"):
        load_backbone(tmp_path / "x.pth")
