"""Mean IoU of a segmenter fine-tuned from the network (VOC12 with extra labels, or Cityscapes)."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from byol_fast.evaluate import differs, record
from byol_fast.evaluate.commands import common, dense
from byol_fast.evaluate.dense import recipes
from byol_fast.evaluate.table import Row

if TYPE_CHECKING:
    from byol_fast.evaluate.dense.segment import SegmentationResult


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    data = "VOCdevkit folder, or Cityscapes' with leftImg8bit/ and gtFine/"
    dense.flags(parser, recipes.SEGMENTATION, data)


def run(args: argparse.Namespace) -> None:
    """Raises as `common.open_network`, `masks.read` and `segment.fit`."""
    base = recipes.SEGMENTATION[args.protocol]
    recipe = dense.recipe(args, recipes.quick_segmentation(base) if args.quick else base)
    names = dense.sets(args, base)
    from byol_fast.evaluate.dense import masks, segment

    network = common.open_network(args)
    train = masks.read(args.protocol, args.data, names[0])
    test = masks.read(args.protocol, args.data, (names[1],))
    name = f"segment-{args.protocol}{'-quick' if args.quick else ''}"
    where = record.result_path(args.out, network.weights, name, test.fingerprint)
    outcome = segment.fit(
        network.backbone,
        train,
        test,
        recipe,
        **dense.training(args, recipe, network, train.fingerprint, where),
    )
    result: dict[str, Any] = {
        "protocol": {**asdict(recipe), "seed": args.seed},
        **differs.record(dense.differences(args, network)),
        "miou": outcome.miou,
        "pixel_accuracy": outcome.pixel_accuracy,
        "by_class": outcome.by_class,
        **dense.trained(outcome.trained, outcome.test_images_per_second),
        "images": {"train": len(train.pairs), "test": len(test.pairs)},
    }
    about = dense.provenance(args, network, names, (train.fingerprint, test.fingerprint))
    notes = [f"tested on {len(test.pairs)} images"]
    common.finish(args, where, about, result, [_row(args, base, outcome)], notes)


def _row(
    args: argparse.Namespace, base: recipes.SegmentationRecipe, outcome: SegmentationResult
) -> Row:
    return Row(
        protocol=dense.title(args, base),
        figures={"mIoU": outcome.miou, "pixel acc": outcome.pixel_accuracy},
        images_per_second=outcome.trained.images_per_second or None,
        published=dense.published(args, args.protocol),
    )
