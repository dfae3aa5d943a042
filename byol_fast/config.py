"""The settings of a pretraining run: the only source of its flags, defaults and help.

Values that depend on the data set and the length of the run are None until `recipes.fill` enters
the recipe's; one set by hand always wins.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from byol_fast import arguments
from byol_fast.flags import Section, UsageError, flags_of, nearest, setting
from byol_fast.settings import (
    CheckpointConfig,
    InputConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    RunConfig,
    of_recipe,
)

if TYPE_CHECKING:
    from pipelines.spec import AugmentSpec

ACTIONS = {
    "--config FILE": "settings from a YAML file (as --print-config prints it); flags override it",
    "--print-config": "print the settings with the recipe's values filled in, and stop",
    "--dry-run": "check the data and the settings, print the arithmetic, and stop",
    "--replay epoch=3,index=1234": "draw the two views of that sample in that epoch, and stop",
    "--help": "this text",
}
BACKENDS = ("auto", "torch", "dali", "ffcv", "synthetic")
PARTS = "parts:"  # before a path
_BACKEND = re.compile(rf"{'|'.join(BACKENDS)}|dali:(cpu|mixed(:(0(\.\d+)?|1(\.0+)?))?)")


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
    epochs: int = of_recipe("passes over the data", at_least=1)
    batch_size: int = of_recipe("images of one optimizer step over all processes", at_least=2)
    backbone: str = of_recipe("any classification network of torchvision.models")
    image_size: int = of_recipe("side of a view in pixels", at_least=8)
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
        # A shell leaves the ~ of --out=~/runs as it is, and so does YAML.
        object.__setattr__(self, "out", os.path.expanduser(self.out))

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
