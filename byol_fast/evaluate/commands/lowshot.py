"""Linear SVMs from few images of each class: VOC07's low-shot benchmark, or any labelled images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from byol_fast.evaluate import published, record
from byol_fast.evaluate.commands import common, frozen
from byol_fast.evaluate.table import Row
from pipelines.errors import DataError

if TYPE_CHECKING:
    from byol_fast.evaluate.lowshot import LowShotResult

QUICK_SHOTS, QUICK_SAMPLES = (1, 4, 16), 2


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    frozen.flags(parser)
    add = parser.add_argument
    add("--k", type=int, nargs="+", help="images a class; else 1, 2, 4, …, 64, 96")
    add("--samples", type=int, help="draws for each k, instead of 5")
    add("--seed", type=int, default=0, help="of the draws")
    add("--jobs", type=int, help="processes that fit; else one for each core")


def run(args: argparse.Namespace) -> None:
    """Raises as `frozen.open_frozen` and `lowshot.fit`, and ValueError for k."""
    if args.k and min(args.k) < 1:
        raise ValueError("--k must be at least 1")
    from byol_fast.evaluate import lowshot, svm, undecodable

    svm.classifier(svm.USUAL_COST)  # without scikit-learn: better known before the features
    costs = svm.QUICK_COSTS if args.quick else svm.COSTS
    usual = QUICK_SHOTS if args.quick else lowshot.SHOTS
    samples = args.samples or (QUICK_SAMPLES if args.quick else lowshot.SAMPLES)
    opened = frozen.open_benchmark(args)
    where = opened.result_path("lowshot")
    train, test = opened.both()
    targets = opened.targets("train", train)
    rarest = lowshot.smallest_class(targets)
    shots = tuple(sorted(set(args.k))) if args.k else tuple(k for k in usual if k <= rarest)
    if not shots:
        raise DataError("a class has no training image that shows it plainly: low-shot needs some")
    outcomes = lowshot.fit(
        train.features.numpy(),
        targets,
        test.features.numpy(),
        opened.targets("test", test),
        shots=shots,
        samples=samples,
        seed=args.seed,
        costs=costs,
        jobs=args.jobs or frozen.default_jobs(),
        parts=opened.parts(protocol="lowshot", costs=costs, samples=samples, seed=args.seed),
        progress=True,
    )
    as_published = opened.as_published and samples == lowshot.SAMPLES
    rate = common.rate_of(train, test)
    described = {"costs": costs, "samples": samples, "seed": args.seed, **opened.described()}
    result = {
        "protocol": {"name": "lowshot", "k": shots, **described},
        "published_protocol": as_published,
        "cost_chosen_by": "mean AP on the training images of the other samples",
        "k": {str(each.k): _described(each) for each in outcomes},
        "images": {"train": len(train.ids), "test": len(test.ids)},
        **undecodable.described(**opened.bad()),
    }
    notes = [
        *opened.notes(),
        "C is chosen on the other samples' training images; published figures choose it on the "
        "test images, which can only raise them",
    ]
    if unchosen := [str(each.k) for each in outcomes if not each.cost_chosen]:
        notes.append(f"k={', '.join(unchosen)}: nothing to choose C by, so it is 1")
    if left_out := [str(k) for k in usual if k > rarest and not args.k]:
        notes.append(f"k={', '.join(left_out)}: a class has {rarest} training images only")
    rows = [_row(opened, each, samples, rate, as_published=as_published) for each in outcomes]
    provenance = record.provenance(args, opened.network, opened.labelled)
    common.finish(args, where, provenance, result, rows, notes)


def _row(
    opened: frozen.Frozen,
    each: LowShotResult,
    samples: int,
    rate: float | None,
    *,
    as_published: bool,
) -> Row:
    figures = {"mAP": each.mean}
    if each.top1s:
        figures["top-1"] = sum(each.top1s) / len(each.top1s)
    spread = f"{samples} samples, mAP ± {100 * each.std:.2f}"
    return Row(
        protocol=opened.label(f"low-shot SVM, k={each.k}, {spread}"),
        figures=figures,
        images_per_second=rate,
        published=published.LOW_SHOT.get(each.k) if as_published else None,
    )


def _described(each: LowShotResult) -> dict[str, Any]:
    """One k, for the result file."""
    return {
        "map": each.mean,
        "map_std": each.std,
        "map_of_samples": each.mean_aps,
        "top1_of_samples": each.top1s or None,
        "cost": each.cost,
        "negatives": each.negatives,
    }
