"""The tensors of a backbone out of the files and folders that hold one; no pickle is executed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from byol_fast import checkpoint, filekinds, filemeta
from byol_fast.errors import CheckpointError
from byol_fast.interop import files

METADATA_KEY = "byol_fast"  # of the safetensors metadata
_ONLINE = "online.encoder.backbone."  # where a training checkpoint keeps the backbone
_EXPORTS = ("exports/backbone.safetensors", "backbone.safetensors")  # in a run folder


@dataclass(frozen=True)
class Weights:
    """A backbone's tensors as read from `file`, and what the file says about them."""

    file: Path
    tensors: dict[str, Tensor]  # torchvision's keys where it is a torchvision network
    meta: dict[str, Any]  # {} for a plain state dict, which describes nothing

    @property
    def sha256(self) -> str:
        return checkpoint.file_hash(self.file)


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
    filekinds.check(path)
    if path.suffix == ".safetensors" or filekinds.is_safetensors(path):
        return _from_safetensors(path)
    if checkpoint.has_hash(path):
        return _from_training(path, checkpoint.load(path))
    try:
        content = files.plain(path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise CheckpointError(
            f"{path} is not a file of plain tensors and was not loaded, nothing in it was "
            f"executed: it is damaged, or a pickle of program objects ({_first_line(error)}). "
            + (foreign(path) or "Export the weights again as .safetensors or as a state dict")
        ) from error
    if isinstance(content, dict) and "hyper" in content and "model" in content:
        return _from_training(path, content)
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        found = f"with the keys {some(content)}" if isinstance(content, dict) else ""
        raise CheckpointError(
            f"{path} holds a {type(content).__name__} {found}, not a state dict. "
            + (foreign(path) or "Save the backbone's own state_dict()")
        )
    return _plain(path, content)


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
            return _from_safetensors(folder / name)
    for checkpoints in (folder / "checkpoints", folder):
        if (state := checkpoint.latest(checkpoints)) is not None:
            return _from_training(checkpoints / f"step-{state['step']:08d}.pt", state)
    raise CheckpointError(
        f"{folder} holds no weights: neither {_EXPORTS[0]} nor checkpoints/step-*.pt is there. "
        "Name a run folder, or a weights file"
    )


def _from_safetensors(path: Path) -> Weights:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            meta = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (safetensors.SafetensorError, ValueError, TypeError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: damaged or incomplete ({_first_line(error)}). "
            "Export or copy it again"
        ) from error
    meta = filemeta.checked(meta, path)
    if meta and any(key.startswith(_ONLINE) for key in tensors):  # a full state: interop/state.py
        return _from_training(path, {"model": tensors, "hyper": meta, "step": meta.get("steps")})
    return Weights(path, tensors, meta) if meta else _plain(path, tensors)


def _plain(path: Path, tensors: dict[str, Tensor]) -> Weights:
    """A state dict that says nothing about itself; of a whole learner's, the online backbone."""
    online = {k.removeprefix(_ONLINE): v for k, v in tensors.items() if k.startswith(_ONLINE)}
    if all(key.startswith("net.") for key in online):  # HiddenOutput's prefix, which exports lack
        online = {key.removeprefix("net."): value for key, value in online.items()}
    return Weights(path, online or tensors, {})


def _from_training(path: Path, state: dict[str, Any]) -> Weights:
    model = state.get("model")
    tensors = {
        key.removeprefix(_ONLINE): value
        for key, value in (model.items() if isinstance(model, dict) else ())
        if isinstance(key, str) and key.startswith(_ONLINE) and isinstance(value, Tensor)
    }
    if not tensors or "hyper" not in state:
        raise CheckpointError(
            f"{path} holds no backbone (no key begins with {_ONLINE}): it is no checkpoint of "
            "pretraining. Name a run folder, or an exported backbone"
        )
    hyper = filemeta.checked(state["hyper"], path)
    return Weights(path, tensors, {**hyper, "steps": state.get("step")})


def some(names: Any, most: int = 3) -> str:
    """The first of `names`, for a message."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (", …" if len(listed) > most else "")


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    # torch's own reason comes last: before it, it advises to read the file with less care
    text = text.rpartition("WeightsUnpickler error: ")[2]
    return text.strip().splitlines()[0][:200]
