"""Which recipe of several: each is trained and measured on images held out of the training set."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from byol_fast.errors import Diverged
from byol_fast.evaluate.commands.training import Job
from byol_fast.evaluate.recipes import Recipe

if TYPE_CHECKING:
    from byol_fast.evaluate.scores import Scores
    from pipelines.stores import Store


def candidates(
    recipe: Recipe,
    given: Mapping[str, Sequence[float] | None],
    grid: Mapping[str, Sequence[float]] | None = None,
) -> list[Recipe]:
    """The recipe with every combination of the values `given`; for None those of `grid`, if any."""
    values_of = {key: values or (grid or {}).get(key) for key, values in given.items()}
    asked = {key: values for key, values in values_of.items() if values}
    return [
        recipe.changed(dict(zip(asked, values, strict=True)))
        for values in itertools.product(*asked.values())
    ]


def choose(
    job: Job, recipes: list[Recipe], metric: Callable[[Scores], float]
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The best of `recipes` on a fifth of the training images that is not trained on.

    What was tried is kept in a file as it comes, so a repeated command goes on. A recipe that
    diverges counts 0. Returns the recipe and `{**what it changes, "accuracy": share}` of all.
    """
    if len(recipes) == 1:
        return recipes[0], []
    from byol_fast.evaluate.data import Subset, stratified_split

    fit_ids, held_ids = stratified_split(job.labelled.train)
    if not len(held_ids):
        raise ValueError(
            "there is one image per class, so none can be held out to choose a recipe by: give "
            "one value each, without --grid"
        )
    fit, held = (Subset(job.labelled.train, ids) for ids in (fit_ids, held_ids))
    varied = _varied(recipes)
    tried: dict[str, float] = job.world.share(_tried(job))
    for number, recipe in enumerate(recipes, start=1):
        key = _key(job, recipe)
        if key not in tried:
            part = f"choosing {number} of {len(recipes)}"
            tried[key] = _accuracy(job, recipe, fit, held, part, metric)
            _remember(job, tried)
    best = max(recipes, key=lambda recipe: tried[_key(job, recipe)])
    found = [{**_values(r, varied), "accuracy": tried[_key(job, r)]} for r in recipes]
    return best, found


def _accuracy(
    job: Job, recipe: Recipe, fit: Store, held: Store, part: str, metric: Callable[[Scores], float]
) -> float:
    if job.args.quick and len(fit) < recipe.batch_size:  # at most all images, which `fit` is not
        cut = {"batch_size": len(fit), "base_lr": recipe.peak_lr * 256 / len(fit)}
        recipe = recipe.changed(cut)
    module = job.fine_tuned()
    try:
        job.train(module, fit, recipe, part)
    except Diverged:
        return 0.0
    found = job.test(module, held, part)
    if job.world.is_main:
        shutil.rmtree(job.folder_of(part), ignore_errors=True)
    return metric(found.each[0])


def _key(job: Job, recipe: Recipe) -> str:
    return json.dumps(job.about(job.labelled.train, recipe), sort_keys=True)


def _tried(job: Job) -> dict[str, float]:
    path = job.folder / "tried.json"
    tried: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    return tried


def _remember(job: Job, tried: dict[str, float]) -> None:
    from byol_fast.checkpoint import write_text

    if job.world.is_main:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_text(job.folder / "tried.json", json.dumps(tried, indent=1))


def _varied(recipes: list[Recipe]) -> list[str]:
    rows = [asdict(recipe) for recipe in recipes]
    return [key for key in rows[0] if any(row[key] != rows[0][key] for row in rows)]


def _values(recipe: Recipe, keys: list[str]) -> dict[str, Any]:
    return {key: asdict(recipe)[key] for key in keys}
