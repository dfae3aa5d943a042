"""Backbones: any torchvision classification network by name, or any module's hidden layer.

Both become a module that maps images [N, C, S, S] to features [N, F].
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

import torch
import torchvision
from torch import Tensor, nn

from byol_fast.networks.groupnorm import to_group_norm
from byol_fast.networks.mock import mock, side
from byol_fast.networks.padding import Padding, set_padding
from byol_fast.networks.sharing import sharing, usable
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
        self._running = False
        # Where a parameter is in a network that was handed in, and where its frozen alias is here.
        self._idle: list[tuple[dict[str, Any], nn.Module, str]] = []
        if layer is not None:
            net.get_submodule(layer).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:  # gradient checkpointing runs layers again in the backward pass
            # A copy: an in-place ReLU or += of the next layer would change it.
            self._seen = output.clone() if isinstance(output, Tensor) else output

    def forward(self, x: Tensor) -> Tensor:  # [N, C, S, S] -> [N, F]
        self._running = True
        try:
            features = self.net(x)
            if self.layer is not None:
                features = self._seen
        finally:
            self._running, self._seen = False, None
        where = f"hidden layer {self.layer!r}" if self.layer else "the backbone"
        if not isinstance(features, Tensor):
            raise ValueError(
                f"{where} gives {type(features).__name__}, not a tensor: name a hidden layer that "
                "gives one and is run in every forward"
            )
        if features.dim() < 2:
            raise ValueError(
                f"{where} gives a tensor of shape {list(features.shape)}: features are [N, …], "
                "name another hidden layer"
            )
        return features.flatten(1)

    def freeze(self, parameters: set[Tensor], given: nn.Module | None) -> None:
        """Freeze parameters here; those of `given`, which `net` shares, stay trainable there."""
        if given is None:
            for parameter in parameters:
                parameter.requires_grad_(False)
            return
        aliases = {p: nn.Parameter(p.detach(), requires_grad=False) for p in parameters}
        for layer in self.net.modules():
            theirs = layer._parameters
            here = {n: aliases[p] for n, p in theirs.items() if p is not None and p in aliases}
            if here:
                layer._parameters = {**theirs, **here}
                self._idle += [(theirs, layer, name) for name in here]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HiddenOutput:
        """As nn.Module's (`.to`, `.half`, …): what is frozen here goes along in its network."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for theirs, layer, name in self._idle:
            mine = layer._parameters[name]
            assert mine is not None
            if torch._has_compatible_shallow_copy_type(theirs[name].data, mine.data):
                theirs[name].data = mine.data
            else:  # from the meta device
                theirs[name] = nn.Parameter(mine.data, theirs[name].requires_grad)
        return self


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
    """A module from [N, C, S, S] to features [N, F]; C is 3 for torchvision's networks.

    backbone: a name of `torchvision.models`, freshly initialised; with `hidden_layer=-1` its last
        classifier layer is taken off and the state dict keeps torchvision's keys. Or any module:
        what is returned shares its parameters and buffers, and leaves its layers, hooks, modes
        and `requires_grad` alone (with norm="group-ws" its layers are replaced, as nothing else
        could use the weights).
    stem: "cifar" gives a ResNet a 3×3 first convolution of stride 1 and no max-pool.
    hidden_layer: -1 for what the module puts out; otherwise a layer's name, or its index among
        the children (-2: the last but one). The layer's output is flattened from dimension 1.
    padding: what a ResNet trained elsewhere saw at the borders; see `padding.py`.
    stem_changes: how the stem of a ResNet trained elsewhere differs; see `stem.py`.
    views: above 1, BatchNorm layers become `ViewBatchNorm` with that many views, weights kept.
    norm: "group-ws" puts GroupNorm in BatchNorm's place and standardises the weights before it.

    Raises ValueError for an unknown name, layer, stem or norm, for an image size that it cannot
    take, and for a module that cannot be trained (wrapped in DataParallel, TorchScript, lazy).
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm is batch or group-ws, got {norm!r}")
    size, given = side(image_size), None
    if isinstance(backbone, str):
        net = _torchvision(backbone, stem, size)
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
        given = usable(backbone)
        if norm == "group-ws":
            to_group_norm(given)
        net = sharing(given)
    if norm == "group-ws":
        net = to_group_norm(net)
    elif views > 1:
        net = convert(net, views=views)
    name = backbone if isinstance(backbone, str) else type(backbone).__name__
    net = _at_layer(net, hidden_layer)
    with torch.no_grad():
        features = mock(net, size, name)
    if isinstance(net, HiddenOutput):
        net.freeze(_unused(net, size, name), given)
    elif not isinstance(features, Tensor) or features.dim() != 2:
        net = HiddenOutput(net, None)
        with torch.no_grad():
            features = mock(net, size, name)
    if not features.is_floating_point():
        raise ValueError(f"backbone {name!r} gives features of {features.dtype}, not real numbers")
    if features.shape[0] != 1:
        raise ValueError(
            f"backbone {name!r} gives {list(features.shape)} for one image: its first dimension is "
            "not the batch's; name another hidden layer"
        )
    return net


def feature_dim(backbone: nn.Module, image_size: int) -> int:
    """F, found with one image of zeros in evaluation mode; running statistics stay untouched."""
    with torch.no_grad():
        features = cast(Tensor, mock(backbone, image_size, type(backbone).__name__))
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
        raise ValueError(
            f"backbone {name!r} cannot take {image_size}×{image_size} images: {error}"
        ) from error
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
    if isinstance(hidden_layer, bool) or not isinstance(hidden_layer, int | str):
        raise ValueError(f"hidden_layer is a layer's name or index, got {hidden_layer!r}")
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


def _unused(net: nn.Module, image_size: int, name: str) -> set[Tensor]:
    """Trainable parameters that the hidden layer does not depend on: DDP waits for gradients."""
    params = [p for p in net.parameters() if p.requires_grad]
    if any(p.is_inference() for p in net.parameters()):
        return set()  # nothing can be trained

    def without_gradient(features: Tensor) -> set[Tensor]:
        if not features.requires_grad:  # all that it depends on is frozen
            return set(params)
        grads = torch.autograd.grad(features.sum(), params, allow_unused=True)
        return {p for p, grad in zip(params, grads, strict=True) if grad is None}

    with torch.enable_grad():
        return cast("set[Tensor]", mock(net, image_size, name, without_gradient))
