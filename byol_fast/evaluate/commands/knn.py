"""Accuracy by weighted k nearest neighbours; nothing is trained."""

from __future__ import annotations

import argparse
from typing import Any

from byol_fast.evaluate import published, record
from byol_fast.evaluate.commands import common
from byol_fast.evaluate.table import Row

QUICK_BANK, QUICK_QUERIES = 10_000, 2_000


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    common.weights_flags(parser)
    common.data_flags(parser)
    common.cache_flags(parser)
    common.quick_flag(parser)
    add = parser.add_argument
    add("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    add("--temperature", type=float, default=published.KNN_TEMPERATURE, help="T of exp(s / T)")
    add("--batch-size", type=int, default=256, help="images of one forward pass")


def run(args: argparse.Namespace) -> None:
    """Raises as `common.open_network` and `data.prepare`, and ValueError for k or T."""
    if min(args.k) < 1 or args.temperature <= 0:
        raise ValueError("--k must be at least 1 and --temperature above 0")
    from byol_fast.evaluate import data, knn, undecodable

    network = common.open_network(args)
    labelled = common.open_labelled(args)
    name = "knn-quick" if args.quick else "knn"
    where = record.result_path(args.out, network.weights, name, labelled.test.fingerprint)
    parts = [(labelled.train, "bank"), (labelled.test, "queries")]
    if args.quick:
        most = {"bank": QUICK_BANK, "queries": QUICK_QUERIES}
        parts = [(data.spread(store, most[label]), label) for store, label in parts]
    cache = common.open_cache(args, network)
    bank, queries = (
        cache.extract(
            network.backbone, store, batch_size=args.batch_size, label=label, **network.reading
        )
        for store, label in parts
    )
    at_k = knn.accuracies(
        bank.features,
        bank.labels,
        queries.features,
        queries.labels,
        classes=len(labelled.classes),
        ks=tuple(args.k),
        temperature=args.temperature,
        device=network.device,
    )
    usual = args.temperature == published.KNN_TEMPERATURE and not args.quick
    rate = common.rate_of(bank, queries)
    whole = f" (all {len(bank.ids)} there are)"
    protocol = f"kNN, T={args.temperature:g}"
    if args.quick:
        protocol = f"quick (at most {QUICK_BANK:,} neighbours) {protocol}"
    rows = [
        Row(
            protocol=f"{protocol}, k={k}{whole if k > len(bank.ids) else ''}",
            figures={"top-1": accuracy},
            images_per_second=rate,
            published=published.KNN.get(k) if usual and k <= len(bank.ids) else None,
        )
        for k, accuracy in at_k.items()
    ]
    bad = {
        "train": undecodable.named(parts[0][0], bank.bad),
        "test": undecodable.named(parts[1][0], queries.bad),
    }
    result: dict[str, Any] = {
        "protocol": {"name": "knn", "k": args.k, "temperature": args.temperature},
        "published_protocol": not args.quick,
        "top1": {str(k): accuracy for k, accuracy in at_k.items()},
        "images_per_second": rate,
        "images": {"train": len(bank.ids), "test": len(queries.ids)},
        **undecodable.described(**bad),
    }
    notes = [
        f"tested on {labelled.source}",
        *undecodable.notes(**bad),
        *common.from_cache(bank, queries),
    ]
    common.finish(args, where, record.provenance(args, network, labelled), result, rows, notes)
