"""Average precision of a detector fine-tuned from the network (VOC07+12 or COCO)."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from byol_fast.evaluate import differs, record
from byol_fast.evaluate.commands import common, dense
from byol_fast.evaluate.dense import recipes
from byol_fast.evaluate.table import Row

if TYPE_CHECKING:
    from byol_fast.evaluate.dense.boxes import DetectionSet
    from byol_fast.evaluate.dense.detect import DetectionResult

_SHOWN = 3  # annotations that were left out and are named on the screen


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    data = "VOCdevkit folder, or COCO's with annotations/, train2017/, val2017/"
    dense.flags(parser, recipes.DETECTION, data)


def run(args: argparse.Namespace) -> None:
    """Raises as `common.open_network`, `voc.read`, `coco.read` and `detect.fit`."""
    base = recipes.DETECTION[args.protocol]
    recipe = dense.recipe(args, recipes.quick_detection(base) if args.quick else base)
    names = dense.sets(args, base)
    from byol_fast.evaluate.dense import coco, detect, voc

    if args.protocol == "coco":
        coco.need_pycocotools()  # before reading anything
    network = common.open_network(args)
    read = coco.read if args.protocol == "coco" else voc.read
    train, test = read(args.data, names[0]), read(args.data, (names[1],))
    name = f"detect-{args.protocol}{'-quick' if args.quick else ''}"
    where = record.result_path(args.out, network.weights, name, test.fingerprint)
    outcome = detect.fit(
        network.backbone,
        train,
        test,
        recipe,
        **dense.training(args, recipe, network, train.fingerprint, where),
    )
    result: dict[str, Any] = {
        "protocol": {**asdict(recipe), "seed": args.seed},
        **differs.record(dense.differences(args, network)),
        **outcome.figures,
        "by_class": outcome.by_class,
        **dense.trained(outcome.trained, outcome.test_images_per_second),
        "images": {"train": outcome.training_images, "test": len(test.images)},
        "left_out": {"train": train.left_out, "test": test.left_out},
    }
    about = dense.provenance(args, network, names, (train.fingerprint, test.fingerprint))
    common.finish(args, where, about, result, _rows(args, base, outcome), _notes(train, test))


def _rows(
    args: argparse.Namespace, base: recipes.DetectionRecipe, outcome: DetectionResult
) -> list[Row]:
    title = dense.title(args, base)
    rate = outcome.trained.images_per_second or None
    if args.protocol == "voc":
        figures = outcome.figures["box"]
        row = Row(
            protocol=title,
            figures=figures,
            images_per_second=rate,
            published=dense.published(args, "voc"),
        )
        return [row]
    return [
        Row(
            protocol=title,
            figures={f"{kind} {name}": value for name, value in figures.items()},
            images_per_second=rate,
            published=dense.published(args, kind),
        )
        for kind, figures in outcome.figures.items()
    ]


def _notes(train: DetectionSet, test: DetectionSet) -> list[str]:
    notes = [f"tested on {len(test.images)} images"]
    for what, some in (("training", train.left_out), ("test", test.left_out)):
        if some:
            notes.append(f"{len(some)} {what} annotations are left out:")
            notes += [f"  {line}" for line in some[:_SHOWN]]
    return notes
