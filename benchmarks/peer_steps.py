"""The BYOL step of other packages, as their own examples write it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.stepping import StepSettings
from byol_fast.step import AUTOCAST

Step = Callable[[], object]
WAYS = ("as shipped", "channels_last", "channels_last, compiled")


def _views(settings: StepSettings, device: torch.device, way: str) -> tuple[Tensor, Tensor]:
    side = settings.image_size
    views = torch.randn(2, settings.batch, 3, side, side, device=device)
    first, second = views
    if way != WAYS[0]:
        first, second = (v.contiguous(memory_format=torch.channels_last) for v in views)
    return first, second


def _prepared(network: nn.Module, device: torch.device, way: str) -> nn.Module:
    network = network.to(device)
    return network if way == WAYS[0] else network.to(memory_format=torch.channels_last)


def lightly(settings: StepSettings, device: torch.device, way: str) -> tuple[Step, Step]:
    """As lightly's BYOL example: two passes of each network, its loss, its LARS, its average."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.utils.lars import LARS as TheirLARS

    backbone, width = _torchvision(settings.backbone)
    hidden = settings.hidden_size
    encoder = nn.Sequential(backbone, BYOLProjectionHead(width, hidden, 256))
    encoder = _prepared(encoder, device, way)
    teacher = copy.deepcopy(encoder)
    deactivate_requires_grad(teacher)
    student = nn.Sequential(encoder, _prepared(BYOLPredictionHead(256, hidden, 256), device, way))
    criterion = NegativeCosineSimilarity()
    optimizer = TheirLARS(student.parameters(), lr=0.1, momentum=0.9, weight_decay=1.5e-6)
    views, dtype = _views(settings, device, way), AUTOCAST.get(settings.precision)
    online, target = student, teacher
    if way == WAYS[2]:
        online, target = torch.compile(student), torch.compile(teacher)

    def update() -> None:
        optimizer.step()
        update_momentum(encoder, teacher, m=0.99)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            predictions = [online(view) for view in views]
            with torch.no_grad():
                projections = [target(view) for view in views]
            loss = criterion(predictions[0], projections[1])
            loss = loss + criterion(predictions[1], projections[0])
        loss.backward()
        update()

    return step, update


def lucidrains(settings: StepSettings, device: torch.device, way: str) -> tuple[Step, Step]:
    """As byol-pytorch's README: its learner, Adam, its average; our views for its augmentations."""
    from byol_pytorch import BYOL as TheirBYOL

    net = torchvision.models.get_model(settings.backbone, weights=None)
    views, dtype = _views(settings, device, way), AUTOCAST.get(settings.precision)
    learner = TheirBYOL(
        _prepared(net, device, way),
        image_size=settings.image_size,
        hidden_layer="avgpool",
        projection_hidden_size=settings.hidden_size,
        augment_fn=lambda x: views[0],
        augment_fn2=lambda x: views[1],
    ).to(device)
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-4)
    call: Any = torch.compile(learner) if way == WAYS[2] else learner

    def update() -> None:
        optimizer.step()
        learner.update_moving_average()

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = call(views[0])
        optimizer.zero_grad()
        loss.backward()
        update()

    return step, update


def _torchvision(name: str) -> tuple[nn.Module, int]:
    net = torchvision.models.get_model(name, weights=None)
    width = net.fc.in_features
    net.fc = nn.Identity()
    return net, width
