"""BYOL: an online network with a predictor, and a target that follows it (paper, section 3)."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from byol_fast.backbone import HiddenLayer, Stem, build_backbone, feature_dim
from byol_fast.loss import pair_loss
from byol_fast.norm import Sync, ViewBatchNorm, set_sync

__all__ = ["BYOL", "MLP", "Encoder", "Online", "StopGradient", "build_backbone", "feature_dim"]

VIEWS = 2


class MLP(nn.Sequential):
    """[N, in] to [N, out]: Linear with bias – BatchNorm – ReLU – Linear without bias.

    The authors' projector and predictor; torch's default initialisation.
    """

    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__(
            nn.Linear(in_features, hidden),
            ViewBatchNorm(hidden, eps=1e-5, momentum=0.1, views=VIEWS),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out_features, bias=False),
        )


class Encoder(nn.Module):
    """Backbone and projector: images [N, 3, S, S] to projections [N, D]."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.projector(self.backbone(x)))


class Online(nn.Module):
    """The trained network; the one to wrap in DistributedDataParallel or to compile."""

    def __init__(self, encoder: Encoder, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [V*B, 3, S, S], view 0 first, to prediction and projection [V*B, D] and
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
        return cast(Tensor, self._encoder[0](x))


class BYOL(nn.Module):
    """Online and target network, and their loss.

    backbone, hidden_layer, image_size, stem: see `build_backbone`. A module given as backbone
        becomes the online backbone itself (its BatchNorm layers are replaced), and is trained.
    projector, predictor: (hidden, out) sizes.
    bn_sync: share BatchNorm statistics over ranks, in both networks.
    momentum: False drops the target network for a stop-gradient (SimSiam); then there is no EMA.

    The projector's input size is found with a mock forward here, so an optimizer built after this
    sees every parameter. The target starts as a copy of the online encoder, shares no tensor with
    it, takes no gradient, and normalises with batch statistics like the online network (keep it in
    train mode); it tracks running statistics of its own so that it can be exported.

    Raises ValueError where `build_backbone` does, and if the sizes do not fit.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        hidden_layer: HiddenLayer = -1,
        image_size: int = 224,
        *,
        projector: tuple[int, int] = (4096, 256),
        predictor: tuple[int, int] = (4096, 256),
        stem: Stem = "imagenet",
        bn_sync: Sync = False,
        momentum: bool = True,
    ) -> None:
        super().__init__()
        if projector[1] != predictor[1]:
            raise ValueError(
                f"projector and predictor must end in the same size, got {projector[1]} and "
                f"{predictor[1]}: the prediction is compared with the projection"
            )
        net = build_backbone(
            backbone, stem=stem, hidden_layer=hidden_layer, image_size=image_size, views=VIEWS
        )
        self.feature_dim = feature_dim(net, image_size)
        like = next(net.parameters(), torch.empty(0))
        encoder = Encoder(net, MLP(self.feature_dim, *projector).to(like.device, like.dtype))
        self.online = Online(encoder, MLP(projector[1], *predictor).to(like.device, like.dtype))
        self.target: Encoder | StopGradient = (
            copy.deepcopy(encoder).requires_grad_(False) if momentum else StopGradient(encoder)
        )
        set_sync(self, bn_sync)
        # What BYOL(**hyper) needs to build the same again; a module has only its class's name.
        self.hyper: dict[str, Any] = {
            "backbone": backbone if isinstance(backbone, str) else type(backbone).__name__,
            "hidden_layer": hidden_layer,
            "image_size": image_size,
            "projector": tuple(projector),
            "predictor": tuple(predictor),
            "stem": stem,
            "bn_sync": bool(bn_sync),
            "momentum": momentum,
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

    def forward(self, x: Tensor) -> Tensor:  # [2, B, 3, S, S] -> scalar
        """The symmetric loss of two views: sum of both directions, mean over the batch."""
        if x.dim() != 5 or x.shape[0] != VIEWS:
            raise ValueError(f"expected two views [2, B, 3, S, S], got {list(x.shape)}")
        flat = x.flatten(0, 1)
        with torch.no_grad():
            projection = self.target(flat)
        prediction, _, _ = self.online(flat)
        return pair_loss(prediction, projection)
