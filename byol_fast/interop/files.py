"""Any weights file to plain data: safetensors, torch's formats, pickles of arrays."""

from __future__ import annotations

import json
import logging
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

from byol_fast.errors import CheckpointError
from byol_fast.interop import arrays, inert, records

log = logging.getLogger(__name__)

_MAGIC = 0x1950A86A20F9469CFC6C  # begins torch's format from before 1.6
_ALIGNED = 1 << 40  # a storage above a TiB is a damaged number


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
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {kind}: name a weights file (.pth, .pt, .ckpt, .pkl, …)")
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        if (tree := _plain_torch(path)) is not None:
            return Content(path, "torch", tree)
        if zipfile.is_zipfile(path):
            return _zip(path)
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise CheckpointError("incomplete, its end is missing: download or copy it again")
            file.seek(0)
            return _pickle(path, file)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} was not loaded, and nothing in it was executed: {error}"
        ) from error
    except (OSError, zipfile.BadZipFile, struct.error, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


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
        except Exception as error:  # a damaged file can raise nearly anything
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
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError("a zip file, but not one that torch.save wrote")
        folder = pickles[0].removesuffix("data.pkl")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise CheckpointError("torch's zip files are not compressed, this one is")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise CheckpointError("written on a big-endian machine, which is not supported")
        with archive.open(pickles[0]) as file:
            tree = inert.load(file, reduce=arrays.reduce, persistent=arrays.storage)

    def stored(storage: arrays.Storage) -> bytes:
        with zipfile.ZipFile(path) as archive:
            try:
                return archive.read(f"{folder}data/{storage.key}")
            except KeyError as error:
                raise CheckpointError(f"{path}: storage {storage.key} is missing") from error
            except zipfile.BadZipFile as error:
                raise CheckpointError(f"{path} is damaged: {error}") from error

    return Content(path, "torch", tree, records.opaque_names(tree), _reader(path, stored))


def _pickle(path: Path, file: IO[bytes]) -> Content:
    """A pickle of arrays, or torch's format from before 1.6: five pickles, then the storages."""
    tree = inert.load(file, reduce=arrays.reduce)
    if tree != _MAGIC:
        return Content(path, "pickle", tree, records.opaque_names(tree), _plain)
    inert.load(file)  # version of the protocol
    inert.load(file)  # sizes of numbers on the machine that wrote it
    tree = inert.load(file, reduce=arrays.reduce, persistent=arrays.storage)
    keys = inert.load(file)
    starts: dict[str, int] = {}
    sizes = {view.storage.key: view.storage.dtype.itemsize for view in _views(tree)}
    for key in keys:
        (elements,) = struct.unpack("<q", file.read(8))
        if not 0 <= elements < _ALIGNED or str(key) not in sizes:
            raise CheckpointError("damaged (a storage of impossible size)")
        starts[str(key)] = file.tell()
        file.seek(elements * sizes[str(key)], 1)

    def stored(storage: arrays.Storage) -> bytes:
        with open(path, "rb") as again:
            again.seek(starts[storage.key])
            return again.read(storage.elements * storage.dtype.itemsize)

    return Content(path, "torch", tree, records.opaque_names(tree), _reader(path, stored))


def _views(tree: Any) -> list[arrays.View]:
    """All tensors below `tree`."""
    found, seen, todo = [], set(), [tree]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, arrays.View):
            found.append(value)
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        elif isinstance(value, records.Opaque):
            todo += [*value.args, value.state, value.items]
    return found


def _reader(path: Path, stored: Callable[[arrays.Storage], bytes]) -> Callable[[Any], Tensor]:
    """From a leaf to its tensor; the bytes are read when they are asked for."""

    def tensor(leaf: Any) -> Tensor:
        if not isinstance(leaf, arrays.View):
            return _plain(leaf)
        data = bytearray(stored(leaf.storage))
        if not data:
            return torch.empty(leaf.size, dtype=leaf.dtype)
        try:
            return leaf.tensor(torch.frombuffer(data, dtype=torch.uint8))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error

    return tensor


def _plain(leaf: Any) -> Tensor:
    if isinstance(leaf, arrays.Array):
        leaf = leaf.value
    return torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf.detach()
