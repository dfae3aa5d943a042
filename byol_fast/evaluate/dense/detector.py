"""torchvision's detectors around a pretrained ResNet, laid out as in the published protocols.

The network's own layers are used, not copied. What differs from detectron2 and MMDetection is
torchvision's: the box losses are smooth L1 with β = 1/9 (theirs: L1), images are resized on the
device by bilinear interpolation without antialiasing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from byol_fast.evaluate.dense.recipes import DetectionRecipe

_SIZES = (32, 64, 128, 256, 512)  # anchors' sides in pixels
_RATIOS = (0.5, 1.0, 2.0)


def build(
    network: nn.Module,
    classes: int,
    recipe: DetectionRecipe,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> nn.Module:
    """The recipe's detector with `classes` classes (and background), all of it trainable.

    It takes a list of `[3, H, W]` in 0…1 and, in training mode, a list of targets.

    Raises:
        ValueError: the network is no ResNet.
    """
    net = resnet(network, "detection")
    sizes: dict[str, Any] = {
        "min_size": recipe.short_sides,
        "max_size": recipe.max_side,
        "image_mean": list(mean),
        "image_std": list(std),
        "rpn_pre_nms_top_n_train": recipe.before_nms[0],
        "rpn_pre_nms_top_n_test": recipe.before_nms[1],
        "rpn_post_nms_top_n_train": recipe.after_nms[0],
        "rpn_post_nms_top_n_test": recipe.after_nms[1],
        "box_batch_size_per_image": recipe.rois_per_image,
        "box_detections_per_img": recipe.detections_per_image,
    }
    detector: nn.Module = (_c4 if recipe.architecture == "c4" else _fpn)(
        net, classes, recipe, sizes
    )
    predictor = cast(Any, detector).roi_heads.box_predictor
    nn.init.normal_(predictor.cls_score.weight, std=0.01)
    nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
    nn.init.zeros_(predictor.cls_score.bias)
    nn.init.zeros_(predictor.bbox_pred.bias)
    return detector.requires_grad_(True)


def resnet(network: nn.Module, task: str) -> ResNet:
    """`network` itself; raises ValueError if it is not laid out as torchvision's ResNets."""
    if not isinstance(network, ResNet):
        raise ValueError(
            f"{task} puts its head on the stages of a ResNet, and these weights belong to a "
            f"{type(network).__name__}: use a ResNet, read at its last layer"
        )
    return network


def test_sizes(detector: nn.Module, recipe: DetectionRecipe) -> None:
    """In eval mode torchvision takes the last of the training sizes: have it take the test's."""
    cast(Any, detector).transform.min_size = (*recipe.short_sides, recipe.test_short_side)


def out_channels(stage: nn.Module) -> int:
    """Channels that a stage of a ResNet puts out."""
    block = list(stage.children())[-1]
    last = cast(nn.Conv2d, block.conv3 if hasattr(block, "conv3") else block.conv2)
    return last.out_channels


class AlignedRoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]
    """RoIAlign with pixel centres at halves and as many samples as fit a bin.

    As detectron2's ROIAlignV2 and MMDetection's RoIAlign; torchvision's own pooler is half a
    feature pixel off.
    """

    def __init__(self, names: Sequence[str], size: int, strides: Sequence[int]) -> None:
        super().__init__(list(names), size, sampling_ratio=0)
        self.strides = tuple(strides)

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:  # [N, C, H, W] each, boxes in image pixels -> [boxes, C, size, size]
        features = [x[name] for name in self.featmap_names]
        numbers = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
        rois = torch.cat([torch.cat(numbers), torch.cat(boxes)], 1)
        if len(features) == 1:
            return self._pool(features[0], rois, self.strides[0])
        lowest, highest = (int(s).bit_length() - 1 for s in (self.strides[0], self.strides[-1]))
        levels = LevelMapper(lowest, highest)(boxes)
        pooled = features[0].new_zeros(len(rois), features[0].shape[1], *self.output_size)
        for level, (feature, stride) in enumerate(zip(features, self.strides, strict=True)):
            here = torch.where(levels == level)[0]
            pooled[here] = self._pool(feature, rois[here], stride).to(pooled.dtype)
        return pooled

    def _pool(self, feature: Tensor, rois: Tensor, stride: int) -> Tensor:
        pooled: Tensor = roi_align(
            feature, rois, self.output_size, 1 / stride, sampling_ratio=0, aligned=True
        )
        return pooled


class _C4Backbone(nn.Module):
    """The network up to layer 3."""

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        self.body = nn.Sequential(
            OrderedDict(
                (name, getattr(net, name))
                for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
            )
        )
        self.out_channels = out_channels(net.layer3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        # fp32 also under autocast: anchors take this dtype, and bf16 cannot tell 1000 from 1002.
        return {"0": self.body(x).float()}


class _Layer4Head(nn.Module):
    """Layer 4 on each pooled box, one more BatchNorm as in MoCo's protocol, and the mean."""

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__()
        self.layer4 = layer4
        self.norm = nn.BatchNorm2d(out_channels(layer4))

    def forward(self, x: Tensor) -> Tensor:  # [boxes, C, size, size] -> [boxes, F]
        pooled: Tensor = self.norm(self.layer4(x)).mean((2, 3))
        return pooled


class _FpnBackbone(nn.Module):
    """All four stages and a feature pyramid, normalised as in MMSelfSup's protocol."""

    def __init__(self, net: ResNet, channels: int) -> None:
        super().__init__()
        stages = {f"layer{i + 1}": str(i) for i in range(4)}
        widths = [out_channels(getattr(net, name)) for name in stages]
        self.body = IntermediateLayerGetter(net, stages)
        self.fpn = FeaturePyramidNetwork(
            widths, channels, extra_blocks=LastLevelMaxPool(), norm_layer=nn.BatchNorm2d
        )
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        # fp32 as in _C4Backbone.
        return OrderedDict((name, level.float()) for name, level in self.fpn(self.body(x)).items())


def _c4(net: ResNet, classes: int, recipe: DetectionRecipe, sizes: dict[str, Any]) -> FasterRCNN:
    return FasterRCNN(
        _C4Backbone(net),
        rpn_anchor_generator=AnchorGenerator((_SIZES,), (_RATIOS,)),
        box_roi_pool=AlignedRoIAlign(["0"], recipe.roi_size, [4 * _first_stride(net)]),
        box_head=_Layer4Head(net.layer4),
        box_predictor=FastRCNNPredictor(out_channels(net.layer4), classes + 1),
        **sizes,
    )


def _fpn(net: ResNet, classes: int, recipe: DetectionRecipe, sizes: dict[str, Any]) -> MaskRCNN:
    backbone = _FpnBackbone(net, recipe.pyramid_channels)
    width, names = backbone.out_channels, ["0", "1", "2", "3"]
    strides = [_first_stride(net) << i for i in range(4)]
    norm = nn.BatchNorm2d
    return MaskRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in _SIZES), (_RATIOS,) * 5),
        box_roi_pool=AlignedRoIAlign(names, 7, strides),
        box_head=FastRCNNConvFCHead((width, 7, 7), [width] * 4, [1024], norm_layer=norm),
        box_predictor=FastRCNNPredictor(1024, classes + 1),
        mask_roi_pool=AlignedRoIAlign(names, 14, strides),
        mask_head=MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm),
        mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
        **sizes,
    )


def _first_stride(net: ResNet) -> int:
    """Pixels between neighbours after layer 1: 4, or 1 with the stem for small images."""
    pooled = 1 if isinstance(net.maxpool, nn.Identity) else 2
    return int(net.conv1.stride[0]) * pooled
