"""Logistic regression on frozen features, its penalty chosen on validation images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from byol_fast.evaluate import published, record
from byol_fast.evaluate.commands import common, frozen
from byol_fast.evaluate.table import Row

if TYPE_CHECKING:
    import torch

    from byol_fast.evaluate.features import Features


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    frozen.flags(parser)
    add = parser.add_argument
    add("--val-data", help="validation images; else VOC's list, or a fixed fifth of --data")
    add("--dataset", choices=sorted(published.TRANSFER), help="its metric, and BYOL's figure")


def run(args: argparse.Namespace) -> None:
    """Raises as `frozen.open_frozen`, `data.prepare` and `logistic.search`."""
    import torch

    from byol_fast.evaluate import head, logistic, undecodable

    penalties = logistic.QUICK_PENALTIES if args.quick else logistic.PENALTIES
    opened = frozen.open_frozen(args, crop="centre" if args.quick else "square")
    where = opened.result_path("transfer")
    metrics = _metrics(args, opened)
    name, metric = next(iter(metrics.items()))
    (x, y), (unseen, truth), chosen_on = _split(args, opened)
    test = opened.features(opened.labelled.test, "test features")
    found = logistic.search(
        x,
        y,
        unseen,
        truth,
        classes=len(opened.labelled.classes),
        metric=metric,
        penalties=penalties,
        device=opened.network.device,
        parts=opened.parts(protocol="transfer", metric=name, penalties=penalties),
        progress=True,
    )
    targets = torch.from_numpy(opened.targets("test", test)) if opened.multi else test.labels
    with torch.no_grad():
        logits = found.head(test.features)
    figures = {each: measure(logits, targets) for each, measure in metrics.items()}
    head_path = where.with_name(where.name.removesuffix(".json") + ".head.safetensors")
    head.save(
        found.head,
        head_path,
        classes=opened.labelled.classes,
        about={**record.head_of(opened.network, opened.crop), "multi_label": opened.multi},
    )
    result = {
        "protocol": {"name": "transfer", "penalties": penalties, **opened.described()},
        "published_protocol": not args.quick,
        "figures": figures,
        "penalty": found.penalty,
        "validation": {f"{penalty:.6g}": value for penalty, value in found.validation.items()},
        "chosen_on": chosen_on,
        "images": {"train": len(x), "validation": len(unseen), "test": len(test.ids)},
        **undecodable.described(**opened.bad()),
        "head": str(head_path),
    }
    notes = [
        *opened.notes(),
        f"penalty {found.penalty:.3g}, the best by {name} on {chosen_on}; saved as {head_path}",
    ]
    if found.penalty in (penalties[0], penalties[-1]):
        notes.append("the best penalty is at the end of the range: the optimum may lie beyond")
    provenance = record.provenance(args, opened.network, opened.labelled)
    row = _row(args, opened, figures, len(penalties))
    common.finish(args, where, provenance, result, [row], notes)


def _row(
    args: argparse.Namespace, opened: frozen.Frozen, figures: dict[str, float], penalties: int
) -> Row:
    what = f"logistic regression, {penalties} penalties"
    return Row(
        protocol=f"quick {what} (not a published protocol)" if args.quick else what,
        figures=figures,
        images_per_second=common.rate_of(*opened.used),
        published=None if args.quick else _published(args, opened),
    )


def _metrics(args: argparse.Namespace, opened: frozen.Frozen) -> dict[str, frozen.Metric]:
    """What is measured; the first decides."""
    from byol_fast.evaluate import logistic

    asked = published.TRANSFER[args.dataset].metric if args.dataset else None
    if opened.multi != (asked == "mAP11") and asked:
        kind = "images of several classes" if opened.multi else "images of one class each"
        raise ValueError(f"--dataset {args.dataset}, but --data holds {kind}: check both")
    if opened.multi:
        return {"mAP11": logistic.eleven_point_map}
    both = {"top-1": logistic.top1, "per class": logistic.per_class}
    return dict(sorted(both.items(), key=lambda pair: pair[0] != (asked or "top-1")))


def _published(args: argparse.Namespace, opened: frozen.Frozen) -> published.Published | None:
    name = args.dataset or ("voc2007" if opened.multi else None)
    return published.TRANSFER[name] if name else None


def _split(
    args: argparse.Namespace, opened: frozen.Frozen
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor], str]:
    """Features and targets to learn from, those to choose by, and in words what these are."""
    import torch

    from byol_fast.evaluate.data import prepare
    from pipelines.stores import open_store

    train = opened.features(opened.labelled.train, "train features")
    if args.val_data and not opened.multi:
        given = open_store(args.val_data, root=args.root, verify=False)
        labelled = prepare(opened.labelled.train, given)
        held = opened.features(labelled.test, "validation features")
        return (
            (train.features, train.labels),
            (held.features, held.labels),
            f"the {len(held.ids)} images of --val-data",
        )
    if args.val_data:
        raise ValueError("--val-data: VOC brings its own list of validation images; leave it out")
    held_out, words = _held_out(opened, train)
    targets = torch.from_numpy(opened.targets("train", train)) if opened.multi else train.labels
    return (
        (train.features[~held_out], targets[~held_out]),
        (train.features[held_out], targets[held_out]),
        f"{int(held_out.sum())} images, {words}",
    )


def _held_out(opened: frozen.Frozen, train: Features) -> tuple[torch.Tensor, str]:
    """Which rows of `train` are for validation."""
    import numpy as np
    import torch

    from byol_fast.evaluate.data import Subset, stratified_split
    from byol_fast.evaluate.voclabels import MultiLabelled
    from pipelines.errors import DataError

    store = opened.labelled.train
    if isinstance(opened.labelled, MultiLabelled):
        if opened.labelled.validation.any():
            return torch.from_numpy(opened.labelled.validation)[train.ids], "VOC's val list"
        alike = np.zeros(len(store), dtype=np.int32)
        store = Subset(store, np.arange(len(store)), labels=alike, classes=("JPEGImages",))
    _, held = stratified_split(store)
    if not len(held):
        raise DataError("nothing can be held out to choose the penalty by: give --val-data")
    return torch.isin(train.ids, torch.from_numpy(held)), "a held-out fifth of the training images"
