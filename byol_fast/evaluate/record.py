"""The result file: what was measured, on which weights and images, by which recipe."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_fast._version import __version__

if TYPE_CHECKING:
    from byol_fast.evaluate.commands.common import Network
    from byol_fast.evaluate.data import Labelled
    from byol_fast.export import Weights


def result_path(out: Path | None, weights: Weights, recipe: str, fingerprint: str) -> Path:
    """`out`, or a file in the weights' folder that has recipe and test data in its name.

    Raises:
        ValueError: it could not be written there; better known before an hour of training.
    """
    name = f"{weights.file.stem}.{recipe}-{fingerprint[:8]}.json"
    where = Path(out or weights.folder / name)
    where.parent.mkdir(parents=True, exist_ok=True)
    if where.is_dir() or not os.access(where.parent, os.W_OK):
        raise ValueError(f"the result cannot be written to {where}: name a file with --out")
    return where


def provenance(args: argparse.Namespace, network: Network, labelled: Labelled) -> dict[str, Any]:
    """What the figures belong to: weights, images, machine, versions."""
    from byol_fast.evaluate import decoding

    about_data = {
        "train": args.data,
        "train_fingerprint": labelled.train.fingerprint,
        "test": args.test_data,
        "test_fingerprint": labelled.test.fingerprint,
        "tested_on": labelled.source,
        "classes": len(labelled.classes),
    }
    reading = decoding.described(network.backend, labelled.test, network.device)
    return {**about(args, network), "reading": reading, "data": about_data}


def about(args: argparse.Namespace, network: Network) -> dict[str, Any]:
    """The same without the images, for a task that reads them in its own way."""
    import torch

    weights, on_gpu = network.weights, network.device.type == "cuda"
    return {
        "task": args.task,
        "weights": {
            "file": str(weights.file),
            "sha256": weights.sha256,
            "backbone": args.backbone or weights.meta.get("backbone"),
            "stem": args.stem or weights.meta.get("stem", "imagenet"),
        },
        "image_size": network.image_size,
        "mean": network.spec.mean,
        "std": network.spec.std,
        "device": torch.cuda.get_device_name(network.device) if on_gpu else "cpu",
        "precision": "bf16" if on_gpu else "fp32",
        "versions": {"byol_fast": __version__, "torch": str(torch.__version__)},
    }


def head_of(network: Network, crop: str) -> dict[str, Any]:
    """What a saved classifier says of itself: the network it is for, and what it was shown."""
    weights = network.weights
    return {
        "weights_sha256": weights.sha256,
        "weights_tensors_sha256": weights.tensors_sha256,
        "weights_file": weights.file.name,
        "image_size": network.image_size,
        "crop": crop,
    }


def write(where: Path, result: dict[str, Any]) -> None:
    """The file at once or not at all."""
    from byol_fast.checkpoint import write_text

    write_text(where, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
