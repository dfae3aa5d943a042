"""How each project names the networks of BYOL in its checkpoints.

A layout is data: a prefix for each network, prefixes that repeat another's tensors under a second
name, and prefixes of things that are no part of BYOL. Facts from each project's code; see
docs/interop.md for what was checked against the real modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from byol_fast.interop import resnet

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
    spelling: str = ""  # of a bare ResNet's keys, as `resnet.prefixes` has it

    def fits(self, keys: Iterable[str]) -> bool:
        keys = list(keys)
        if self.spelling:
            return resnet.prefixes(keys).get("") == self.spelling
        return any(all(_has(keys, prefix) for prefix in sign) for sign in self.signs)

    def below(self, prefix: str) -> Layout:
        """The same layout in a file where all of it stands below a prefix."""
        return replace(
            self,
            about=f"{self.about}, below {prefix}",
            parts={part: tuple(prefix + p for p in found) for part, found in self.parts.items()},
            aliases={prefix + alias: prefix + of for alias, of in self.aliases.items()},
            other=tuple(prefix + each for each in self.other),
        )


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


def _bare(spelling: str, about: str) -> Layout:
    return Layout(name=spelling, about=about, parts={}, signs=(), spelling=spelling)


_STHALLES = "online_network_state_dict"
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
        "pytorch-byol",
        "sthalles' PyTorch-BYOL (its predictor is not saved)",
        (f"{_STHALLES}.encoder.", f"{_STHALLES}.projetion.net. {_STHALLES}.projection.net.", ""),
        (
            "target_network_state_dict.encoder.",
            "target_network_state_dict.projetion.net. target_network_state_dict.projection.net.",
        ),
        ((f"{_STHALLES}.encoder.",),),
        aliases={"encoder_state_dict.": f"{_STHALLES}.encoder."},
    ),
    _bare("detectron2", "detectron2's ResNet"),
    _bare("transformers", "Hugging Face transformers' ResNet"),
    _bare("sequential", "a ResNet's children in an nn.Sequential"),
    _bare("torchvision", "a ResNet with torchvision's keys (timm's and mmdet's are the same)"),
)
_BARE = tuple(layout.name for layout in LAYOUTS if layout.spelling)
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
_MOST_PREFIXES = 500  # of two names at most; a ResNet has 30
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = ("module.", "_forward_module.", "model.", "backbone.bottom_up.")
COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel
CHOICES = (*NAMES, DEEPMIND, *_SAME_KEYS)


def find(keys: Iterable[str], name: str | None = None) -> Layout | None:
    """The layout called `name`, or else the first that fits the keys; None where none does.

    A name that ends in a dot is the prefix of a ResNet. A ResNet that lies alone below a prefix
    fits, and so does a project's layout: a learner that is part of a larger module.

    Raises:
        ValueError: there is no layout of that name, or the keys are not its.
    """
    keys = list(keys)
    found = resnet.prefixes(keys)
    if name is None:
        known = next((layout for layout in LAYOUTS if layout.fits(keys)), None)
        known = known or _moved(keys, LAYOUTS)
        return _below(found, *found) if known is None and len(found) == 1 else known
    if name.endswith("."):
        if name not in found:
            raise ValueError(
                f"no ResNet known here lies below {name}"
                + (f": there are {', '.join(found)}" if any(found) else "")
            )
        return _below(found, name)
    name = _SAME_KEYS.get(name, name)
    layout = next((each for each in LAYOUTS if each.name == name), None)
    if layout is None:
        raise ValueError(f"unknown layout {name!r}: one of {', '.join(CHOICES)}")
    if layout.spelling:
        alone = len(found) == 1 and "" not in found
        return _below(found, *found) if alone else layout
    needed = layout.parts[BACKBONE]
    if any(_has(keys, prefix) for prefix in needed):
        return layout
    if (moved := _moved(keys, (layout,))) is None:
        raise ValueError(f"no key begins with {needed[0]}, so it is not {layout.about}")
    return moved


def _moved(keys: list[str], among: Iterable[Layout]) -> Layout | None:
    """The layout that the keys below a prefix have, where there is one such prefix."""
    tops: dict[str, list[str]] = {}
    for key in keys:
        first, dot, rest = key.partition(".")
        second = rest.partition(".")
        tops.setdefault(first + dot, []).append(rest)
        if second[1]:
            tops.setdefault(f"{first}.{second[0]}.", []).append(second[2])
    projects = [layout for layout in among if not layout.spelling]
    found = {
        prefix: layout.below(prefix)
        for prefix, inner in tops.items()
        if prefix.endswith(".") and len(tops) <= _MOST_PREFIXES
        for layout in projects
        if layout.fits(inner) and resnet.prefixes(inner)
    }
    return next(iter(found.values())) if len(found) == 1 else None


def _below(found: Mapping[str, str], prefix: str) -> Layout:
    """A ResNet below a prefix, in the spelling that was found there."""
    about = next(layout.about for layout in LAYOUTS if layout.spelling == found[prefix])
    about = f"a ResNet below {prefix}" if found[prefix] == "torchvision" else f"{about}, {prefix}"
    whole = found[prefix] == "transformers"
    other = ("classifier.",) if whole else ()
    return _layout(prefix, about, (prefix, "", ""), ("", ""), (), other=other)


def clean(keys: Iterable[str]) -> dict[str, str]:
    """Key in the file -> key without what DistributedDataParallel, FSDP, DeepSpeed, Lightning and
    torch.compile put in."""
    cleaned = {str(key): _WRAPPERS.sub("", str(key)) for key in keys}
    while True:
        inner = [key for key in cleaned.values() if key not in COUNTERS]
        outer = next((p for p in _OUTER if inner and all(k.startswith(p) for k in inner)), None)
        if outer is None:
            return cleaned
        cleaned = {key: value.removeprefix(outer) for key, value in cleaned.items()}


def _has(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)
