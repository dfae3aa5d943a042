"""Accuracy of a linear classifier on the frozen network, by a published recipe."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from byol_fast.evaluate import protocols, published, record
from byol_fast.evaluate.commands import common
from byol_fast.evaluate.table import Row

if TYPE_CHECKING:
    from byol_fast.evaluate.cache import FeatureCache
    from byol_fast.evaluate.data import Labelled
    from byol_fast.evaluate.resume import Resume

QUICK_LABEL = "quick (cached centre crops, not a published protocol)"


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    common.weights_flags(parser)
    common.data_flags(parser)
    common.cache_flags(parser)
    add = parser.add_argument
    add("--protocol", choices=["paper", "mmpretrain"], default="paper", help="the recipe")
    add("--quick", action="store_true", help="a check on cached centre crops; no protocol")
    add("--epochs", type=int, help="instead of the protocol's")
    add("--batch-size", type=int, help="instead of the protocol's; the lr follows it")
    add("--base-lr", type=float, help="per 256 images, instead of the protocol's")
    add("--seed", type=int, default=0, help="of order, crops and first weights")


def run(args: argparse.Namespace) -> None:
    """Raises as `common.open_network`, `data.prepare` and `linear.fit`."""
    protocol = _protocol(args)  # complain before reading data
    from byol_fast.evaluate import head, linear, undecodable

    network = common.open_network(args)
    labelled = common.open_labelled(args)
    name = f"linear-{'quick' if args.quick else args.protocol}"
    where = record.result_path(args.out, network.weights, name, labelled.test.fingerprint)
    stem = where.name.removesuffix(".json")
    cache = common.open_cache(args, network)
    resume = _resume(args, protocol, network, labelled, cache, where.with_name(f"{stem}.resume"))
    outcome = linear.fit(
        network.backbone,
        labelled.train,
        labelled.test,
        protocol=protocol,
        seed=args.seed,
        cache=cache,
        resume=resume,
        **network.reading,
    )
    head_path = where.with_name(f"{stem}.head.safetensors")
    head.save(
        outcome.head, head_path, classes=labelled.classes, about=record.head_of(network, "centre")
    )
    bad = {
        "train": undecodable.named(labelled.train, outcome.bad_train),
        "test": undecodable.named(labelled.test, outcome.bad_test),
    }
    changed = _changes(args)
    row = Row(
        protocol=QUICK_LABEL if protocol.cached else f"linear, {protocol.name}{changed}",
        figures={"top-1": outcome.top1, "top-5": outcome.top5},
        images_per_second=outcome.images_per_second or None,  # 0: nothing was computed now
        published=published.LINEAR.get(protocol.name),
    )
    result = {
        "protocol": {**asdict(outcome.protocol), "peak_lr": outcome.protocol.peak_lr},
        "published_protocol": not (protocol.cached or changed),
        "arithmetic": outcome.protocol.arithmetic(),
        "top1": outcome.top1,
        "top5": outcome.top5,
        "final_loss": outcome.final_loss,
        "images_per_second": outcome.images_per_second,
        "images": {
            "train": len(labelled.train) - len(outcome.bad_train),
            "test": outcome.test_images,
        },
        **undecodable.described(**bad),
        "head": str(head_path),
    }
    notes = [
        f"tested on {labelled.source}",
        *undecodable.notes(**bad),
        f"classifier: {result['arithmetic']}; saved as {head_path}",
    ]
    if protocol.name == "paper":
        notes.append(
            "the paper takes the best of five rates (base lr .05 to .4); this is one of them"
        )
    common.finish(args, where, record.provenance(args, network, labelled), result, [row], notes)
    resume.clear()


def _resume(
    args: argparse.Namespace,
    protocol: protocols.Protocol,
    network: common.Network,
    labelled: Labelled,
    cache: FeatureCache,
    folder: Path,
) -> Resume:
    """An interrupted training in `folder`, and all that it depends on."""
    import numpy as np

    from byol_fast.evaluate.resume import Resume

    parts = {"train": labelled.train, "test": labelled.test}
    keys = {name: cache.key(store, **network.deciding) for name, store in parts.items()}
    labels = hashlib.sha256(np.asarray(labelled.train.labels).tobytes()).hexdigest()
    about = {"features": keys, "labels": labels, "protocol": asdict(protocol), "seed": args.seed}
    return Resume(folder, about)


def _protocol(args: argparse.Namespace) -> protocols.Protocol:
    """The recipe with what the command line changes in it."""
    named = {"paper": protocols.PAPER, "mmpretrain": protocols.MMPRETRAIN}
    base = protocols.QUICK if args.quick else named[args.protocol]
    asked = {"epochs": args.epochs, "batch_size": args.batch_size, "base_lr": args.base_lr}
    return replace(base, **{key: value for key, value in asked.items() if value is not None})


def _changes(args: argparse.Namespace) -> str:
    asked = {"epochs": args.epochs, "batch": args.batch_size, "base lr": args.base_lr}
    changed = [f"{key} {value:g}" for key, value in asked.items() if value is not None]
    return f" with {', '.join(changed)}" if changed else ""
