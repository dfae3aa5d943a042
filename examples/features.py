"""Features from a trained backbone, and a nearest-neighbour answer from them.

`python examples/features.py [FILE]` takes an exported backbone (`runs/byol/exports/
backbone.safetensors`) or a run folder; without one it trains a small network for a few steps.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import interpolate, normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run in a checkout

from byol_fast import BYOL, load_backbone
from byol_fast.export import export_backbone
from byol_fast.views import CentreView
from pipelines.spec import AugmentSpec

torch.manual_seed(0)
palette = torch.rand(4, 3, 1, 1)  # of four classes


def labelled_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % 4
    blotches = interpolate(torch.rand(count, 3, 4, 4), size=40, mode="bilinear")
    return (0.6 * palette[labels] + 0.4 * blotches).clamp(0, 1), labels


def trained(folder: str) -> Path:
    learner = BYOL("resnet18", image_size=32, projection_size=64, projection_hidden_size=256)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(6):
        loss = learner(labelled_images(16)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.update_moving_average()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    path, _ = export_backbone(learner.online.encoder.backbone, f"{folder}/backbone", learner.hyper)
    return path


with tempfile.TemporaryDirectory() as folder:
    encoder = load_backbone(sys.argv[1] if len(sys.argv) > 1 else trained(folder))

prepare = CentreView(AugmentSpec(image_size=32))  # the middle square, resized and normalised
known, labels = labelled_images(32)
asked, truth = labelled_images(16)
with torch.no_grad():
    bank = normalize(encoder(prepare(known)), dim=1)  # [N, F]
    query = normalize(encoder(prepare(asked)), dim=1)
nearest = (query @ bank.T).argmax(1)
correct = (labels[nearest] == truth).float().mean()
print(f"features {list(bank.shape)}, nearest neighbour right for {correct:.0%}")
