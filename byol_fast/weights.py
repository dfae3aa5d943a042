"""The tensors of a backbone out of the files and folders that hold one; no pickle is executed."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from byol_fast import checkpoint
from byol_fast.errors import CheckpointError

log = logging.getLogger(__name__)

METADATA_KEY = "byol_fast"  # of the safetensors metadata
_ONLINE = "online.encoder.backbone."  # where a training checkpoint keeps the backbone
_STEP = re.compile(r"step-(\d{8,})\.pt")  # a checkpoint's name
_EXPORTS = ("exports/backbone.safetensors", "backbone.safetensors")  # in a run folder


@dataclass(frozen=True)
class Weights:
    """A backbone's tensors as read from `file`, and what the file says about them.

    A pretraining that is still running replaces and removes its files, so nothing here reads the
    path again.
    """

    file: Path
    tensors: dict[str, Tensor]  # torchvision's keys where it is a torchvision network
    meta: dict[str, Any]  # {} for a plain state dict, which describes nothing
    sha256: str = ""  # of the very bytes that `tensors` were read from

    @property
    def folder(self) -> Path:
        """Where results of these weights go: the run folder for a checkpoint of a run, whose own
        folder belongs to the pretraining; else the folder of the file."""
        own = self.file.parent
        of_a_run = own.name == "checkpoints" and _STEP.fullmatch(self.file.name)
        return own.parent if of_a_run else own

    @cached_property
    def tensors_sha256(self) -> str:
        """The same for every file that holds these tensors: a checkpoint, its exports."""
        total = hashlib.sha256()
        named = {key.removeprefix("net."): value for key, value in self.tensors.items()}
        for key in sorted(named):
            if not key.endswith("num_batches_tracked"):  # exports add it where it is missing
                value = named[key].detach().cpu().contiguous()
                total.update(f"{key} {value.dtype} {[*value.shape]}".encode())
                total.update(value.reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()


def read_weights(path: Path | str) -> Weights:
    """The backbone's tensors in a file or run folder; raises as `export.load_backbone` does."""
    path = Path(path).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist: name an exported backbone (.safetensors, .pth), a run folder "
            "or a checkpoint (step-*.pt)"
        )
    if checkpoint.has_hash(path):  # under other names a `.sha256` is somebody else's
        return _from_checkpoint(path)
    return _from_bytes(path, _bytes(path))


def _from_bytes(path: Path, data: bytes) -> Weights:
    """An exported backbone, or a checkpoint that came without its hash file."""
    if path.suffix == ".safetensors":
        return _from_safetensors(path, data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise CheckpointError(
            f"{path} is not a file of plain tensors and was not loaded, nothing in it was "
            f"executed: it is damaged, or a pickle of program objects ({_first_line(error)}). "
            + (foreign(path) or "Export the weights again as .safetensors or as a state dict")
        ) from error
    if isinstance(content, dict) and "hyper" in content and "model" in content:
        return _from_training(path, content, _sha256(data))
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        found = f"with the keys {some(content)}" if isinstance(content, dict) else ""
        raise CheckpointError(
            f"{path} holds a {type(content).__name__} {found}, not a state dict. "
            + (foreign(path) or "Save the backbone's own state_dict()")
        )
    return Weights(path, content, {}, _sha256(data))


def foreign(path: Path, keys: Iterable[str] | None = None) -> str:
    """How to import a file of another project; "" if it is none, or one that is not known."""
    from byol_fast.interop import describe, layouts  # which import this module

    if keys is None:
        return describe.hint(path)
    cleaned = layouts.clean(keys)
    found = layouts.find(cleaned.values())
    as_it_is = all(key == name for key, name in cleaned.items())
    if found is None or (found.name == "torchvision" and as_it_is):
        return ""
    return describe.hint(path)


def _from_folder(folder: Path) -> Weights:
    for name in _EXPORTS:
        if (folder / name).is_file():
            return _from_safetensors(folder / name, _bytes(folder / name))
    for checkpoints in (folder / "checkpoints", folder):
        if (weights := _newest(checkpoints)) is not None:
            return weights
    raise CheckpointError(
        f"{folder} holds no weights: neither {_EXPORTS[0]} nor checkpoints/step-*.pt is there. "
        "Name a run folder, or a weights file"
    )


def _newest(folder: Path) -> Weights | None:
    """Of the newest checkpoint that is whole; None where there is none at all."""
    refused: dict[Path, CheckpointError] = {}
    # Listed anew each time: the run that writes here may rotate away what was listed before.
    while path := next((p for p in _checkpoints(folder) if p not in refused), None):
        try:
            return _from_checkpoint(path)
        except CheckpointError as error:
            log.warning("skipped %s", error)
            refused[path] = error
    if not refused:
        return None
    listed = "\n  ".join(map(str, refused.values()))
    raise CheckpointError(f"no checkpoint in {folder} can be loaded:\n  {listed}")


def _checkpoints(folder: Path) -> list[Path]:
    """The newest step first."""
    named = {path: _STEP.fullmatch(path.name) for path in folder.glob("step-*.pt")}
    steps = {path: int(match[1]) for path, match in named.items() if match}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def _from_checkpoint(path: Path) -> Weights:
    """A checkpoint of pretraining, read once and compared with the hash beside it."""
    data, hash_path = _bytes(path), path.with_name(path.name + ".sha256")
    try:
        expected = hash_path.read_bytes().strip()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: its hash file {hash_path.name} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{hash_path}: cannot be read: {error.strerror}") from error
    if (digest := _sha256(data)).encode() != expected:  # it may be damaged itself
        raise CheckpointError(f"{path}: content does not match {hash_path.name}: damaged")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read as plain data: {error}") from error
    if not isinstance(state, dict) or state.get("format") != checkpoint.FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this program (format {checkpoint.FORMAT})"
        )
    return _from_training(path, state, digest)


def _from_safetensors(path: Path, data: bytes) -> Weights:
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        meta = dict(json.loads((header.get("__metadata__") or {}).get(METADATA_KEY, "{}")))
    except (safetensors.SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: damaged or incomplete ({_first_line(error)}). "
            "Export or copy it again"
        ) from error
    digest = _sha256(data)
    if any(key.startswith(_ONLINE) for key in tensors):  # a full state: interop/state.py
        state = {"model": tensors, "hyper": meta, "step": meta.get("steps")}
        return _from_training(path, state, digest)
    return Weights(path, tensors, meta, digest)


def _from_training(path: Path, state: dict[str, Any], digest: str) -> Weights:
    tensors = {
        key.removeprefix(_ONLINE): value
        for key, value in state.get("model", {}).items()
        if key.startswith(_ONLINE)
    }
    if not tensors or "hyper" not in state:
        raise CheckpointError(
            f"{path} holds no backbone (no key begins with {_ONLINE}): it is no checkpoint of "
            "pretraining. Name a run folder, or an exported backbone"
        )
    return Weights(path, tensors, {**state["hyper"], "steps": state.get("step")}, digest)


def _bytes(path: Path) -> bytes:
    """The whole file, in one reading: what is hashed and what is loaded cannot differ."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def some(names: Any, most: int = 3) -> str:
    """The first of `names`, for a message."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (", …" if len(listed) > most else "")


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    # torch's own reason comes last: before it, it advises to read the file with less care
    text = text.rpartition("WeightsUnpickler error: ")[2]
    return text.strip().splitlines()[0][:200]
