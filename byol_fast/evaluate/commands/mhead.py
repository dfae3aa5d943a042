"""Linear classifiers on Feature1 to Feature5: the stem and the four stages of a frozen ResNet."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from byol_fast.evaluate import differs, published, recipes
from byol_fast.evaluate.commands import common, training
from byol_fast.evaluate.table import Row

if TYPE_CHECKING:
    from byol_fast.evaluate.data import Labelled
    from byol_fast.evaluate.heads import StageHeads
    from byol_fast.evaluate.scores import Scores


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    training.flags(parser)
    add = parser.add_argument
    common.dataset_flag(parser)
    add("--recipe", choices=list(recipes.MHEAD), default="imagenet", help="the data set's")
    add("--epochs", type=int, help="instead of the recipe's; the drops of the rate move along")
    add("--lr", type=float, dest="base_lr", help="per 256 images, instead of the recipe's")


def run(args: argparse.Namespace) -> None:
    """Raises as `common.open_network`, `data.prepare`, `heads.StageHeads` and `finetune.train`."""
    asked = {"epochs": args.epochs, "batch_size": args.batch_size, "base_lr": args.base_lr}
    recipe = recipes.MHEAD[args.recipe].changed(asked)  # complain before reading data
    with training.ranks(args) as world:
        from byol_fast.evaluate.heads import StageHeads

        network = common.open_network(args)
        labelled = training.open_labelled(args, world)
        if args.quick:
            recipe = recipes.quick(recipe, len(labelled.train)).changed(asked)
        name = f"mhead-{'quick-' if args.quick else ''}{args.recipe}"
        job = training.open_job(args, world, network, labelled, name)
        module = StageHeads(
            network.backbone,
            len(labelled.classes),
            image_size=network.image_size,
            seed=args.seed,
        )
        outcome = job.train_and_test(module, recipe)
        if world.is_main:
            changed = training.changes(
                {"epochs": args.epochs, "batch": args.batch_size, "lr": args.base_lr}
            )
            adaptive = [p for p in module.poolings if p.kernel is None]
            result = {
                "protocol": training.protocol(recipe),
                **differs.record(_differences(args, network, [p.feature for p in adaptive])),
                "features": _features(module, outcome.scores),
                **job.described(outcome),
            }
            notes = [f"classifiers: {recipe.arithmetic()}"]
            if adaptive:
                said = ", ".join(f"{p.feature} {p.describe()}" for p in adaptive)
                notes.append(
                    "maps of another size than a ResNet's at 224 pixels are pooled otherwise: "
                    f"{said}"
                )
            label = training.QUICK if args.quick else f"{args.recipe}{changed}"
            figures = _published(args, labelled)
            job.finish(outcome, result, _rows(figures, module, outcome, label), notes)


def _published(
    args: argparse.Namespace, labelled: Labelled
) -> tuple[published.Published | None, ...]:
    """Of the recipe's data set; ImageNet's recipe, the default, is used on other data too."""
    unknown = (None,) * 5
    other = args.recipe == "imagenet" and common.dataset_of(args, labelled) != "imagenet"
    return unknown if args.quick or other else published.MHEAD.get(args.recipe, unknown)


def _differences(
    args: argparse.Namespace, network: common.Network, adaptive: list[str]
) -> list[str]:
    """From MMSelfSup's and OpenMixup's configurations."""
    asked = {"epochs": args.epochs, "batch size": args.batch_size, "lr": args.base_lr}
    pooled = [f"{', '.join(adaptive)} pooled adaptively"] if adaptive else []
    first = [differs.QUICK] if args.quick else []
    shown = [differs.BILINEAR, differs.ONE_RESIZE, *differs.size(network.image_size)]
    return [*first, *differs.settings(asked), *pooled, *shown]


def _rows(
    figures: tuple[published.Published | None, ...],
    module: StageHeads,
    outcome: training.Outcome,
    label: str,
) -> list[Row]:
    return [
        Row(
            protocol=f"mhead {pooling.feature}, {label}",
            figures=scores.figures(),
            images_per_second=outcome.images_per_second,
            published=figure,
        )
        for pooling, scores, figure in zip(module.poolings, outcome.scores, figures, strict=True)
    ]


def _features(module: StageHeads, each: list[Scores]) -> list[dict[str, Any]]:
    """What each classifier saw and reached, for the result file."""
    return [
        {
            "feature": pooling.feature,
            "map": [pooling.channels, pooling.side, pooling.side],
            "pooling": pooling.describe(),
            "published_pooling": pooling.kernel is not None,
            "width": pooling.width,
            "top1": scores.top1,
            "top5": scores.top5,
        }
        for pooling, scores in zip(module.poolings, each, strict=True)
    ]
