"""Features of a whole data set as one `.npy`, written in place, so that memory is no limit.

A folder holds `features.npy` [n, F], `names.txt` (line i names row i), `labels.npy` where there are
labels, and `about.json`. Until all rows are there the features are `features.npy.part`, and
`about.json` says how far they go: the same call goes on from there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from byol_fast.checkpoint import write_text
from byol_fast.evaluate.features import stream
from byol_fast.evaluate.parts import digest
from byol_fast.export import write_atomically
from pipelines.errors import DataError
from pipelines.stores import Store

EVERY_SECONDS = 30.0  # at most this much work is lost


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What was written."""

    file: Path
    rows: int
    width: int
    computed: int  # rows that this call computed; the others were there
    bad: dict[int, str]  # row -> reason; its features are NaN
    seconds: float


def embed(
    backbone: nn.Module,
    store: Store,
    folder: Path,
    *,
    key: Mapping[str, Any],
    dtype: str = "float32",
    **reading: Any,
) -> Embedding:
    """Write the features of every row of `store`, or the rest of them.

    Args:
        key: all that the features depend on, JSON values; a folder of another key is refused.
        dtype: `float32` or `float16`.
        reading: as in `features.stream`.

    Raises:
        ValueError: the folder holds other features.
        DataError: no image could be decoded.
        OSError: it cannot be written, or the disk has no room for it.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    about = _open(folder, {**key, "dtype": dtype})
    done = start = int(about["done"])
    bad = {int(row): str(reason) for row, reason in about["bad"].items()}
    final = folder / "features.npy"
    part = final.with_name("features.npy.part")
    if done == len(store) and final.is_file():
        shape = np.load(final, mmap_mode="r", allow_pickle=False).shape
        return Embedding(
            file=final, rows=shape[0], width=shape[1], computed=0, bad=bad, seconds=0.0
        )
    out = _reopen(part, len(store)) if done else None
    said = time.perf_counter()
    for rows, batch, wrong in stream(backbone, store, start=done, **reading):
        if out is None:
            out = _make(part, (len(store), batch.shape[1]), dtype)
        out[rows.start : rows.stop] = _values(batch, [row - rows.start for row in wrong])
        bad.update(wrong)
        done = rows.stop
        if time.perf_counter() - said > EVERY_SECONDS or done == len(store):
            _flush(out)
            _say(folder, about, done, bad)
            said = time.perf_counter()
    assert out is not None  # a store has at least one row
    if len(bad) == len(store):
        raise DataError(f"none of the {len(store)} images could be decoded: {bad[0]}")
    _finish(folder, store)
    os.replace(part, final)
    seconds, width = time.perf_counter() - started, out.shape[1]
    return Embedding(
        file=final,
        rows=len(store),
        width=width,
        computed=len(store) - start,
        bad=bad,
        seconds=seconds,
    )


def _open(folder: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """`about.json` as it is, or a new one where there is none."""
    path, name = folder / "about.json", digest(key)
    fresh = {"key": name, "of": json.loads(json.dumps(key, default=str)), "done": 0, "bad": {}}
    if not path.is_file():
        if (folder / "features.npy").exists():
            raise ValueError(f"{folder} holds features of something else: name another folder")
        return fresh
    try:
        about = dict(json.loads(path.read_text(encoding="utf-8")))
        if about["key"] != name:
            raise ValueError("they are of other images, weights or settings")
        files = [folder / "features.npy", folder / "features.npy.part"]
        return about if not about["done"] or any(map(Path.is_file, files)) else fresh
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{folder} holds features already that this call would not go on with ({error}): name "
            "another folder, or remove it"
        ) from error


def _make(path: Path, shape: tuple[int, int], dtype: str) -> npt.NDArray[Any]:
    """An array in a file whose room is reserved: a full disk is an error now, not a bus error."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with open(path, "rb+") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(
                f"{path}: no room for {shape[0]:,} × {shape[1]} features "
                f"({out.nbytes / 2**30:.1f} GiB): {error.strerror}"
            ) from error
    return out


def _reopen(path: Path, rows: int) -> npt.NDArray[Any]:
    try:
        out: npt.NDArray[Any] = np.load(path, mmap_mode="r+", allow_pickle=False)
        if out.ndim != 2 or len(out) != rows:
            raise ValueError(f"its shape is {out.shape}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be gone on with ({error}): remove its folder, or name another"
        ) from error
    return out


def _values(batch: Tensor, wrong: list[int]) -> npt.NDArray[Any]:
    if wrong:
        batch = batch.clone()
        batch[wrong] = float("nan")
    return batch.numpy()


def _flush(out: npt.NDArray[Any]) -> None:
    assert isinstance(out, np.memmap)
    out.flush()


def _say(folder: Path, about: dict[str, Any], done: int, bad: dict[int, str]) -> None:
    told = {**about, "done": done, "bad": {str(row): reason for row, reason in bad.items()}}
    write_text(folder / "about.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def _finish(folder: Path, store: Store) -> None:
    """Names and labels, before the features get their name."""
    names = "".join(f"{store.name(row)}\n" for row in range(len(store)))
    write_text(folder / "names.txt", names)
    labels = np.asarray(store.labels)
    if len(labels) and labels.max() >= 0:
        write_atomically(folder / "labels.npy", lambda path: _save(path, labels))
        write_text(folder / "classes.txt", "".join(f"{name}\n" for name in store.classes))


def _save(path: Path, values: npt.NDArray[Any]) -> None:
    with open(path, "wb") as file:  # np.save would add a suffix to the name
        np.save(file, values)
