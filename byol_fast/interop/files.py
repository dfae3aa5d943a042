"""Any weights file to plain data: safetensors, torch's formats, pickles of arrays."""

from __future__ import annotations

import io
import json
import logging
import math
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from byol_fast import filekinds
from byol_fast.errors import CheckpointError
from byol_fast.interop import arrays, inert, records

log = logging.getLogger(__name__)

_MAGIC = 0x1950A86A20F9469CFC6C  # begins torch's format from before 1.6


@dataclass
class Content:
    """What a file holds, as plain data."""

    file: Path
    container: str  # "safetensors", "torch" or "pickle"
    tree: Any  # containers, numbers, tensors, `records.Opaque`
    opaque: list[str] = field(default_factory=list)  # names of objects that were not built
    tensor: Callable[[Any], Tensor] = lambda leaf: _plain(leaf)


def read(path: Path | str) -> Content:
    """The content of a file; nothing in it is executed.

    Raises:
        CheckpointError: not there, damaged, no weights file, or made to run something.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        kind = "is no regular file" if path.exists() else "does not exist"
        kind = "is a folder" if path.is_dir() else kind
        raise CheckpointError(f"{path} {kind}: name a weights file (.pth, .pt, .ckpt, .pkl, …)")
    content = interpret(path)
    if content.container == "torch" and (tree := _plain_torch(path)) is not None:
        return Content(path, "torch", tree)
    return content


def interpret(path: Path) -> Content:
    """The content as this package's own reader finds it, in bounded time and memory.

    torch's reader comes after it, where it is used at all: it hashes what a pickle gives it as
    keys, and deeply nested tuples end the interpreter there.

    Raises:
        CheckpointError: as `read`.
    """
    try:
        filekinds.check(path)
        if filekinds.is_safetensors(path) or path.suffix == ".safetensors":
            return _safetensors(path)
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _zip(path)
            file.seek(0)
            return _pickle(path, file)
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        text = filekinds.plain_text(path) if isinstance(error, records.Refused) else None
        what = f"it is text ({text!r}), or {error}" if text else error
        raise CheckpointError(
            f"{path} was not loaded, and nothing in it was executed: {what}"
        ) from error
    except Exception as error:  # a damaged file can raise nearly anything
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {reason}") from error


def plain(path: Path, map_location: Any = "cpu", data: bytes | None = None) -> Any:
    """torch's own reading of a file of tensors and plain containers, after `interpret`.

    Args:
        data: the file's bytes, where the caller has read them.

    Raises:
        CheckpointError: as `interpret`.
        Exception: nearly anything, where torch refuses it.
    """
    interpret(path)
    source = path if data is None else io.BytesIO(data)
    return torch.load(source, map_location=map_location, weights_only=True)


def spare(source: Path, written: Iterable[Path]) -> None:
    """Raises ValueError if a file that is about to be written is `source` itself."""
    for path in written:
        if path.exists() and path.samefile(source):
            raise ValueError(
                f"{path} is the file that is read, and would be written over: name another OUT"
            )


def _plain_torch(path: Path) -> Any:
    """The content of a torch file of tensors and plain containers; None for any other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about old formats
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # program objects, or damage
            log.debug("%s: not plain (%s); its pickle is read as data instead", path, error)
            return None


def _safetensors(path: Path) -> Content:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            about = dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"damaged or no safetensors file ({error})") from error
    tree: dict[str, Any] = {"state_dict": tensors}
    if "byol_fast" in about:
        tree["byol_fast"] = json.loads(about["byol_fast"])
    return Content(path, "safetensors", tree)


def _zip(path: Path) -> Content:
    """torch's format since 1.6: a pickle and a file a storage in an uncompressed zip."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError("incomplete, its end is missing: download or copy it again")
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError("a zip file, but not one that torch.save wrote")
        folder = pickles[0].removesuffix("data.pkl")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise CheckpointError("torch's zip files are not compressed, this one is")
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
            raise CheckpointError("damaged: its parts are larger than the file")
        order = f"{folder}byteorder"
        if order in sizes and archive.read(order) != b"little":
            raise CheckpointError("written on a big-endian machine, which is not supported")

        def known(identity: Any) -> Any:
            found = arrays.storage(identity)
            if isinstance(found, arrays.Storage):
                size = sizes.get(f"{folder}data/{found.key}")
                if size is None:
                    raise CheckpointError(f"damaged: storage {found.key} is missing")
                if found.nbytes > size:
                    raise CheckpointError(f"damaged: storage {found.key} is cut short")
            return found

        with archive.open(pickles[0]) as file:
            tree = inert.load(file, reduce=arrays.reduce, persistent=known)

    def stored(storage: arrays.Storage) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(f"{folder}data/{storage.key}")

    return Content(path, "torch", tree, records.opaque_names(tree), _reader(path, stored))


def _pickle(path: Path, file: IO[bytes]) -> Content:
    """A pickle of arrays, or torch's format from before 1.6: five pickles, then the storages."""
    tree = inert.load(file, reduce=arrays.reduce)
    if tree != _MAGIC:
        return Content(path, "pickle", tree, records.opaque_names(tree), _plain)
    inert.load(file)  # version of the protocol
    inert.load(file)  # sizes of numbers on the machine that wrote it
    storages: dict[str, arrays.Storage] = {}
    left = path.stat().st_size

    def known(identity: Any) -> Any:
        nonlocal left
        found = arrays.storage(identity)
        if isinstance(found, arrays.Storage) and storages.setdefault(found.key, found) is found:
            left -= found.nbytes
            if left < 0:
                raise CheckpointError("incomplete or damaged (a storage of impossible size)")
        return found

    tree = inert.load(file, reduce=arrays.reduce, persistent=known)
    starts: dict[str, int] = {}
    for key in inert.load(file):
        (elements,) = struct.unpack("<q", file.read(8))
        found = storages.get(str(key))
        if found is None or elements != found.elements:
            raise CheckpointError("damaged (a storage of impossible size)")
        starts[str(key)] = file.tell()
        file.seek(found.nbytes, 1)
    if file.tell() > path.stat().st_size:
        raise CheckpointError("incomplete, its end is missing: download or copy it again")

    def stored(storage: arrays.Storage) -> bytes:
        with open(path, "rb") as again:
            again.seek(starts[storage.key])
            return again.read(storage.nbytes)

    return Content(path, "torch", tree, records.opaque_names(tree), _reader(path, stored))


def _reader(path: Path, stored: Callable[[arrays.Storage], bytes]) -> Callable[[Any], Tensor]:
    """From a leaf to its tensor; the bytes are read when they are asked for."""

    held: dict[str, Tensor] = {}  # storage -> its bytes: several tensors may share one

    def tensor(leaf: Any) -> Tensor:
        if not isinstance(leaf, arrays.View):
            return _plain(leaf)
        key = leaf.storage.key
        try:
            if key not in held:
                data = bytearray(stored(leaf.storage))
                held[key] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0)
            if math.prod(leaf.size) == 0:
                return torch.empty(leaf.size, dtype=leaf.dtype)
            return leaf.tensor(held[key])
        except (ValueError, LookupError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error

    return tensor


def _plain(leaf: Any) -> Tensor:
    if isinstance(leaf, arrays.Array):
        leaf = leaf.value
    return torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf.detach()
