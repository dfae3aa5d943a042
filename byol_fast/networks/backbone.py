"""Backbones: any torchvision classification network by name, or any module's hidden layer.

Both become a module that maps images [N, 3, S, S] to features [N, F].
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
import torchvision
from torch import Tensor, nn

from byol_fast.networks.groupnorm import to_group_norm
from byol_fast.networks.padding import Padding, set_padding
from byol_fast.networks.stem import change_stem
from byol_fast.norm import convert

Norm = Literal["batch", "group-ws"]
Stem = Literal["imagenet", "cifar"]
HiddenLayer = int | str


class HiddenOutput(nn.Module):
    """What a layer inside `net` puts out, as [N, F]: flattened from dimension 1.

    layer: a name as in `net.named_modules()`, or None for `net`'s own output. A name is read with
    a forward hook, so all of `net` runs; parameters that the layer does not depend on are frozen
    by `build_backbone`, since nothing would ever give them a gradient.
    """

    def __init__(self, net: nn.Module, layer: str | None) -> None:
        super().__init__()
        self.net = net
        self.layer = layer
        self._seen: Any = None
        if layer is not None:
            net.get_submodule(layer).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._seen = output

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, S, S] -> [N, F]
        features = self.net(x)
        if self.layer is not None:
            features, self._seen = self._seen, None
        if not isinstance(features, Tensor):
            where = f"hidden layer {self.layer!r}" if self.layer else "the backbone"
            raise ValueError(
                f"{where} gives {type(features).__name__}, not a tensor: name a hidden layer that "
                "gives one and is run in every forward"
            )
        return features.flatten(1)


def build_backbone(
    backbone: str | nn.Module,
    *,
    stem: Stem = "imagenet",
    hidden_layer: HiddenLayer = -1,
    image_size: int = 224,
    views: int = 1,
    norm: Norm = "batch",
    padding: Padding = "symmetric",
    stem_changes: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A module from [N, 3, S, S] to features [N, F].

    backbone: a name of `torchvision.models`, freshly initialised; with `hidden_layer=-1` its last
        classifier layer is taken off and the state dict keeps torchvision's keys. Or any module,
        used as it is (not copied).
    stem: "cifar" gives a ResNet a 3×3 first convolution of stride 1 and no max-pool.
    hidden_layer: -1 for what the module puts out; otherwise a layer's name, or its index among
        the children (-2: the last but one). The layer's output is flattened from dimension 1.
    padding: what a ResNet trained elsewhere saw at the borders; see `padding.py`.
    stem_changes: how the stem of a ResNet trained elsewhere differs; see `stem.py`.
    views: above 1, BatchNorm layers become `ViewBatchNorm` with that many views, weights kept.
    norm: "group-ws" puts GroupNorm in BatchNorm's place and standardises the weights before it.

    Raises ValueError for an unknown name, layer, stem or norm, and for an image size that it cannot
    take.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm is batch or group-ws, got {norm!r}")
    if isinstance(backbone, str):
        net = _torchvision(backbone, stem, image_size)
        if stem_changes:
            if not _is_resnet(net):
                raise ValueError(f"changes of the stem are for ResNets, not for {backbone!r}")
            change_stem(net, stem_changes)
        if padding != "symmetric":
            if not _is_resnet(net):
                raise ValueError(f"padding {padding} is for ResNets, not for {backbone!r}")
            set_padding(net, padding)
        # A ResNet's pooled output is what is left once fc is off: no hook needed for it.
        if hidden_layer in (-1, -2, "avgpool") and (hidden_layer == -1 or _is_resnet(net)):
            hidden_layer = -1
            _drop_classifier(net)
    elif stem != "imagenet":
        raise ValueError("stem belongs to torchvision names; a module brings its own")
    else:
        net = backbone
    if any(torch.nn.parameter.is_lazy(p) for p in [*net.parameters(), *net.buffers()]):
        raise ValueError(
            "the backbone has lazy layers without weights: run one batch through it first, so "
            "that optimizer and target see every parameter"
        )
    if norm == "group-ws":
        net = to_group_norm(net)
    elif views > 1:
        net = convert(net, views=views)
    name = str(backbone) if isinstance(backbone, str) else type(backbone).__name__
    net = _at_layer(net, hidden_layer)
    features = _mock(net, image_size, name)
    if isinstance(net, HiddenOutput):
        _freeze_unused(net, image_size, name)
    elif not isinstance(features, Tensor) or features.dim() != 2:
        net = HiddenOutput(net, None)
        _mock(net, image_size, name)
    return net


def feature_dim(backbone: nn.Module, image_size: int) -> int:
    """F, found with one image of zeros in evaluation mode; running statistics stay untouched."""
    features = cast(Tensor, _mock(backbone, image_size, type(backbone).__name__))
    return features.shape[1]


def _torchvision(name: str, stem: Stem, image_size: int) -> nn.Module:
    if stem not in get_args(Stem):
        raise ValueError(f"stem is imagenet or cifar, got {stem!r}")
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "see torchvision.models.list_models()"
        raise ValueError(f"unknown backbone {name!r}: {hint}")
    extra: dict[str, Any] = {}
    if name.startswith("vit_"):
        extra["image_size"] = image_size  # its position embedding has one size
    elif name in ("inception_v3", "googlenet"):
        extra.update(aux_logits=False, init_weights=True)
    try:
        net: nn.Module = torchvision.models.get_model(name, weights=None, **extra)
    except AssertionError as error:  # a ViT's patches do not fill the image
        raise _misfit(name, image_size, error) from error
    if stem == "cifar":
        if not _is_resnet(net):
            raise ValueError(f"the cifar stem is for ResNets, not for {name!r}")
        conv = cast(nn.Conv2d, net.conv1)
        net.conv1 = nn.Conv2d(3, conv.out_channels, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net


def _is_resnet(net: nn.Module) -> bool:
    return isinstance(net, torchvision.models.ResNet)


def _drop_classifier(net: nn.Module) -> None:
    """Take off the layer that gives the 1000 logits, and a dropout right before it."""
    for name, module in reversed(list(net.named_modules())):
        size = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
        if isinstance(module, nn.Linear | nn.Conv2d) and size == 1000:
            parent = net.get_submodule(name.rpartition(".")[0])
            children = list(parent.named_children())
            at = [child for _, child in children].index(module)
            setattr(parent, children[at][0], nn.Identity())
            if at and isinstance(children[at - 1][1], nn.Dropout):
                setattr(parent, children[at - 1][0], nn.Identity())
            return
    raise ValueError(f"{type(net).__name__} has no classifier to take off: name a hidden_layer")


def _at_layer(net: nn.Module, hidden_layer: HiddenLayer) -> nn.Module:
    if hidden_layer == -1:
        return net
    children = [name for name, _ in net.named_children()]
    if isinstance(hidden_layer, int):
        if not -len(children) <= hidden_layer < len(children):
            raise ValueError(
                f"hidden_layer {hidden_layer}: {type(net).__name__} has {len(children)} children"
            )
        hidden_layer = children[hidden_layer]
    names = [name for name, _ in net.named_modules() if name]
    if hidden_layer not in names:
        near = difflib.get_close_matches(hidden_layer, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its children are {', '.join(children)}"
        raise ValueError(f"{type(net).__name__} has no layer {hidden_layer!r}: {hint}")
    if isinstance(net, nn.Sequential) and hidden_layer in children:
        return net[: children.index(hidden_layer) + 1]  # no hook and nothing run in vain
    return HiddenOutput(net, hidden_layer)


def _mock(net: nn.Module, image_size: int, name: str) -> Any:
    """One image of zeros through `net` in evaluation mode; every mode is restored."""
    modes = {module: module.training for module in net.modules()}
    like = next(net.parameters(), torch.empty(0))
    image = torch.zeros(1, 3, image_size, image_size, device=like.device, dtype=like.dtype)
    try:
        return net.eval()(image)
    except (RuntimeError, AssertionError) as error:
        raise _misfit(name, image_size, error) from error
    finally:
        for module, training in modes.items():
            module.training = training


def _misfit(name: str, image_size: int, error: Exception) -> ValueError:
    return ValueError(f"backbone {name!r} cannot take {image_size}×{image_size} images: {error}")


def _freeze_unused(net: nn.Module, image_size: int, name: str) -> None:
    """Freeze what the hidden layer does not depend on: DDP waits for every trainable gradient."""
    params = [p for p in net.parameters() if p.requires_grad]
    if not params:
        return
    with torch.enable_grad():
        total = _mock(net, image_size, name).sum()
        for p, grad in zip(
            params, torch.autograd.grad(total, params, allow_unused=True), strict=True
        ):
            p.requires_grad_(grad is not None)
