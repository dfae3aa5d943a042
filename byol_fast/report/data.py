"""What a report is made of: a run folder's files, each of which may be missing, old or torn."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from byol_fast.arguments import safe_yaml
from byol_fast.watching import metrics
from byol_fast.watching.metrics import Event, Log
from pipelines import npz

MAX_POINTS = 2000  # drawn of an embedding

# keys of summary.json: results of the kNN evaluations, shares of 1
KNN_RAW, KNN_UNTRAINED, KNN_TRAINED = "knn_raw_pixels", "knn_untrained", "knn_trained"
KNN_DATA = "knn_data"  # words on the images they were measured on
RATE, RATE_PER_GPU = "images_per_second", "images_per_second_per_gpu"
QUARANTINED = "quarantined"  # number of images left out before training
BAD_IMAGES = "bad_images"  # {name: reason} of those that failed while training
THROUGHPUT = "throughput"  # {part of THROUGHPUT_PARTS: seconds}
THROUGHPUT_PARTS = {
    "decode_wait": "Waiting for the loader (read, decode, crop)",
    "copy": "Copy to the device",
    "augment": "Augmentation",
    "step": "Training step",
}


@dataclass
class Embedding:
    """Embeddings in a plane: `xy` [n, 2], `labels` [n] (-1 unknown), shares of the variance."""

    xy: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    explained: tuple[float, float] | None


@dataclass
class RunData:
    """A run folder, read. `notes` says which files could not be read and why."""

    name: str
    log: Log
    config: dict[str, Any]
    summary: dict[str, Any]
    status: dict[str, Any]
    views: npt.NDArray[np.uint8] | None  # [2, n, S, S, 3]
    embedding: Embedding | None
    notes: list[str] = field(default_factory=list)

    def number(self, name: str) -> float | None:
        """A finite number of summary.json."""
        value = self.summary.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        return float(value) if math.isfinite(value) else None

    @property
    def images_per_second(self) -> float | None:
        """Of the whole training where it was summed up, else the median of the log points."""
        return self.number(RATE) or self.usual(metrics.IMAGES_PER_SECOND)

    @property
    def images_per_second_per_gpu(self) -> float | None:
        return self.number(RATE_PER_GPU) or self.usual(metrics.IMAGES_PER_SECOND_PER_GPU)

    @property
    def embedding_dim(self) -> int:
        """Size of the projections that the gauges watch."""
        model = self.config.get("model")
        size = model.get("output_size") if isinstance(model, Mapping) else None
        return size if isinstance(size, int) and size > 0 else 256

    @property
    def alarms(self) -> list[Event]:
        return [e for e in self.log.events if e.kind in ("alarm", "diverged", "not-finite")]

    def usual(self, name: str) -> float | None:
        """Median of a logged quantity without its first value, which holds the warming up."""
        values = [v for v in self.log.series(name)[1] if math.isfinite(v)]
        return float(np.median(values[1:] or values)) if values else None


def load(run: Path) -> RunData:
    """Read the run folder at `run`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"no run folder at {run}; give the --out of a pretraining run")
    notes: list[str] = []
    data = RunData(
        name=run.resolve().name,
        log=metrics.read(run / "metrics.jsonl"),
        config=_yaml(run / "config.yaml", notes),
        summary=_json(run / "summary.json", notes),
        status=_json(run / "status.json", notes),
        views=_views(run / "views.npz", notes),
        embedding=_embedding(run / "embedding.npz", notes),
        notes=notes,
    )
    return data


def flatten(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """A nested configuration as sections of (name, value) pairs, plain values first."""
    general = [(k, _plain(v)) for k, v in config.items() if not isinstance(v, Mapping)]
    sections = [("general", general)] if general else []
    for name, part in config.items():
        if isinstance(part, Mapping) and part:
            sections.append((str(name), [(str(k), _plain(v)) for k, v in part.items()]))
    return sections


def _plain(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ", ".join(map(_plain, value)) or "–"
    return str(value) or "–"


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} could not be read: {error}")
        return {}
    return content if isinstance(content, dict) else {}


def _yaml(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    import yaml

    try:
        content = safe_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path.name} could not be read: {error}")
        return {}
    return content if isinstance(content, dict) else {}


def _npz(path: Path, notes: list[str]) -> dict[str, npt.NDArray[Any]]:
    if not path.exists():
        return {}
    try:
        with npz.load(path) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        notes.append(f"{path.name} could not be read: {error}")
        return {}


def _views(path: Path, notes: list[str]) -> npt.NDArray[np.uint8] | None:
    views = _npz(path, notes).get("views")
    if views is None:
        return None
    fits = views.ndim == 5 and views.shape[0] == 2 and views.shape[-1] == 3
    if not fits or views.dtype != np.uint8 or 0 in views.shape:
        notes.append(
            f"{path.name} holds {views.dtype} {list(views.shape)}, not uint8 [2, n, S, S, 3]"
        )
        return None
    return views


def _embedding(path: Path, notes: list[str]) -> Embedding | None:
    arrays = _npz(path, notes)
    points = arrays.get("pca", arrays.get("features"))
    if points is None:
        return None
    if points.ndim != 2 or points.shape[1] < 2 or len(points) < 3:
        notes.append(f"{path.name} holds {list(points.shape)}, not [n >= 3, d >= 2]")
        return None
    labels = arrays.get("labels", np.full(len(points), -1)).astype(np.int64).reshape(-1)
    if len(labels) != len(points):
        labels = np.full(len(points), -1, dtype=np.int64)
    keep = np.flatnonzero(np.isfinite(points).all(axis=1))
    keep = keep[np.linspace(0, len(keep) - 1, min(len(keep), MAX_POINTS)).astype(np.int64)]
    if len(keep) < 3:
        notes.append(f"{path.name} holds no finite embeddings")
        return None
    classes = tuple(str(c) for c in arrays.get("classes", np.array([], dtype=str)).reshape(-1))
    points = points[keep].astype(np.float64)
    if "pca" in arrays:
        return Embedding(points[:, :2], labels[keep], classes, None)
    xy, explained = pca(points)
    return Embedding(xy, labels[keep], classes, explained)


def pca(
    points: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], tuple[float, float]]:
    """First two principal components of `points` [n, d] and their shares of the variance.

    By subspace iteration: 1.5 s where a full decomposition of 2000 × 2048 took 55 s. Start and
    signs (the largest loading is positive) are fixed: the same data give the same picture.
    """
    centred = points - points.mean(axis=0)
    width = min(12, *centred.shape)
    basis = centred @ np.random.default_rng(0).standard_normal((centred.shape[1], width))
    for _ in range(8):
        basis, _ = np.linalg.qr(centred @ (centred.T @ np.linalg.qr(basis)[0]))
    _, values, axes = np.linalg.svd(basis.T @ centred, full_matrices=False)
    axes = axes[:2] * np.sign(axes[np.arange(2), np.abs(axes[:2]).argmax(axis=1)])[:, None]
    total = float((centred**2).sum()) or 1.0
    shares = values[:2] ** 2 / total
    return centred @ axes.T, (float(shares[0]), float(shares[1]))
