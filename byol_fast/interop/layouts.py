"""How each project names the networks of BYOL in its checkpoints.

A layout is data: a prefix for each network, prefixes that repeat another's tensors under a second
name, and prefixes of things that are no part of BYOL. Facts from each project's code; see
docs/interop.md for what was checked against the real modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

BACKBONE, PROJECTOR, PREDICTOR = "backbone", "projector", "predictor"
TARGET_BACKBONE, TARGET_PROJECTOR = "target_backbone", "target_projector"
PARTS = (BACKBONE, PROJECTOR, PREDICTOR, TARGET_BACKBONE, TARGET_PROJECTOR)

Network = Literal["online", "target"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One project's names. Prefixes end in a dot; where there are several, any may be there."""

    name: str
    about: str
    parts: Mapping[str, tuple[str, ...]]
    signs: tuple[tuple[str, ...], ...]  # recognised where all prefixes of one of these are there
    aliases: Mapping[str, str] = field(default_factory=dict)  # prefix -> the one it repeats
    other: tuple[str, ...] = ()  # known, and no part of BYOL

    def fits(self, keys: Iterable[str]) -> bool:
        keys = list(keys)
        return any(all(_has(keys, prefix) for prefix in sign) for sign in self.signs)


def _layout(
    name: str,
    about: str,
    online: tuple[str, str, str],
    target: tuple[str, str],
    signs: tuple[tuple[str, ...], ...],
    **more: object,
) -> Layout:
    prefixes = dict(zip(PARTS, (*online, *target), strict=True))
    parts = {part: tuple(text.split()) for part, text in prefixes.items() if text}
    return Layout(name=name, about=about, parts=parts, signs=signs, **more)  # type: ignore[arg-type]


LAYOUTS = (
    _layout(
        "byol_fast",
        "byol_fast's own training checkpoint or full state",
        ("online.encoder.backbone.", "online.encoder.projector.", "online.predictor."),
        ("target.backbone.", "target.projector."),
        (("online.encoder.backbone.",),),
    ),
    _layout(
        "mmselfsup0",
        "MMSelfSup 0.x and OpenMixup",
        ("online_net.0.", "online_net.1.", "head.predictor."),
        ("target_net.0.", "target_net.1."),
        (("online_net.0.",),),
        aliases={"backbone.": "online_net.0.", "neck.": "online_net.1."},
        other=("head.",),
    ),
    _layout(
        "mmpretrain",
        "mmpretrain and MMSelfSup 1.x",
        ("backbone.", "neck.", "head.predictor."),
        ("target_net.module.0.", "target_net.module.1."),
        (("target_net.module.",), ("backbone.", "neck."), ("backbone.", "head.fc.")),
        other=("target_net.steps", "head.", "data_preprocessor."),
    ),
    _layout(
        "lightly",
        "lightly",
        ("backbone.", "projection_head.layers.", "prediction_head.layers."),
        (
            "teacher_backbone. backbone_momentum.",
            "teacher_projection_head.layers. projection_head_momentum.layers.",
        ),
        (("backbone.", "projection_head."), ("backbone_momentum.",)),
        other=("online_classifier.", "criterion."),
    ),
    _layout(
        "solo-learn",
        "solo-learn",
        ("backbone.", "projector.", "predictor."),
        ("momentum_backbone.", "momentum_projector."),
        (("momentum_backbone.",), ("backbone.", "classifier.")),
        other=("classifier.", "momentum_classifier.", "knn.", "queue"),
    ),
    _layout(
        "solo-learn-encoder",
        "solo-learn before 1.0.3 (encoder. for backbone.)",
        ("encoder.", "projector.", "predictor."),
        ("momentum_encoder.", "momentum_projector."),
        (("momentum_encoder.",), ("encoder.", "classifier.")),
        other=("classifier.", "momentum_classifier.", "knn.", "queue"),
    ),
    _layout(
        "byol-pytorch",
        "lucidrains' byol-pytorch",
        ("online_encoder.net.", "online_encoder.projector.", "online_predictor."),
        ("target_encoder.net.", "target_encoder.projector."),
        (("online_encoder.net.",),),
        aliases={"net.": "online_encoder.net."},
    ),
    _layout(
        "ffcv-ssl",
        "FFCV-SSL (its target network is not saved)",
        ("net.", "projector.", "predictor."),
        ("", ""),
        (("net.", "projector."),),
        other=("fc.", "bn."),
    ),
    _layout(
        "vissl",
        "VISSL (the trunk)",
        ("_feature_blocks.", "", ""),
        ("", ""),
        (("_feature_blocks.",),),
    ),
    _layout(
        "detectron2",
        "detectron2's ResNet",
        ("", "", ""),
        ("", ""),
        (("stem.conv1.", "res2."),),
    ),
    _layout(
        "torchvision",
        "a ResNet with torchvision's keys (timm's and mmdet's are the same)",
        ("", "", ""),
        ("", ""),
        (("conv1.", "layer1.0."),),
    ),
)
NAMES = tuple(layout.name for layout in LAYOUTS)
DEEPMIND = "deepmind"  # no flat state dict: see deepmind.py
_SAME_KEYS = {
    "timm": "torchvision",
    "mmdet": "torchvision",
    "mmseg": "torchvision",
    "openmixup": "mmselfsup0",
    "mmselfsup": "mmpretrain",
    "lucidrains": "byol-pytorch",
}
CHOICES = (*NAMES, DEEPMIND, *_SAME_KEYS)


def find(keys: Iterable[str], name: str | None = None) -> Layout | None:
    """The layout called `name`, or else the first that fits the keys; None where none does.

    A name that ends in a dot is the prefix of a ResNet. One that lies alone below a prefix fits.

    Raises:
        ValueError: there is no layout of that name, or the keys are not its.
    """
    keys = list(keys)
    if name is None:
        known = next((layout for layout in LAYOUTS if layout.fits(keys)), None)
        prefixes = resnets(keys)
        return _below(prefixes[0]) if known is None and len(prefixes) == 1 else known
    if name.endswith("."):
        if name not in resnets(keys):
            raise ValueError(f"no ResNet with torchvision's keys lies below {name}")
        return _below(name)
    name = _SAME_KEYS.get(name, name)
    for layout in LAYOUTS:
        if layout.name == name:
            needed = layout.parts.get(BACKBONE, ())
            if needed and not any(_has(keys, prefix) for prefix in needed):
                raise ValueError(f"no key begins with {needed[0]}, so it is not {layout.about}")
            return layout
    raise ValueError(f"unknown layout {name!r}: one of {', '.join(CHOICES)}")


def resnets(keys: Iterable[str]) -> list[str]:
    """The prefixes below which a ResNet with torchvision's keys lies."""
    found, first = set(keys), "conv1.weight"
    prefixes = (key.removesuffix(first) for key in found if key.endswith(f".{first}"))
    return sorted(prefix for prefix in prefixes if f"{prefix}layer1.0.{first}" in found)


def _below(prefix: str) -> Layout:
    return _layout(prefix, f"a ResNet below {prefix}", (prefix, "", ""), ("", ""), ())


def clean(keys: Iterable[str]) -> dict[str, str]:
    """Key in the file -> key without what DistributedDataParallel and torch.compile put in."""
    cleaned = {key: key.replace("_orig_mod.", "") for key in keys}
    for prefix in ("module.", "model.", "module.", "backbone.bottom_up."):
        if cleaned and all(key.startswith(prefix) for key in cleaned.values()):
            cleaned = {key: value.removeprefix(prefix) for key, value in cleaned.items()}
    return cleaned


def _has(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)
