"""What `detect` and `segment` share: flags, the recipe they change, and where training is kept."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from byol_fast.evaluate import record
from byol_fast.evaluate.commands import common
from byol_fast.evaluate.dense.recipes import PUBLISHED, Recipe
from byol_fast.evaluate.published import Published
from pipelines.cores import worker_threads

if TYPE_CHECKING:
    from byol_fast.evaluate.dense.loop import Trained

R = TypeVar("R", bound=Recipe)


def flags(parser: argparse.ArgumentParser, protocols: dict[str, R], data: str) -> None:
    """The command line."""
    common.network_flags(parser)
    parser.set_defaults(image_size=None, backend="torch")  # the recipe has sizes, torch decodes
    add = parser.add_argument
    add("--data", required=True, help=data)
    add("--protocol", choices=list(protocols), default=next(iter(protocols)), help="the recipe")
    add("--quick", action="store_true", help="small images, few iterations, no protocol")
    add("--train-sets", nargs="+", metavar="SET", help="instead of the protocol's")
    add("--test-set", metavar="SET", help="instead of the protocol's")
    add("--iterations", type=int, help="instead of the protocol's; its steps are scaled")
    add("--batch-size", type=int, help="instead of the protocol's; the lr follows it")
    add("--lr", type=float, help="peak learning rate, instead of the protocol's")
    add("--seed", type=int, default=0, help="of order, augmentation and first weights")
    add("--save-every", type=int, default=500, help="iterations between two checkpoints")
    common.out_flag(parser)


def recipe(args: argparse.Namespace, base: R) -> R:
    """The recipe with what the command line changes in it; raises ValueError for a bad value."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this task trains in one process: start it with python -m, not torchrun")
    if args.save_every < 1:
        raise ValueError(f"--save-every must be at least 1, got {args.save_every}")
    return base.changed(iterations=args.iterations, batch_size=args.batch_size, lr=args.lr)


def sets(args: argparse.Namespace, base: Recipe) -> tuple[tuple[str, ...], str]:
    """The names of the training sets and of the test set."""
    return tuple(args.train_sets or base.train_sets), args.test_set or base.test_set


def title(args: argparse.Namespace, base: Recipe) -> str:
    """The table's name of the row, with what was changed."""
    asked = {
        "iterations": args.iterations,
        "batch": args.batch_size,
        "lr": args.lr,
        "training sets": args.train_sets and " + ".join(args.train_sets),
        "test set": args.test_set,
    }
    changed = ", ".join(f"{key} {value}" for key, value in asked.items() if value is not None)
    name = f"quick {base.title} (not a published protocol)" if args.quick else base.title
    return f"{name} with {changed}" if changed else name


def published(args: argparse.Namespace, key: str) -> Published | None:
    """The figure of `recipes.PUBLISHED` to stand beside; none beside a quick try."""
    return None if args.quick else PUBLISHED.get(key)


def is_published(args: argparse.Namespace) -> bool:
    """Whether the protocol is left as it was published."""
    changes = (args.iterations, args.batch_size, args.lr, args.train_sets, args.test_set)
    return not args.quick and all(value is None for value in changes)


def training(
    args: argparse.Namespace, recipe: Recipe, network: common.Network, train: str, where: Path
) -> dict[str, Any]:
    """The arguments of `detect.fit` and `segment.fit` beside the network, the sets and the recipe.

    Args:
        train: the fingerprint of the training set.
        where: of the result; the checkpoints lie beside it.
    """
    return {
        "mean": network.spec.mean,
        "std": network.spec.std,
        "device": network.device,
        "folder": where.with_name(where.name.removesuffix(".json") + ".checkpoints"),
        "identity": _identity(recipe, network, train, args.seed),
        "seed": args.seed,
        "threads": args.threads or worker_threads(),
        "save_every": args.save_every,
        "progress": True,
    }


def _identity(recipe: Recipe, network: common.Network, train: str, seed: int) -> dict[str, Any]:
    """What a checkpoint must agree in to be gone on from; JSON values."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()}
    normalisation = {"mean": list(network.spec.mean), "std": list(network.spec.std)}
    about = {"weights": network.weights.sha256, "train_fingerprint": train, "seed": seed}
    return {**settings, **normalisation, **about}


def provenance(
    args: argparse.Namespace,
    network: common.Network,
    names: tuple[tuple[str, ...], str],
    fingerprints: tuple[str, str],
) -> dict[str, Any]:
    """What the figures belong to. The sizes of images are the recipe's, and stand there."""
    from byol_fast.evaluate.decoding import DECODERS

    about = record.about(args, network)
    del about["image_size"]
    data = {
        "train": args.data,
        "train_sets": list(names[0]),
        "train_fingerprint": fingerprints[0],
        "test": args.data,
        "test_set": names[1],
        "test_fingerprint": fingerprints[1],
    }
    reading = {"decoder": DECODERS["torch"], "resizing": "bilinear, not antialiased (torch)"}
    return {**about, "reading": reading, "data": data}


def trained(outcome: Trained, test_images_per_second: float) -> dict[str, Any]:
    """The result file's part on training."""
    return {
        "final_loss": outcome.final_loss,
        "resumed_at": outcome.resumed_at,
        "images_per_second": outcome.images_per_second,
        "test_images_per_second": test_images_per_second,
    }
