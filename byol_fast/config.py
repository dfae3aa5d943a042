"""The settings of a pretraining run: the only source of its flags, defaults and help.

Values that depend on the data set and the length of the run are None until `recipes.fill` enters
the recipe's; one set by hand always wins.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from byol_fast import arguments
from byol_fast.flags import Section, UsageError, flags_of, nearest, setting

if TYPE_CHECKING:
    from pipelines.spec import AugmentSpec

ACTIONS = {
    "--config FILE": "settings from a YAML file (as --print-config prints it); flags override it",
    "--print-config": "print the settings with the recipe's values filled in, and stop",
    "--dry-run": "check the data and the settings, print the arithmetic, and stop",
    "--replay epoch=3,index=1234": "draw the two views of that sample in that epoch, and stop",
    "--help": "this text",
}
RECIPE = "the recipe's"  # what None stands for until `recipes.fill`
BACKENDS = ("auto", "torch", "dali", "ffcv", "synthetic")
PARTS = "parts:"  # before a path
METHODS = ("byol", "simsiam", "directpred", "no-predictor", "group-ws")
_BACKEND = re.compile(rf"{'|'.join(BACKENDS)}|dali:(cpu|mixed(:(0(\.\d+)?|1(\.0+)?))?)")
_INTERVAL = re.compile(r"(\d+(?:\.\d+)?)(m|h)|(\d+)")
_KEEP = re.compile(r"([1-9]\d*)(?:, ?every=([1-9]\d*)(e?))?")


def _recipe(text: str, *, free: bool = False, **bounds: Any) -> Any:
    """A field whose value is the recipe's unless set: None until `recipes.fill`."""
    return setting(text, default=None, unset=RECIPE, free=free, **bounds)


@dataclass(frozen=True, kw_only=True)
class InputConfig(Section):
    """From files to views."""

    prefix: ClassVar[str] = "input"
    semantics: Literal["deepmind", "torchvision"] = _recipe(
        "meaning of the colour jitter, the blur's border and the crop's retries"
    )
    crop_area_min: float = _recipe("smallest crop, as a share of the image", above=0, at_most=1)
    views: Literal["byol", "no-blur", "no-flip", "no-blur-no-flip"] = _recipe(
        "the paper's two views, or those without blur (for images of 32 pixels), without mirror "
        "images (for writing), or without both"
    )
    verify: bool = setting(
        "decode every image strictly once when indexing, so that broken ones are named then",
        default=True,
        free=True,
    )
    threads: int | None = setting(
        "decoding threads of each process",
        default=None,
        unset="the cores a process has",
        free=True,
        at_least=1,
    )
    accumulate: int | None = setting(
        "micro-batches of one optimizer step on each process",
        default=None,
        unset="1; as many as memory is known to need when resumed on fewer processes",
        free=True,
        at_least=1,
    )

    @property
    def blur(self) -> bool:
        """Whether views are blurred: view 1 always, view 2 one time in ten."""
        return "no-blur" not in self.views

    @property
    def flip(self) -> bool:
        """Whether every other view is a mirror image."""
        return "no-flip" not in self.views


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """Optimizer and schedule."""

    prefix: ClassVar[str] = "optim"
    base_lr: float = _recipe("learning rate at batch 256; times batch/256 at the peak", above=0)
    weight_decay: float = _recipe("of weights; biases and norms have none", at_least=0)
    warmup_epochs: int = _recipe("linear warm-up from 0, then cosine to 0", at_least=0)
    variant: Literal["paper", "lightly", "mmpretrain", "sgd"] = _recipe(
        "LARS as the authors', as lightly's (the norms are summed), as mmpretrain's (that, and the "
        "rate inside the momentum), or no trust ratio at all"
    )

    @property
    def norm(self) -> Literal["update", "sum"]:
        """What LARS divides by: the norm of the update, or the sum of its parts' norms."""
        return "sum" if self.variant in ("lightly", "mmpretrain") else "update"

    @property
    def lr_in_momentum(self) -> bool:
        """Whether the momentum buffer accumulates steps (lr times update) instead of updates."""
        return self.variant == "mmpretrain"

    @property
    def adapt(self) -> bool:
        """Whether weights get LARS's trust ratio; without it this is SGD with momentum."""
        return self.variant != "sgd"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Networks."""

    prefix: ClassVar[str] = "model"
    stem: Literal["imagenet", "cifar"] = _recipe(
        "of a ResNet: 7x7 with stride 2 and max-pool, or 3x3 with stride 1 and none"
    )
    hidden_size: int = _recipe("width of the projector's and predictor's hidden layer", at_least=1)
    hidden_layer: int | str = setting(
        "which layer is the representation: the name or the index of a child", default=-1
    )
    target_decay: float = _recipe("EMA decay at step 0; rises to 1", at_least=0, at_most=1)
    method: str = setting(
        "byol, or what differs from it, joined by +: simsiam (the target is the online network "
        "behind a stop-gradient), directpred (a predictor set from its inputs' correlation), "
        "no-predictor, group-ws (GroupNorm and weight standardisation for BatchNorm)",
        default="byol",
    )
    bn_sync: Literal["none", "group", "world"] = setting(
        "whose BatchNorm statistics are taken together: each process by itself, the processes of "
        "a node, or all of them as in the paper (also said as false and true)",
        default="world",
        switch=("none", "world"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        words = self.method.split("+")
        if unknown := [word for word in words if word not in METHODS]:
            raise UsageError(
                f"--model.method must be byol, or some of {', '.join(METHODS[1:])} joined by +, "
                f"got {self.method!r}{nearest(unknown[0], METHODS)}"
            )
        if {"directpred", "no-predictor"} <= set(words):
            raise UsageError("--model.method must not be both directpred and no-predictor")
        if len(set(words)) < len(words) or ("byol" in words and len(words) > 1):
            raise UsageError(
                f"--model.method must name each difference from byol once, got {self.method!r}"
            )

    @property
    def momentum(self) -> bool:
        """Whether the target is a moving average; else the online network itself."""
        return "simsiam" not in self.method

    @property
    def predictor(self) -> Literal["mlp", "directpred", "none"]:
        """What stands between the online projection and the loss."""
        if "directpred" in self.method:
            return "directpred"
        return "none" if "no-predictor" in self.method else "mlp"

    @property
    def norm(self) -> Literal["batch", "group-ws"]:
        """What normalises, in the backbone and in the heads."""
        return "group-ws" if "group-ws" in self.method else "batch"


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """How it runs."""

    prefix: ClassVar[str] = "run"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = _recipe(
        "of the networks; auto is bf16 on a GPU that has it, else fp32"
    )
    engine: Literal["auto", "eager", "compile", "graph"] = setting(
        "networks as they stand, through torch.compile, or that and the whole step as one CUDA "
        "graph, for small batches; auto compiles on a GPU",
        default="auto",
        free=True,
    )
    max_steps: int | None = setting(
        "stop after this step with a checkpoint; the schedule stays that of all epochs",
        default=None,
        unset="all",
        free=True,
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(Section):
    """What is watched."""

    prefix: ClassVar[str] = "monitor"
    eval_every: int = _recipe(
        "epochs between kNN evaluations; 0: only at the start and the end", free=True, at_least=0
    )
    eval_data: str = setting(
        "labelled images that kNN is scored on, in class folders like the training images'",
        default="",
        free=True,
    )
    log_every: int = _recipe("steps between lines of the log", free=True, at_least=1)
    tracker: Literal["tensorboard", "wandb", "both", "none"] = setting(
        "where curves go besides metrics.jsonl", default="tensorboard", free=True
    )
    on_trouble: Literal["warn", "stop", "stop-collapsed", "stop-nonfinite"] = setting(
        "when the embeddings collapse, or a loss or gradient is not finite (such a step is always "
        "skipped): say so and go on, or end the run with exit code 5, for both or for one of them",
        default="warn",
        free=True,
        formerly="on_collapse",
    )

    @property
    def stop_collapsed(self) -> bool:
        """Whether collapsed embeddings end the run."""
        return self.on_trouble in ("stop", "stop-collapsed")

    @property
    def stop_nonfinite(self) -> bool:
        """Whether a step that is not finite ends the run."""
        return self.on_trouble in ("stop", "stop-nonfinite")

    @property
    def tensorboard(self) -> bool:
        """Whether TensorBoard events are written."""
        return self.tracker in ("tensorboard", "both")

    @property
    def wandb(self) -> bool:
        """Whether Weights & Biases is used."""
        return self.tracker in ("wandb", "both")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Checkpoints."""

    prefix: ClassVar[str] = "checkpoint"
    every: int | str = setting(
        "how often: 30m, 2h, or a number of steps", default="30m", free=True, above=0
    )
    keep: int | str = setting(
        "how many of the newest stay on disk; 2,every=5000 also keeps one for good every 5000 "
        "steps, and 2,every=10e every 10 epochs",
        default=2,
        free=True,
        at_least=1,
    )
    allow_config_change: bool = setting(
        "resume although settings differ from the checkpoint's", default=False, free=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        found = _INTERVAL.fullmatch(str(self.every))
        if not found or not float(found[1] or found[3]):
            raise UsageError(
                f"--checkpoint.every must be minutes (30m), hours (2h) or a number of steps (500), "
                f"got {self.every!r}"
            )
        if not _KEEP.fullmatch(str(self.keep)):
            raise UsageError(
                f"--checkpoint.keep must be a number (2), or one with steps or epochs after which "
                f"a checkpoint stays for good (2,every=5000 or 2,every=10e), got {self.keep!r}"
            )

    @property
    def keep_newest(self) -> int:
        """How many of the newest stay."""
        return self._keep()[0]

    def keep_every(self, *, samples: int, global_batch: int) -> Fraction | None:
        """Steps between checkpoints that stay for good; None: none does."""
        _, every, epochs = self._keep()
        return Fraction(every * samples, global_batch) if epochs else Fraction(every or 0) or None

    def _keep(self) -> tuple[int, int, bool]:
        found = _KEEP.fullmatch(str(self.keep))
        assert found
        return int(found[1]), int(found[2] or 0), bool(found[3])

    @property
    def every_steps(self) -> int:
        """Steps between checkpoints; 0 where it goes by time."""
        return int(self.every) if str(self.every).isdigit() else 0

    @property
    def every_minutes(self) -> float:
        """Minutes between checkpoints; infinite where it goes by steps."""
        found = _INTERVAL.fullmatch(str(self.every))
        assert found
        return float(found[1]) * (60 if found[2] == "h" else 1) if found[2] else math.inf


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """Every setting of a pretraining run."""

    data: str = setting(
        "folder of images, tar shards, a .beton, a .npz or .npy of images, or synthetic:N; "
        "parts:PATH where each node holds a part of them",
        default="",
        free=True,
    )  # free: a checkpoint holds the data's fingerprint, and copies have other paths
    out: str = setting(
        "folder of the run; one that is there is resumed", default="runs/byol", free=True
    )
    recipe: Literal[
        "imagenet",
        "mmpretrain",
        "openmixup",
        "imagenet100",
        "cifar10",
        "cifar100",
        "stl10",
        "quickstart",
    ] = setting("where unset values come from", default="imagenet", free=True)
    epochs: int = _recipe("passes over the data", at_least=1)
    batch_size: int = _recipe("images of one optimizer step over all processes", at_least=2)
    backbone: str = _recipe("any classification network of torchvision.models")
    image_size: int = _recipe("side of a view in pixels", at_least=8)
    backend: str = setting(
        "what decodes and crops: auto, torch, dali, ffcv or synthetic; dali:cpu, dali:mixed and "
        "dali:mixed:0.65 say where DALI decodes, and the GPU's JPEG engines' share",
        default="auto",
        free=True,
    )
    device: Literal["auto", "cpu", "cuda"] = setting("where it trains", default="auto", free=True)
    seed: int = setting(
        "of the data's order, the views and the weights", default=0, at_least=0, at_most=2**63 - 1
    )
    input: InputConfig = dataclasses.field(default_factory=InputConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _BACKEND.fullmatch(self.backend):
            raise UsageError(
                f"--backend is {', '.join(BACKENDS)}, or dali:cpu, dali:mixed, dali:mixed:0.65; "
                f"got {self.backend!r}{nearest(self.backend, BACKENDS)}"
            )
        if not self.out:  # an unset shell variable would make the working directory the run's
            raise UsageError("--out must name a folder, got ''")

    @property
    def data_path(self) -> str:
        """Where the images are, or what they are."""
        return self.data.removeprefix(PARTS)

    @property
    def in_parts(self) -> bool:
        """Whether the images at that path may be others on another node."""
        return self.data.startswith(PARTS)


FLAGS = flags_of(Config)


def get(config: Config, name: str) -> Any:
    """The value of a dotted name."""
    section, _, leaf = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, leaf)


def replace(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with other values, by dotted name."""
    flat = {name: value for name, value in values.items() if "." not in name}
    for section in dict.fromkeys(name.partition(".")[0] for name in values if "." in name):
        inner = {n.partition(".")[2]: v for n, v in values.items() if n.startswith(f"{section}.")}
        flat[section] = dataclasses.replace(getattr(config, section), **inner)
    return dataclasses.replace(config, **flat)


def parse(argv: Sequence[str]) -> Config:
    """Flags and configuration files to settings, without the recipe's values.

    Files are read in their order, then flags override them; of two equal flags the last one wins.

    Raises:
        UsageError: unknown name, wrong type, value out of bounds, file that cannot be read.
    """
    files, values = arguments.parse(argv, FLAGS, [action.split()[0] for action in ACTIONS])
    merged: dict[str, Any] = {}
    for file in files:
        tree = _with_todays_names(arguments.load(Path(file)), file)
        merged.update(arguments.flatten(tree, FLAGS, file))
    return replace(Config(), {**merged, **values})


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested values in the order of definition: for YAML, JSON and checkpoints."""
    return dataclasses.asdict(config)


def from_dict(tree: Mapping[str, Any], where: str = "the configuration") -> Config:
    """The inverse of `to_dict`; a missing key has its default, an unknown one is an error."""
    return replace(Config(), arguments.flatten(_with_todays_names(tree, where), FLAGS, where))


def _with_todays_names(tree: Mapping[Any, Any], where: str) -> Mapping[Any, Any]:
    """Files of earlier versions said `input.blur` and `input.flip` where there is `input.views`."""
    section = tree.get("input")
    old = section if isinstance(section, Mapping) else {}
    if not {"blur", "flip"} & old.keys():
        return tree
    blur, flip = old.get("blur"), old.get("flip")
    if flip not in (None, 0, 0.5):
        raise UsageError(
            f"input.flip in {where} is {flip!r}: mirror images are half of the views, or none "
            "(input.views: no-flip)"
        )
    kept = {name: value for name, value in old.items() if name not in ("blur", "flip")}
    if (blur, flip) != (None, None):
        words = ["no-blur"] * (blur is False) + ["no-flip"] * (flip == 0)
        kept["views"] = "-".join(words) or "byol"
    return {**tree, "input": kept}


def to_yaml(config: Config) -> str:
    """YAML that `--config` reads back to the same settings."""
    import yaml

    return str(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def diff(saved: Config, now: Config, *, free: bool = False) -> list[str]:
    """What a resumed run would do differently, a line per setting: `epochs: 100 → 300`.

    Args:
        free: also list those that may change freely (paths, threads, monitoring, checkpoints).
    """
    lines = []
    for name, flag in FLAGS.items():
        before, after = get(saved, name), get(now, name)
        if before != after and (free or not flag.free):
            lines.append(f"{name}: {before} → {after}")
    return lines


def spec(config: Config) -> AugmentSpec:
    """The two views as the plan and the augmentation need them. `config` must be filled."""
    from pipelines.spec import VIEW1, VIEW2, AugmentSpec

    given = config.input
    first, second = (
        dataclasses.replace(
            view,
            crop_area=(given.crop_area_min, 1.0),
            flip=view.flip if given.flip else 0.0,
            blur=view.blur if given.blur else 0.0,
        )
        for view in (VIEW1, VIEW2)
    )
    return AugmentSpec(
        image_size=config.image_size, views=(first, second), semantics=given.semantics
    )
