"""Linear SVMs on frozen features: the VOC07 benchmark, on VOC2007 or any labelled images."""

from __future__ import annotations

import argparse
import math

from byol_fast.evaluate import published, record
from byol_fast.evaluate.commands import common, frozen
from byol_fast.evaluate.table import Row


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    frozen.flags(parser)
    parser.add_argument("--jobs", type=int, help="processes that fit; else one for each core")


def run(args: argparse.Namespace) -> None:
    """Raises as `frozen.open_frozen` and `svm.fit`."""
    from byol_fast.evaluate import svm, undecodable

    svm.classifier(svm.USUAL_COST)  # without scikit-learn: better known before the features
    costs = svm.QUICK_COSTS if args.quick else svm.COSTS
    opened = frozen.open_benchmark(args)
    where = opened.result_path("svm")
    train, test = opened.both()
    outcome = svm.fit(
        train.features.numpy(),
        opened.targets("train", train),
        test.features.numpy(),
        opened.targets("test", test),
        costs=costs,
        jobs=args.jobs or frozen.default_jobs(),
        parts=opened.parts(protocol="svm", costs=costs, folds=svm.FOLDS),
        progress=True,
    )
    figures = {"mAP": outcome.mean_ap}
    if outcome.top1 is not None:
        figures["top-1"] = outcome.top1
    rows = [
        Row(
            protocol=opened.label(f"SVM, {len(costs)} C in {svm.FOLDS} folds"),
            figures=figures,
            images_per_second=common.rate_of(train, test),
            published=published.SVM if opened.as_published else None,
        )
    ]
    classes = opened.labelled.classes
    result = {
        "protocol": {"name": "svm", "costs": costs, "folds": svm.FOLDS, **opened.described()},
        "published_protocol": opened.as_published,
        "map": outcome.mean_ap,
        "top1": outcome.top1,
        "classes": {
            name: {"ap": _number(ap), "cost": cost, "crossval_ap": _number(chosen_by)}
            for name, ap, cost, chosen_by in zip(
                classes, outcome.aps, outcome.costs, outcome.crossval_aps, strict=True
            )
        },
        "images": {"train": len(train.ids), "test": len(test.ids)},
        **undecodable.described(**opened.bad()),
    }
    notes = opened.notes()
    if unseen := [name for name, ap in zip(classes, outcome.aps, strict=True) if math.isnan(ap)]:
        notes.append(f"{len(unseen)} classes have no test image and are left out of the mean")
    provenance = record.provenance(args, opened.network, opened.labelled)
    common.finish(args, where, provenance, result, rows, notes)


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
