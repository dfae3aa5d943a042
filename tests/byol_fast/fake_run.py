"""A run folder with made-up but plausible files, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import yaml

DIM = 256
HEALTHY = 1 / math.sqrt(DIM)
CLASSES = (
    "tench & <b>fish</b>",
    "springer",
    "cassette player",
    "chain saw",
    "church",
    "French horn",
    "garbage truck",
    "gas pump",
    "golf ball",
    'parachute "red"',
)


def log_rows(steps: int = 1200, every: int = 10, *, collapse: bool = False) -> list[dict]:
    """Lines of metrics.jsonl as a healthy (or collapsing) run would leave them."""
    rng = np.random.default_rng(0)
    rows: list[dict] = [{"step": 0, "epoch": 0.0, "knn_accuracy": 0.412}]
    for step in range(every, steps + 1, every):
        part = step / steps
        spread = 0.74 + 0.03 * rng.standard_normal()
        rank = 60 + 40 * part + 2 * rng.standard_normal()
        loss = 0.9 + 3.1 * math.exp(-4 * part) + 0.06 * rng.standard_normal()
        if collapse:
            spread, rank, loss = 0.8 * math.exp(-12 * part), 60 * math.exp(-8 * part) + 1, 0.02
        rows.append(
            {
                "step": step,
                "epoch": 30 * part,
                "loss": loss,
                "lr": 0.4 * min(10 * part, 0.5 * (1 + math.cos(math.pi * part))),
                "target_decay": 1 - 0.01 * (math.cos(math.pi * part) + 1) / 2,
                "grad_norm": 0.3 + 2 * math.exp(-5 * part) + 0.1 * rng.random(),
                "embedding_std": spread * HEALTHY,
                "rankme": rank,
                "alignment": 0.9 - 0.5 * part + 0.02 * rng.standard_normal(),
                "uniformity": -2.2 - 1.1 * part + 0.02 * rng.standard_normal(),
                "probe_loss": 1.9 - part,
                "time/images_per_second": 512 + 8 * rng.standard_normal(),
                "time/images_per_second_per_gpu": 256 + 4 * rng.standard_normal(),
                "time/data_wait_share": 0.06 + 0.02 * rng.random(),
                "time/elapsed": 0.12 * step,
            }
        )
        if step % (steps // 6) == 0:
            knn = 0.41 if collapse else 0.78 - 0.37 * math.exp(-3 * part)
            rows.append({"step": step, "knn_accuracy": knn, "probe_accuracy": knn - 0.04})
    return rows


def views(count: int = 16, size: int = 64) -> np.ndarray:
    """Pictures of coloured shapes, and the same flipped and tinted: uint8 [2, count, S, S, 3]."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:size, 0:size] / size
    first = np.zeros((count, size, size, 3))
    for i in range(count):
        low, high, middle = rng.random(3), rng.random(3), rng.random(2)
        first[i] = low + (high - low) * ((x + y) / 2)[..., None]
        inside = (x - middle[0]) ** 2 + (y - middle[1]) ** 2 < 0.06 + 0.06 * rng.random()
        first[i][inside] = rng.random(3)
    second = np.clip(first[:, :, ::-1] * (0.6 + 0.8 * rng.random((count, 1, 1, 3))), 0, 1)
    return (255 * np.stack([first, second])).astype(np.uint8)


def features(count: int = 600, dim: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [count, dim] in ten clusters, and their labels."""
    rng = np.random.default_rng(2)
    centres = 1.6 * rng.standard_normal((len(CLASSES), dim))
    labels = rng.integers(0, len(CLASSES), count)
    return (centres[labels] + rng.standard_normal((count, dim))).astype(np.float32), labels


CONFIG = {
    "data": "/data/imagenette/<train>",
    "out": "runs/imagenette",
    "recipe": "imagenet",
    "epochs": 30,
    "batch_size": 256,
    "backbone": "resnet18",
    "image_size": 64,
    "seed": 0,
    "input": {"semantics": "deepmind", "blur": None, "flip": 0.5, "verify": True},
    "optim": {"base_lr": 0.4, "weight_decay": 1e-6, "momentum": 0.9, "norm": "update"},
    "model": {"stem": "cifar", "hidden_size": 4096, "output_size": DIM, "bn_sync": False},
    "monitor": {"eval_every": 5, "log_every": 10, "tensorboard": True, "on_collapse": "warn"},
    "checkpoint": {"every_minutes": 15.0, "keep": 2},
}


def make(run: Path, *, collapse: bool = False, size: int = 64) -> Path:
    """Fill the folder `run` with everything a report can show."""
    run.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in log_rows(collapse=collapse)]
    lines.append(json.dumps({"step": 400, "event": "resume", "text": "resumed on 2 ranks"}))
    if collapse:
        text = "The spread of the embeddings is 0.01, <i>20 %</i> of the healthy 1/√256"
        lines.append(json.dumps({"step": 190, "event": "alarm", "text": text}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    np.savez(run / "views.npz", views=views(size=size))
    points, labels = features()
    np.savez(run / "embedding.npz", features=points, labels=labels, classes=np.array(CLASSES))
    summary = {
        "knn_raw_pixels": 0.468,
        "knn_untrained": 0.412,
        "knn_trained": 0.41 if collapse else 0.762,
        "knn_data": "a fifth of the training images, held back by name",
        "throughput": {"decode_wait": 9.4, "copy": 1.2, "augment": 17.9, "step": 115.5},
    }
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    status = {"state": "done", "step": 1200, "total_steps": 1200, "reason": ""}
    (run / "status.json").write_text(json.dumps(status), encoding="utf-8")
    return run
