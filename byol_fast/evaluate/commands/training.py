"""What `mhead`, `semi` and `finetune` share: ranks, recipes, choosing, training, results."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_fast.errors import Diverged
from byol_fast.evaluate.commands import common
from byol_fast.evaluate.recipes import Recipe

if TYPE_CHECKING:
    from byol_fast.distributed import World
    from byol_fast.evaluate.data import Labelled
    from byol_fast.evaluate.finetune import Progressing, Trained
    from byol_fast.evaluate.heads import Classifier
    from byol_fast.evaluate.scores import Scores
    from pipelines.spec import AugmentSpec
    from pipelines.stores import Store

QUICK = "quick (no published protocol)"


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line that the three have in common."""
    common.weights_flags(parser)
    common.data_flags(parser)
    add = parser.add_argument
    add("--quick", action="store_true", help="a few passes in small batches; no protocol")
    add("--batch-size", type=int, help="over all ranks, instead of the recipe's; lr follows it")
    add("--seed", type=int, default=0, help="of order, crops and first weights")


@contextmanager
def ranks(args: argparse.Namespace) -> Iterator[World]:
    """The process group of torchrun, or a world of one; `args.device` is then this rank's."""
    from byol_fast import distributed

    world = distributed.start(args.device)
    args.device = str(world.device)
    try:
        yield world
    finally:
        distributed.stop()


def open_labelled(args: argparse.Namespace, world: World) -> Labelled:
    """As `common.open_labelled`; rank 0 first, so that images are indexed once."""
    if not world.is_main:
        world.barrier()
    labelled = common.open_labelled(args)
    if world.is_main:
        world.barrier()
    return labelled


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


@dataclass(frozen=True, kw_only=True)
class Job:
    """One network, one data set and one place to keep things; trains with any recipe."""

    args: argparse.Namespace
    world: World
    network: common.Network
    labelled: Labelled
    where: Path  # of the result

    @property
    def folder(self) -> Path:
        """Of checkpoints, and of what a grid has found so far; gone when the result is written."""
        return self.where.with_name(self.where.name.removesuffix(".json") + ".unfinished")

    def train(self, module: Classifier, store: Store, recipe: Recipe, part: str) -> Trained:
        """Train `module` in place, going on from the checkpoints of `part` if there are any."""
        from byol_fast.evaluate import finetune

        return finetune.train(
            module,
            store,
            recipe=recipe,
            spec=self.spec,
            world=self.world,
            seed=self.args.seed,
            threads=self.network.threads,
            backend=self.network.backend,
            resume=self._resume(store, recipe, part),
            progress=True,
            label=part,
        )

    def test(self, module: Classifier, store: Store, label: str) -> tuple[list[Scores], int, int]:
        """Scores of the classifiers in `module`, images tested and left out; rank 0 measures."""
        from byol_fast.evaluate import scores

        found = None
        if self.world.is_main:
            classes = len(self.labelled.classes)
            found = scores.measure(module, store, classes, label=label, **self.network.reading)
        shared: tuple[list[Scores], int, int] = self.world.share(found)
        return shared

    @property
    def spec(self) -> AugmentSpec:
        return replace(self.network.spec, image_size=self.network.image_size)

    def fine_tuned(self) -> Classifier:
        """A copy of the pretrained network with a fresh classifier."""
        from byol_fast.backbone import feature_dim
        from byol_fast.evaluate.heads import FineTuned

        backbone = copy.deepcopy(self.network.backbone)
        width = feature_dim(backbone, self.network.image_size)
        return FineTuned(backbone, width, len(self.labelled.classes), seed=self.args.seed)

    def choose(
        self, recipes: list[Recipe], metric: Callable[[Scores], float]
    ) -> tuple[Recipe, list[dict[str, Any]]]:
        """The best of `recipes` on a fifth of the training images that is not trained on.

        What was tried is kept in a file as it comes, so a repeated command goes on. A recipe that
        diverges counts 0. Returns the recipe and `{**what it changes, "accuracy": share}` of all.
        """
        if len(recipes) == 1:
            return recipes[0], []
        from byol_fast.evaluate.data import Subset, stratified_split

        fit_ids, held_ids = stratified_split(self.labelled.train)
        if not len(held_ids):
            raise ValueError(
                "there is one image per class, so none can be held out to choose a recipe by: give "
                "one value each, without --grid"
            )
        fit, held = (Subset(self.labelled.train, ids) for ids in (fit_ids, held_ids))
        varied = _varied(recipes)
        tried: dict[str, float] = self.world.share(self._tried())
        for number, recipe in enumerate(recipes, start=1):
            key = self._key(recipe)
            if key not in tried:
                part = f"choosing {number} of {len(recipes)}"
                tried[key] = self._accuracy(recipe, fit, held, part, metric)
                self._remember(tried)
        best = max(recipes, key=lambda recipe: tried[self._key(recipe)])
        found = [{**_values(r, varied), "accuracy": tried[self._key(r)]} for r in recipes]
        return best, found

    def clean(self) -> None:
        """Remove checkpoints once the result is written."""
        if self.world.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _accuracy(
        self, recipe: Recipe, fit: Store, held: Store, part: str, metric: Callable[[Scores], float]
    ) -> float:
        module = self.fine_tuned()
        try:
            self.train(module, fit, recipe, part)
        except Diverged:
            return 0.0
        each, _, _ = self.test(module, held, part)
        if self.world.is_main:
            shutil.rmtree(self._folder_of(part), ignore_errors=True)
        return metric(each[0])

    def _resume(self, store: Store, recipe: Recipe, part: str) -> Progressing:
        from byol_fast.evaluate.finetune import Progressing

        return Progressing(folder=self._folder_of(part), about=self._about(store, recipe))

    def _about(self, store: Store, recipe: Recipe) -> dict[str, Any]:
        """What a training's outcome depends on."""
        return {
            "recipe": asdict(recipe),
            "weights": self._sha256,
            "images": store.fingerprint,
            "image size": self.network.image_size,
            "seed": self.args.seed,
        }

    def _key(self, recipe: Recipe) -> str:
        return json.dumps(self._about(self.labelled.train, recipe), sort_keys=True)

    @cached_property
    def _sha256(self) -> str:
        return self.network.weights.sha256  # reads the whole file

    def _folder_of(self, part: str) -> Path:
        return self.folder / part.replace(" ", "-")

    def _tried(self) -> dict[str, float]:
        path = self.folder / "tried.json"
        tried: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        return tried

    def _remember(self, tried: dict[str, float]) -> None:
        from byol_fast.checkpoint import write_text

        if self.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "tried.json", json.dumps(tried, indent=1))


def save_network(job: Job, module: Any) -> dict[str, str]:
    """The fine-tuned backbone, as pretraining exports one, and its classifier; where they are."""
    from byol_fast import export
    from byol_fast.evaluate import head

    name = job.where.name.removesuffix(".json")
    usual = {"backbone": job.args.backbone, "stem": job.args.stem or "imagenet", "hidden_layer": -1}
    meta = {**usual, **job.network.weights.meta, "image_size": job.network.image_size}
    meta |= {"mean": job.network.spec.mean, "std": job.network.spec.std}
    backbone, _ = export.export_backbone(module.backbone, job.where.with_name(name), meta)
    path = job.where.with_name(name + ".head.safetensors")
    head.save(module.head, path, classes=job.labelled.classes)
    return {"backbone": str(backbone), "head": str(path)}


def protocol(recipe: Recipe) -> dict[str, Any]:
    """A recipe for a result file."""
    return {**asdict(recipe), "peak_lr": recipe.peak_lr, "arithmetic": recipe.arithmetic()}


def changes(asked: dict[str, Any]) -> str:
    """` with epochs 3, batch 64`, of what the command line sets; empty where it sets nothing."""
    said = [f"{key} {value:g}" for key, value in asked.items() if value is not None]
    return f" with {', '.join(said)}" if said else ""


def _varied(recipes: list[Recipe]) -> list[str]:
    rows = [asdict(recipe) for recipe in recipes]
    return [key for key in rows[0] if any(row[key] != rows[0][key] for row in rows)]


def _values(recipe: Recipe, keys: list[str]) -> dict[str, Any]:
    return {key: asdict(recipe)[key] for key in keys}
