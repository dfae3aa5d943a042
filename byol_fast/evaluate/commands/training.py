"""What `mhead`, `semi` and `finetune` share: ranks, training, testing, results."""

from __future__ import annotations

import argparse
import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_fast.evaluate import record
from byol_fast.evaluate.commands import common
from byol_fast.evaluate.recipes import Recipe
from byol_fast.evaluate.table import Row

if TYPE_CHECKING:
    from byol_fast.distributed import World
    from byol_fast.evaluate.data import Labelled
    from byol_fast.evaluate.finetune import Progressing, Trained
    from byol_fast.evaluate.heads import Classifier
    from byol_fast.evaluate.scores import Measured, Scores
    from byol_fast.evaluate.undecodable import Named
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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a training went, and what its test found."""

    trained: Trained
    scores: list[Scores]  # one for each classifier
    tested: int  # images
    bad: dict[str, Named]  # those of `train` and `test` that could not be decoded

    @property
    def images_per_second(self) -> float | None:
        return self.trained.images_per_second or None  # 0: nothing was trained now


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

    def test(self, module: Classifier, store: Store, label: str) -> Measured:
        """Scores of the classifiers in `module`, images tested and left out; rank 0 measures."""
        from byol_fast.evaluate import scores

        found = None
        if self.world.is_main:
            classes = len(self.labelled.classes)
            found = scores.measure(module, store, classes, label=label, **self.network.reading)
        shared: Measured = self.world.share(found)
        return shared

    @property
    def spec(self) -> AugmentSpec:
        return replace(self.network.spec, image_size=self.network.image_size)

    def fine_tuned(self) -> Classifier:
        """A copy of the pretrained network with a fresh classifier."""
        from byol_fast.evaluate.heads import FineTuned
        from byol_fast.networks.backbone import feature_dim

        backbone = copy.deepcopy(self.network.backbone)
        width = feature_dim(backbone, self.network.image_size)
        return FineTuned(backbone, width, len(self.labelled.classes), seed=self.args.seed)

    def train_and_test(self, module: Classifier, recipe: Recipe) -> Outcome:
        """`train` on all training images, then `test` on all test images."""
        from byol_fast.evaluate import undecodable

        train, test = self.labelled.train, self.labelled.test
        trained = self.train(module, train, recipe, "training")
        found = self.test(module, test, "testing")
        bad = {
            "train": undecodable.named(train, trained.bad),
            "test": undecodable.named(test, found.bad),
        }
        return Outcome(trained=trained, scores=found.each, tested=found.tested, bad=bad)

    def described(self, outcome: Outcome) -> dict[str, Any]:
        """The result file's part on training and images."""
        from byol_fast.evaluate import undecodable

        left = len(self.labelled.train) - len(outcome.bad["train"])
        return {
            "final_loss": outcome.trained.final_loss,
            "images_per_second": outcome.trained.images_per_second,
            "images": {"train": left, "test": outcome.tested},
            **undecodable.described(**outcome.bad),
            "ranks": self.world.size,
        }

    def finish(
        self,
        outcome: Outcome,
        result: dict[str, Any],
        rows: list[Row],
        notes: list[str],
        labelled: Labelled | None = None,
    ) -> None:
        """As `common.finish`, on rank 0; then remove the checkpoints.

        Args:
            labelled: the data set that was given, where the job's own is a share of it.
        """
        from byol_fast.evaluate import undecodable

        labelled = labelled or self.labelled
        about = record.provenance(self.args, self.network, labelled)
        notes = [f"tested on {labelled.source}", *undecodable.notes(**outcome.bad), *notes]
        common.finish(self.args, self.where, about, result, rows, notes)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _resume(self, store: Store, recipe: Recipe, part: str) -> Progressing:
        from byol_fast.evaluate.finetune import Progressing

        return Progressing(folder=self.folder_of(part), about=self.about(store, recipe))

    def about(self, store: Store, recipe: Recipe) -> dict[str, Any]:
        """What a training's outcome depends on."""
        from byol_fast.evaluate import decoding

        return {
            "recipe": asdict(recipe),
            "weights": self.network.weights.sha256,
            "images": store.fingerprint,
            "reading": decoding.described(self.network.backend, store, self.network.device),
            "image size": self.network.image_size,
            "seed": self.args.seed,
        }

    def folder_of(self, part: str) -> Path:
        """Of the checkpoints of one training."""
        return self.folder / part.replace(" ", "-")


def open_job(
    args: argparse.Namespace, world: World, network: common.Network, labelled: Labelled, name: str
) -> Job:
    """A job whose result lies beside the weights, with `name` in its own, unless `--out` says."""
    where = record.result_path(args.out, network.weights, name, labelled.test.fingerprint)
    return Job(args=args, world=world, network=network, labelled=labelled, where=where)


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
    trained = replace(job.network, weights=export.read_weights(backbone))  # not those given
    about = record.head_of(trained, "centre")
    head.save(module.head, path, classes=job.labelled.classes, about=about)
    return {"backbone": str(backbone), "head": str(path)}


def protocol(recipe: Recipe) -> dict[str, Any]:
    """A recipe for a result file."""
    return {**asdict(recipe), "peak_lr": recipe.peak_lr, "arithmetic": recipe.arithmetic()}


def changes(asked: dict[str, Any]) -> str:
    """` with epochs 3, batch 64`, of what the command line sets; empty where it sets nothing."""
    said = [f"{key} {value:g}" for key, value in asked.items() if value is not None]
    return f" with {', '.join(said)}" if said else ""
