"""BYOL around any network, for a training loop of your own: images in, loss out.

The interface of lucidrains' byol-pytorch: `learner(images)`, `update_moving_average()`,
`return_embedding`. The networks and the loss are those of `byol_fast.model`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn, stack

from byol_fast import model
from byol_fast.average import Averaging
from byol_fast.networks.backbone import HiddenLayer
from byol_fast.norm import ViewBatchNorm
from byol_fast.views import RandomView
from pipelines.spec import AugmentSpec

Augment = Callable[[Tensor], Tensor]


class BYOL(Averaging, model.BYOL):
    """`byol_fast.model.BYOL` that makes its views itself.

    backbone: any module, whose weights are trained, or a name of torchvision.models. The module's
        layers stay its own: BatchNorm over the whole batch, hooks, modes and what is frozen.
    hidden_layer: the name of the layer whose output is the representation, or its index among the
        network's children; -1 is the network's own output (of a torchvision name without its
        classifier).
    image_size: side of the views in pixels.
    augment_fn, augment_fn2: images [N, C, H, W] to normalised views [N, C, S, S]; by default the
        paper's two views of colour images (see `RandomView`). With `augment_fn` alone both views
        are made by it. C is what the backbone takes.
    moving_average_decay: τ of `update_moving_average`.
    use_momentum: False drops the target network (SimSiam): the target is the online network behind
        a stop-gradient, and there is no average to update.
    projection_size, projection_hidden_size: of projector and predictor.
    options: the further ones of `byol_fast.model.BYOL`, such as `predictor="directpred"` or
        `norm="group-ws"`.

    Weights may be bf16 or fp16: views follow them, and the moving average loses nothing (its
    remainders are in the state dict). Otherwise keep fp32 and use autocast.

    Raises ValueError as `byol_fast.model.BYOL` does.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        hidden_layer: HiddenLayer = -1,
        image_size: int = 224,
        *,
        augment_fn: Augment | None = None,
        augment_fn2: Augment | None = None,
        moving_average_decay: float = 0.99,
        use_momentum: bool = True,
        projection_size: int = 256,
        projection_hidden_size: int = 4096,
        **options: Any,
    ) -> None:
        if not 0 <= moving_average_decay <= 1:
            raise ValueError(f"moving_average_decay is in [0, 1], got {moving_average_decay}")
        sizes = (projection_hidden_size, projection_size)
        heads = {"projector": sizes, "predictor": sizes, "momentum": use_momentum}
        super().__init__(backbone, hidden_layer, image_size, **{**heads, **options})
        self.moving_average_decay = moving_average_decay
        spec = AugmentSpec(image_size=image_size)
        self.augment1 = augment_fn or RandomView(spec, 0)
        self.augment2 = augment_fn2 or augment_fn or RandomView(spec, 1)

    def forward(
        self, x: Tensor, return_embedding: bool = False, return_projection: bool = True
    ) -> Any:
        """The loss of images [N, C, H, W], or of two views [2, N, C, S, S] made elsewhere.

        return_embedding: of images [N, C, S, S] as they are (normalise them as the views) give
            projection [N, D] and representation [N, F]; with `return_projection=False` the latter
            alone. BatchNorm takes them as one batch; call `eval()` first to use its running
            statistics.
        """
        if return_embedding:
            return self._embed(x, return_projection)
        if x.dim() == 4:
            x = stack([self.augment1(x), self.augment2(x)])
        return super().forward(x)

    def update_moving_average(self) -> None:
        """After each optimizer step: the target follows the online network by one step.

        All of it, also what has been frozen meanwhile: there the target may not have arrived.

        Raises ValueError with `use_momentum=False`: there is nothing to update.
        """
        self.update_predictor()
        if isinstance(self.target, model.StopGradient):
            raise ValueError(
                "use_momentum=False has no moving average: leave update_moving_average() out "
                "(for a directpred predictor call update_predictor())"
            )
        pairs = zip(self.target.parameters(), self.online.encoder.parameters(), strict=True)
        real = [(t, o) for t, o in pairs if o.is_floating_point() or o.is_complex()]
        self.average_([t for t, _ in real], [o for _, o in real], self.moving_average_decay)

    def _embed(self, images: Tensor, with_projection: bool) -> Tensor | tuple[Tensor, Tensor]:
        encoder = self.online.encoder
        norms = [layer for layer in encoder.modules() if isinstance(layer, ViewBatchNorm)]
        views = [layer.views for layer in norms]
        for layer in norms:
            layer.views = 1  # these are images, not two views of half as many
        try:
            representation: Tensor = encoder.backbone(self._as_input(images))
            if not with_projection:
                return representation
            return encoder.projector(representation), representation
        finally:
            for layer, count in zip(norms, views, strict=True):
                layer.views = count
