"""Transfer by fine-tuning: the whole network trained on another labelled set."""

from __future__ import annotations

import argparse

from byol_fast.evaluate import differs, published, recipes
from byol_fast.evaluate.commands import choosing, common, training
from byol_fast.evaluate.table import Row

METRICS = {"top-1": "top-1", "mean-per-class": "mean per class"}  # as `scores` names them


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    training.flags(parser)
    add = parser.add_argument
    add("--dataset", choices=list(published.FINETUNE), help="sets metric and published figure")
    add("--metric", choices=list(METRICS), help="instead of the data set's")
    add("--steps", type=int, help="instead of 20000")
    add("--lr", type=float, nargs="+", help="per 256 images; of several the best is taken")
    add(
        "--weight-decay",
        type=float,
        nargs="+",
        help="divided by the lr before it is used; of several the best is taken",
    )
    add("--grid", action="store_true", help="take the best of the paper's 7 rates × 8 decays")


def run(args: argparse.Namespace) -> None:
    """Raises as `common.open_network`, `data.prepare` and `finetune.train`."""
    asked = {"steps": args.steps, "batch_size": args.batch_size}
    recipe = recipes.FINETUNE.changed(asked)  # complain before reading data
    given = {"base_lr": args.lr, "weight_decay": args.weight_decay}
    grid = recipes.FINETUNE_GRID if args.grid else None
    choosing.candidates(recipe, given, grid)
    figure = published.FINETUNE.get(args.dataset)
    metric = METRICS[args.metric] if args.metric else figure.metric if figure else "top-1"
    with training.ranks(args) as world:
        network = common.open_network(args)
        labelled = training.open_labelled(args, world)
        if args.quick:
            recipe = recipes.quick(recipe, len(labelled.train)).changed(asked)
        name = f"finetune{'-quick' if args.quick else ''}"
        job = training.open_job(args, world, network, labelled, name)
        recipe, tried = choosing.choose(
            job, choosing.candidates(recipe, given, grid), lambda s: s.figures(metric)[metric]
        )
        module = job.fine_tuned()
        outcome = job.train_and_test(module, recipe)
        if world.is_main:
            (scores,) = outcome.scores
            row = Row(
                protocol=_title(args, recipe),
                figures=scores.figures(metric),
                images_per_second=outcome.images_per_second,
                published=None if args.quick or (figure and figure.metric != metric) else figure,
            )
            result = {
                "protocol": training.protocol(recipe),
                **differs.record(_differences(args, network)),
                "chosen_from": tried,
                "dataset": args.dataset,
                "metric": metric,
                "top1": scores.top1,
                "mean_per_class": scores.mean_per_class,
                "top5": scores.top5,
                **job.described(outcome),
                **training.save_network(job, module),
            }
            saved = f"{recipe.arithmetic()}; saved as {result['backbone']}"
            job.finish(outcome, result, [row], [saved, _choice(len(tried))])


def _differences(args: argparse.Namespace, network: common.Network) -> list[str]:
    """From the paper's fine-tuning."""
    asked = {"steps": args.steps, "batch size": args.batch_size, "lr": args.lr}
    asked |= {"weight decay": args.weight_decay}
    grid = [] if args.grid else ["one rate and one decay; the paper takes the best of a grid"]
    return [
        *([differs.QUICK] if args.quick else []),
        *differs.settings(asked),
        *grid,
        differs.ANTIALIASED,
        *differs.size(network.image_size),
    ]


def _title(args: argparse.Namespace, recipe: recipes.Recipe) -> str:
    if args.quick:
        return f"finetune, {training.QUICK}"
    changed = {"steps": args.steps, "batch": args.batch_size}
    changed |= {"lr": recipe.base_lr, "decay": recipe.weight_decay}
    return f"finetune{training.changes(changed)}"


def _choice(tried: int) -> str:
    if tried:
        return (
            f"the best of {tried} recipes on a fifth of the training images, then trained on all "
            "of them"
        )
    return (
        "one rate and one decay; the paper takes the best of a grid for each data set "
        "(--grid: 56 trainings more)"
    )
