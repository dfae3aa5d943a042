"""BYOL as a function of a pair of views, with the predictor learned or in closed form.

The interface of markpesic/BYOL under its names, made to work. What differs from that code is listed
in docs/library.md; the main thing is that `updateTargetNetwork` updates the target network.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from byol_fast.average import Averaging
from byol_fast.loss import pair_loss
from byol_fast.model import MLP, VIEWS, Encoder, PerView, StopGradient
from byol_fast.networks.backbone import build_backbone, feature_dim
from byol_fast.networks.predictors import closed_form
from byol_fast.views import CentreView, RandomView
from pipelines.spec import AugmentSpec

_MOCK_SIZE = 224  # any size does for a ResNet


class BYOL(Averaging, PerView):
    """Online and target network; a pair of views in, four tensors out.

    input_size: F, the features of `backend`: 512 for resnet18 and 34, 2048 for the larger ones.
    hidden_size, output_size: of projector and predictor.
    depth_proj, depth_pred: their numbers of Linear layers (with bias), BatchNorm and ReLU between.
    closedFormPredicator: instead of a trained predictor the ridge regression that best predicts
        the target's projections from the online ones, solved anew for every pair of batches and
        over all ranks (see `closed_form`). One for both directions, and a constant to the gradient.
        The batch's views must be more than `output_size`, or they are fitted without error.
    EAvg: whether the target is a moving average of the online network, decay `t`; False is a
        stop-gradient (SimSiam), and `updateTargetNetwork` then has nothing to do.
    backend: a name of torchvision.models. pretrained: start from torchvision's ImageNet weights.

    Raises ValueError for an unknown backend, a size that is not its, and for weights that cannot be
    fetched.
    """

    def __init__(
        self,
        input_size: int = 2048,
        hidden_size: int = 4096,
        output_size: int = 256,
        depth_proj: int = 2,
        depth_pred: int = 2,
        closedFormPredicator: bool = False,
        EAvg: bool = True,
        t: float = 0.996,
        backend: str = "resnet50",
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= t <= 1:
            raise ValueError(f"t, the decay of the moving average, is in [0, 1]; got {t}")
        net = build_backbone(backend, image_size=_MOCK_SIZE, views=VIEWS)
        found = feature_dim(net, _MOCK_SIZE)
        if found != input_size:
            raise ValueError(
                f"{backend} gives {found} features, not {input_size}: use input_size={found}"
            )
        if pretrained:
            loaded = net.load_state_dict(_published_weights(backend), strict=False)
            assert not loaded.missing_keys  # unexpected is the classifier, which is off
        self.t, self.closedForm, self.EAvg = t, closedFormPredicator, EAvg
        sizes = (hidden_size, output_size)
        projector = MLP(input_size, *sizes, depth=depth_proj, last_bias=True)
        self.online = Encoder(net, projector)
        self.predictor: nn.Module | None = None
        if not closedFormPredicator:
            self.predictor = MLP(output_size, *sizes, depth=depth_pred, last_bias=True)
        self.target: Encoder | StopGradient = (
            copy.deepcopy(self.online).requires_grad_(False) if EAvg else StopGradient(self.online)
        )

    def forward(self, x: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views [N, 3, S, S] to onlinex, onlinex1, targetx, targetx1, each [N, output_size].

        The first two are predictions, the last two projections without gradient.
        """
        if x.shape != x1.shape or x.dim() != 4:
            raise ValueError(
                f"expected two views [N, 3, S, S] of the same images, got {list(x.shape)} and "
                f"{list(x1.shape)}"
            )
        both = torch.cat([x, x1])  # BatchNorm keeps the views apart
        with torch.no_grad():
            target = self.target(both)
        online = self.online(both)
        if self.predictor is not None:
            online = self.predictor(online)
        else:
            _warn_of_few_rows(*online.shape)
            wanted = target.unflatten(0, (2, -1)).flip(0).flatten(0, 1)  # the other view's
            online = online @ closed_form(online, wanted).to(online.dtype)
        return *_halves(online), *_halves(target)

    @torch.no_grad()
    def updateTargetNetwork(self) -> None:
        """After each optimizer step: target = t·target + (1 − t)·online. Nothing if not EAvg."""
        if isinstance(self.target, Encoder):
            followers: list[Tensor] = list(self.target.parameters())
            self.average_(followers, list(self.online.parameters()), self.t)


def criterion(onlinex: Tensor, targetx1: Tensor, onlinex1: Tensor, targetx: Tensor) -> Tensor:
    """2 − 2·cos of both directions, summed, and averaged over the images: a scalar in [0, 8]."""
    return pair_loss(torch.cat([onlinex, onlinex1]), torch.cat([targetx, targetx1]))


def get_byol_transforms(
    size: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[RandomView, RandomView, CentreView]:
    """Transforms of the first view, of the second, and for evaluation.

    On batches [N, 3, H, W] or single images [3, H, W], uint8 or floats in [0, 1], on any device, to
    float32 [.., 3, size, size] normalised by `mean` and `std`. The two views are the paper's, with
    torchvision's meaning of the operations.
    """
    three = cast("tuple[tuple[float, float, float], ...]", (tuple(mean), tuple(std)))
    if [len(values) for values in three] != [3, 3]:
        raise ValueError(f"mean and std have a value for each of three channels, got {mean}, {std}")
    spec = AugmentSpec(image_size=size, semantics="torchvision", mean=three[0], std=three[1])
    return RandomView(spec, 0), RandomView(spec, 1), CentreView(spec)


def _halves(both: Tensor) -> tuple[Tensor, Tensor]:
    first, second = both.chunk(2)
    return first, second


def _warn_of_few_rows(rows: int, dim: int) -> None:
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if rows * ranks <= dim:
        warnings.warn(
            f"closedFormPredicator: {rows * ranks} views in {dim} dimensions are predicted without "
            f"error whatever they are, so nothing is learned: use a batch of more than {dim // 2} "
            f"images, or an output_size well below {rows * ranks}",
            stacklevel=3,
        )


def _published_weights(backend: str) -> dict[str, Tensor]:
    """torchvision's first ImageNet weights of that network, from its cache or the network."""
    enum = torchvision.models.get_model_weights(backend)
    weights = next(iter(enum))
    try:
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:  # no network; or a download whose hash is not right
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise ValueError(
            f"pretrained=True: {weights.url} could not be fetched ({error}). Put the file into "
            f"{folder}, or use pretrained=False"
        ) from error
    return state
