"""Semi-supervised: the whole network fine-tuned with a small share of the labels."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from byol_fast.evaluate import differs, published, recipes
from byol_fast.evaluate.commands import choosing, common, training
from byol_fast.evaluate.table import Row

if TYPE_CHECKING:
    from byol_fast.evaluate.data import Labelled


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    training.flags(parser)
    add = parser.add_argument
    common.dataset_flag(parser)
    add("--share", type=float, default=0.01, help="of the labels, stratified by class")
    add("--labels", type=Path, help="file with the names of the images that keep their label")
    add("--epochs", type=int, help="instead of the recipe's; the drops of the rate move along")
    add("--lr", type=float, nargs="+", help="per 256 images; of several the best is taken")
    add("--head-factor", type=float, nargs="+", help="the classifier's lr over the network's")
    add("--grid", action="store_true", help="take the best of the nine published pairs of both")


def run(args: argparse.Namespace) -> None:
    """Raises as `common.open_network`, `data.prepare`, `fewlabels` and `finetune.train`."""
    if args.labels and not args.test_data:
        raise ValueError("--labels lists training images, so name the test images: --test-data")
    asked = {"epochs": args.epochs, "batch_size": args.batch_size}
    recipe = recipes.semi(args.share).changed(asked)  # complain before reading data
    given = {"base_lr": args.lr, "head_lr_factor": args.head_factor}
    grid = recipes.SEMI_GRID if args.grid else None
    choosing.candidates(recipe, given, grid)
    with training.ranks(args) as world:
        network = common.open_network(args)
        labelled = training.open_labelled(args, world)
        few, source, share = _few(args, labelled)
        recipe = recipes.semi(share).changed(asked)
        if args.quick:
            recipe = recipes.quick(recipe, len(few.train)).changed(asked)
        name = f"semi-{'quick-' if args.quick else ''}{100 * share:.3g}pct"
        job = training.open_job(args, world, network, few, name)
        recipe, tried = choosing.choose(
            job, choosing.candidates(recipe, given, grid), lambda s: s.top1
        )
        module = job.fine_tuned()
        outcome = job.train_and_test(module, recipe)
        if world.is_main:
            (scores,) = outcome.scores
            row = Row(
                protocol=_title(args, recipe, share, chosen=bool(tried)),
                figures=scores.figures(),
                images_per_second=outcome.images_per_second,
                published=_published(args, labelled, share),
            )
            result = {
                "protocol": training.protocol(recipe),
                **differs.record(_differences(args, network)),
                "chosen_from": tried,
                "share": share,
                "labels": str(args.labels) if args.labels else None,
                "top1": scores.top1,
                "top5": scores.top5,
                **job.described(outcome),
                **training.save_network(job, module),
            }
            notes = [
                f"trained on {source}",
                f"{recipe.arithmetic()}; saved as {result['backbone']}",
                _choice(len(tried)),
            ]
            job.finish(outcome, result, [row], notes, labelled)


def _title(args: argparse.Namespace, recipe: recipes.Recipe, share: float, *, chosen: bool) -> str:
    chosen = chosen or bool(args.lr or args.head_factor)
    changed = training.changes(
        {
            "batch": args.batch_size,
            "lr": recipe.base_lr if chosen else None,
            "head factor": recipe.head_lr_factor if chosen else None,
        }
    )
    label = training.QUICK if args.quick else f"{recipe.epochs} epochs{changed}"
    return f"semi, {100 * share:.3g}% of the labels, {label}"


def _few(args: argparse.Namespace, labelled: Labelled) -> tuple[Labelled, str, float]:
    """The images that keep their label, in words, and their share of all."""
    from byol_fast.evaluate import fewlabels
    from byol_fast.evaluate.data import Subset

    train = labelled.train
    if args.labels:
        ids = fewlabels.named(train, args.labels)
        source, share = f"the {len(ids)} images that {args.labels} names", len(ids) / len(train)
    else:
        ids, share = fewlabels.fraction(train, args.share, args.seed), args.share
        source = f"{len(ids)} images, {args.share:.3g} of every class, drawn with seed {args.seed}"
    return replace(labelled, train=Subset(train, ids)), source, share


def _differences(args: argparse.Namespace, network: common.Network) -> list[str]:
    """From the paper's fine-tuning with few labels, whose figures these are."""
    asked = {"epochs": args.epochs, "batch size": args.batch_size, "lr": args.lr}
    asked |= {"head factor": args.head_factor}
    tried = "the nine recipes" if args.grid else "one of the nine recipes"
    return [
        *([differs.QUICK] if args.quick else []),
        *differs.settings(asked),
        f"{tried} of MMSelfSup; the paper sweeps rates and epochs of its own",
        differs.BILINEAR,
        differs.ONE_RESIZE,
        *differs.size(network.image_size),
    ]


def _published(
    args: argparse.Namespace, labelled: Labelled, share: float
) -> published.Published | None:
    """The figure for this share, give or take a twentieth: lists round to whole images."""
    if args.quick or common.dataset_of(args, labelled) != "imagenet":
        return None
    near = [known for known in published.SEMI if abs(share - known) < 0.05 * known]
    return published.SEMI[near[0]] if near else None


def _choice(tried: int) -> str:
    if tried:
        return f"the best of {tried} recipes on a fifth of these images, then trained on all"
    return (
        "one recipe of MMSelfSup's nine; the published figure is the best of a sweep on held-out "
        "images (--grid chooses)"
    )
