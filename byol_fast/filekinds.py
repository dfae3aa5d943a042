"""What a file is that was given as weights and is none: a web page, an archive, a pointer to it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from byol_fast.errors import CheckpointError

WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".pkl", ".safetensors", ".tar")
_HEAD = 1024  # bytes that tell the kind
_LARGEST_JSON = 1 << 20
_UNPACK = "unpack it and name the weights file in it"

# First bytes -> what that is, and what to do. None of them begins a pickle or torch's zip.
_SIGNS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself",
        "fetch it with git lfs pull",
    ),
    (
        b"/annex/objects/",
        "a git-annex pointer, not the file itself",
        "fetch it with git annex get",
    ),
    (b"\x1f\x8b", "a gzip file", "unpack it with gunzip"),
    (b"BZh", "a bzip2 file", "unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "an xz file", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"\x89HDF", "an HDF5 file (Keras)", "convert it to a PyTorch state dict"),
    (b"\x93NUMPY", "a single NumPy array", "save a state dict"),
    (b"GGUF", "a GGUF file", "take the project's PyTorch or safetensors file"),
    (b"%PDF", "a PDF document", "download the weights again"),
    (b"\xff\xd8\xff", "an image (JPEG)", "name a weights file"),
    (b"\x89PNG", "an image (PNG)", "name a weights file"),
    (b"GIF8", "an image (GIF)", "name a weights file"),
    (b"\x7fELF", "a program (ELF)", "name a weights file"),
    (b"SQLite format 3", "a database (SQLite)", "name a weights file"),
    (b"PAR1", "a Parquet table", "name a weights file"),
    (b"model_checkpoint_path:", "the list of TensorFlow's checkpoints", "convert the checkpoint"),
)
_SUFFIXES = {
    ".onnx": ("an ONNX model", "take the PyTorch file it was exported from"),
    ".msgpack": ("a Flax (msgpack) file", "convert it to a PyTorch state dict"),
    ".index": ("part of a TensorFlow checkpoint", "convert it to a PyTorch state dict"),
    ".pb": ("a TensorFlow graph", "convert its variables to a PyTorch state dict"),
    ".tflite": ("a TensorFlow Lite model", "take the weights it was made from"),
}


def check(path: Path) -> None:
    """Passes whatever may hold weights; nothing is unpacked or parsed but a small JSON.

    Raises:
        CheckpointError: the file is something else; with its name, and what to do. Or it cannot be
            read.
    """
    try:
        found = other_kind(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if found is not None:
        what, advice = found
        raise CheckpointError(f"{path} is {what}, not a file of weights: {advice}")


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as safetensors do: the header's length, then JSON."""
    with open(path, "rb") as file:
        return _begins_safetensors(file.read(9), path)


def _begins_safetensors(head: bytes, path: Path) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def other_kind(path: Path) -> tuple[str, str] | None:
    """What the file is and what to do about it; None where it may hold weights."""
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if _begins_safetensors(head, path):  # its first bytes are a number, and can look like any sign
        return None
    if not head:
        return "empty", "download or copy it again"
    if not head.strip(b"\0"):
        return "a file of zeros (a download that was cut off)", "download it again"
    for sign, what, advice in _SIGNS:
        if head.startswith(sign):
            return what, advice
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head[:1] == b"\x08" and (b"pytorch" in head or b"onnx" in head.lower()):
        return _SUFFIXES[".onnx"]
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    if ".data-" in path.name and head[:2] != b"PK":
        return _SUFFIXES[".index"]
    if path.suffix == ".safetensors" and (text := plain_text(path)) and text[0] not in "<{[":
        return f"text ({text!r})", "download the weights again"
    return _archive(path) if head[:4] == b"PK\x03\x04" else _text(path, head)


def plain_text(path: Path) -> str | None:
    """The first line, where the file is text; for a pickle that could not be read as one."""
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    try:
        text = head[: _HEAD - 4].decode("utf-8")
    except UnicodeDecodeError:
        return None
    first = text.strip().partition("\n")[0]
    return first[:60] if text.isascii() and first.isprintable() and first else None


def _text(path: Path, head: bytes) -> tuple[str, str] | None:
    for encoding in ("utf-16", "utf-8-sig"):
        if encoding == "utf-16" and head[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            continue
        text = head.decode(encoding, errors="replace").lstrip().lower()
        if text.startswith("<?xml") or (text.startswith("<") and "<error>" in text):
            return "XML text (often a server's error message)", "download the weights again"
        if text.startswith("<"):
            again = "download the weights again, and confirm what the page asks"
            return "a web page (HTML)", again
        if text.startswith(("{", "[")):
            return _json(path)
    return None


def _json(path: Path) -> tuple[str, str]:
    content = None
    if path.stat().st_size <= _LARGEST_JSON:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return "text that begins as JSON", "download the weights again"
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        shards = sorted({str(name) for name in content["weight_map"].values()})
        listed = ", ".join(shards[:3]) + (", …" if len(shards) > 3 else "")
        return (
            f"the index of {len(shards)} shards ({listed})",
            "put their tensors into one file with safetensors.torch.save_file",
        )
    if isinstance(content, dict) and {"error", "message", "errors"} & set(content):
        return "a server's error message (JSON)", "download the weights again"
    return "JSON text", "name the weights file beside it"


def _archive(path: Path) -> tuple[str, str] | None:
    """Other programs' zip files; None for torch.save's, and for one that cannot be opened."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    tops = [name.partition("/")[2] for name in names]
    if "constants.pkl" in tops and any(name.startswith("code/") for name in tops):
        return (
            "a TorchScript archive (torch.jit.save)",
            "save its weights with torch.save(torch.jit.load(FILE).state_dict(), OUT), if you "
            "trust the file: loading TorchScript runs it",
        )
    if "archive_format" in tops or "archive_format" in names:
        return (
            "an exported program (torch.export.save)",
            "save its weights with torch.save(torch.export.load(FILE).state_dict, OUT), if you "
            "trust the file",
        )
    if any(name in (".data/python_version", ".data/extern_modules") for name in tops):
        return "a torch.package archive", "save the model's state_dict() with torch.save"
    if "data.pkl" in tops:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "a file of NumPy arrays (.npz)", "save a state dict with torch.save"
    if "model.weights.h5" in names:
        return "a Keras model", "convert it to a PyTorch state dict"
    inside = [name for name in names if name.endswith(WEIGHTS)]
    if inside:
        return f"a zip archive that holds {inside[0]}", _UNPACK
    return "a zip file that torch.save did not write", _UNPACK
