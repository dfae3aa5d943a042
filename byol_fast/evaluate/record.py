"""The result file: what was measured, on which weights and images, by which recipe."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_fast._version import __version__

if TYPE_CHECKING:
    import torch

    from byol_fast.evaluate.data import Labelled
    from byol_fast.export import Weights


def result_path(args: argparse.Namespace, weights: Weights, labelled: Labelled) -> Path:
    """Beside the weights unless --out says otherwise; data and recipe are in the name.

    Raises:
        ValueError: it could not be written there; better known before an hour of training.
    """
    recipe = "knn" if args.task == "knn" else f"linear-{'quick' if args.quick else args.protocol}"
    name = f"{weights.file.stem}.{recipe}-{labelled.test.fingerprint[:8]}.json"
    where = Path(args.out or weights.file.with_name(name))
    where.parent.mkdir(parents=True, exist_ok=True)
    if where.is_dir() or not os.access(where.parent, os.W_OK):
        raise ValueError(f"the result cannot be written to {where}: name a file with --out")
    return where


def provenance(
    args: argparse.Namespace, weights: Weights, labelled: Labelled, common: dict[str, Any]
) -> dict[str, Any]:
    """What the figures belong to."""
    import torch

    device: torch.device = common["device"]
    on_gpu = device.type == "cuda"
    return {
        "task": args.task,
        "weights": {
            "file": str(weights.file),
            "sha256": weights.sha256,
            "backbone": args.backbone or weights.meta.get("backbone"),
            "stem": args.stem or weights.meta.get("stem", "imagenet"),
        },
        "data": {
            "train": args.data,
            "train_fingerprint": labelled.train.fingerprint,
            "test": args.test_data,
            "test_fingerprint": labelled.test.fingerprint,
            "tested_on": labelled.source,
            "classes": len(labelled.classes),
        },
        "image_size": common["image_size"],
        "mean": common["spec"].mean,
        "std": common["spec"].std,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "precision": "bf16" if on_gpu else "fp32",
        "versions": {"byol_fast": __version__, "torch": str(torch.__version__)},
    }


def write(where: Path, result: dict[str, Any]) -> None:
    """The file at once or not at all."""
    from byol_fast.checkpoint import write_text

    write_text(where, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
