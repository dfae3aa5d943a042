"""BYOL: an online network with a predictor, and a target that follows it (paper, section 3)."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torchvision.models import ResNet

from byol_fast.loss import pair_loss
from byol_fast.networks.backbone import HiddenLayer, Norm, Stem, build_backbone, feature_dim
from byol_fast.networks.groupnorm import to_group_norm
from byol_fast.networks.initial import Init, as_authors_
from byol_fast.networks.mock import input_like, mixes_views, mock
from byol_fast.networks.predictors import DirectPred
from byol_fast.networks.sharing import detached_copy
from byol_fast.norm import Sync, ViewBatchNorm, convert, set_sync, synchronised

__all__ = ["BYOL", "MLP", "Encoder", "Online", "StopGradient", "build_backbone", "feature_dim"]

VIEWS = 2
Predictor = tuple[int, int] | Literal["directpred", "none"]


class MLP(nn.Sequential):
    """[N, in] to [N, out]: Linear with bias – BatchNorm – ReLU – Linear without bias.

    The authors' projector and predictor; torch's default initialisation.

    depth: the number of Linear layers; all but the last are followed by BatchNorm and ReLU.
    last_bias: whether the last of them has a bias.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        *,
        depth: int = 2,
        last_bias: bool = False,
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth is the number of Linear layers, at least 1; got {depth}")
        widths = [in_features, *[hidden] * (depth - 1)]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers.append(nn.Linear(before, after))
            layers.append(ViewBatchNorm(after, eps=1e-5, momentum=0.1, views=VIEWS))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers, nn.Linear(widths[-1], out_features, bias=last_bias))


class PerView(nn.Module):
    """A module whose BatchNorm stays per view when torch makes SyncBatchNorm of it."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As nn.Module's; `nn.SyncBatchNorm.convert_sync_batchnorm` puts its layers in by this.

        They become ViewBatchNorm again, which then shares its statistics over the ranks.
        """
        if module and any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
            convert(module, views=VIEWS)
        super().add_module(name, module)


class Encoder(PerView):
    """Backbone and projector: images [N, C, S, S] to projections [N, D]."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.projector(self.backbone(x)))


class Online(PerView):
    """The trained network; the one to wrap in DistributedDataParallel or to compile."""

    def __init__(self, encoder: Encoder, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [V*B, C, S, S], view 0 first, to prediction and projection [V*B, D] and
        representation [V*B, F].

        The last two are detached: they are there for gauges and probes, not for a loss.
        """
        representation = self.encoder.backbone(x)
        projection = self.encoder.projector(representation)
        return self.predictor(projection), projection.detach(), representation.detach()


class StopGradient(nn.Module):
    """SimSiam's target: the online encoder itself, without gradient and without weights here."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self._encoder = (encoder,)  # in a tuple: not registered, so nothing is saved twice

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return cast(Tensor, self._encoder[0](x))
        # Weights cast here must not be kept: without a gradient, torch 2.10 gives the same ones to
        # the online pass, whose weights then get none (pytorch issue 65766).
        with torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False):
            return cast(Tensor, self._encoder[0](x))


class BYOL(PerView):
    """Online and target network, and their loss.

    backbone, hidden_layer, image_size, stem: see `build_backbone`. Of a module given as backbone
        the weights are trained; its layers stay as they are.
    projector, predictor: (hidden, out) sizes. The predictor may also be "directpred", a linear one
        that `update_predictor` sets from the projections (see `DirectPred`), or "none".
    norm: "group-ws" has GroupNorm and weight standardisation for BatchNorm, in the heads too.
    bn_sync: share BatchNorm statistics over ranks, in both networks. As SyncBatchNorm layers in
        the backbone ask for it too, and `nn.SyncBatchNorm.convert_sync_batchnorm` of this module.
    momentum: False drops the target network for a stop-gradient (SimSiam); then there is no EMA.
    init: "authors" draws the weights of the heads, and of a ResNet given by name, as the authors
        do (see `as_authors_`), the target's by themselves. With "torch" they are torchvision's and
        torch's, and the target starts as a copy. A module that is given keeps its weights.

    The projector's input size is found with a mock forward here, so an optimizer built after this
    sees every parameter. The target shares no tensor with the online encoder, takes no gradient,
    and normalises with batch statistics like the online network (keep it in train mode); it tracks
    running statistics of its own so that it can be exported.

    Raises ValueError where `build_backbone` does, for an unknown init, and if sizes do not fit.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        hidden_layer: HiddenLayer = -1,
        image_size: int = 224,
        *,
        projector: tuple[int, int] = (4096, 256),
        predictor: Predictor = (4096, 256),
        norm: Norm = "batch",
        stem: Stem = "imagenet",
        bn_sync: Sync = False,
        momentum: bool = True,
        init: Init = "torch",
    ) -> None:
        super().__init__()
        if init not in get_args(Init):
            raise ValueError(f"init is one of {', '.join(get_args(Init))}; got {init!r}")
        net = build_backbone(
            backbone,
            stem=stem,
            hidden_layer=hidden_layer,
            image_size=image_size,
            views=VIEWS,
            norm=norm,
        )
        name = type(backbone).__name__
        if torch.is_inference_mode_enabled() or any(
            tensor.is_inference() for tensor in [*net.parameters(), *net.buffers()]
        ):
            raise ValueError(
                "tensors that are made under torch.inference_mode() cannot be trained: make BYOL, "
                "and make and load its backbone, outside"
            )
        if not isinstance(backbone, str) and mixes_views(net, image_size):
            warnings.warn(
                f"{name} takes something over the whole batch, without nn.BatchNorm: the features "
                "of a view depend on the other view, which BYOL's do not",
                stacklevel=2,
            )
        with torch.no_grad():
            features = cast(Tensor, mock(net, image_size, name))
        self.feature_dim = features.shape[1]
        heads: list[nn.Module] = [MLP(self.feature_dim, *projector)]
        heads.append(_predictor(projector[1], predictor))
        heads = [head.to(features.device, features.dtype) for head in heads]
        if norm == "group-ws":
            heads = [to_group_norm(head) for head in heads]
        encoder = Encoder(net, heads[0])
        self.online = Online(encoder, heads[1])
        # A network that was handed in keeps its weights; other architectures have their own ways.
        resnet = isinstance(backbone, str) and any(isinstance(m, ResNet) for m in net.modules())
        if init == "authors":
            for part in [self.online] if resnet else heads:
                as_authors_(part)
        self.target: Encoder | StopGradient = StopGradient(encoder)
        if momentum:
            self.target = cast(Encoder, detached_copy(encoder)).requires_grad_(False)
            if init == "authors":
                as_authors_(self.target if resnet else self.target.projector)
        set_sync(self, bn_sync or synchronised(net))
        # What BYOL(**hyper) needs to build the same again; a module has only its class's name.
        self.hyper: dict[str, Any] = {
            "backbone": backbone if isinstance(backbone, str) else type(backbone).__name__,
            "hidden_layer": hidden_layer,
            "image_size": image_size,
            "projector": tuple(projector),
            "predictor": predictor if isinstance(predictor, str) else tuple(predictor),
            "norm": norm,
            "stem": stem,
            "bn_sync": bool(bn_sync),
            "momentum": momentum,
            "init": init,
        }

    def online_ema_params(self) -> list[Tensor]:
        """The online encoder's trainable parameters, in the order of `target_ema_params`."""
        if isinstance(self.target, StopGradient):
            return []
        return [p for p in self.online.encoder.parameters() if p.requires_grad]

    def target_ema_params(self) -> list[Tensor]:
        """The target parameters that follow; empty with `momentum=False`."""
        if isinstance(self.target, StopGradient):
            return []
        online = self.online.encoder.parameters()
        pairs = zip(online, self.target.parameters(), strict=True)
        return [mine for leader, mine in pairs if leader.requires_grad]

    def update_predictor(self) -> None:
        """After each optimizer step: sets a predictor that is not trained; nothing for an MLP."""
        if isinstance(self.online.predictor, DirectPred):
            self.online.predictor.update()

    def forward(self, x: Tensor) -> Tensor:  # [2, B, C, S, S] -> scalar
        """The symmetric loss of two views: sum of both directions, mean over the batch."""
        if x.dim() != 5 or x.shape[0] != VIEWS:
            raise ValueError(f"expected two views [2, B, C, S, S], got {list(x.shape)}")
        if any(isinstance(m, nn.SyncBatchNorm) for m in self.modules()):
            convert(self, views=VIEWS)  # somebody has made them of a part's layers
        flat = self._as_input(x.flatten(0, 1))
        with torch.no_grad():
            projection = self.target(flat)
        prediction, _, _ = self.online(flat)
        return pair_loss(prediction, projection)

    def _as_input(self, images: Tensor) -> Tensor:
        """Images in the type of the weights, unless autocast chooses types."""
        if not images.is_floating_point():
            raise ValueError(f"views are normalised floats, got {images.dtype}")
        if images.is_inference():
            images = images.clone()  # else nothing of them could be kept for the backward pass
        kind = images.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return images
        return images.to(input_like(self.online.encoder.backbone).dtype)


def _predictor(dim: int, predictor: Predictor) -> nn.Module:
    """From `dim` to `dim`."""
    if predictor == "directpred":
        return DirectPred(dim)
    if predictor == "none":
        return nn.Identity()
    if isinstance(predictor, str):
        raise ValueError(f"predictor is (hidden, out), directpred or none; got {predictor!r}")
    if predictor[1] != dim:
        raise ValueError(
            f"projector and predictor must end in the same size, got {dim} and {predictor[1]}: "
            "the prediction is compared with the projection"
        )
    return MLP(dim, *predictor)
