"""Pretrain any network: name the hidden layer whose output is to become the representation.

`python examples/any_network.py` runs on a CPU in seconds, on blotches of colour made up here.
"""

import sys
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run in a checkout

from byol_fast import BYOL

torch.manual_seed(0)


def sample_unlabelled_images(count: int = 16) -> torch.Tensor:  # [N, 3, H, W] in [0, 1]
    return torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4), size=40, mode="bilinear")


def pretrain(network: torch.nn.Module, hidden_layer: str | int, steps: int = 6) -> BYOL:
    learner = BYOL(
        network,
        image_size=32,
        hidden_layer=hidden_layer,
        projection_size=64,
        projection_hidden_size=256,
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        loss = learner(sample_unlabelled_images())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.update_moving_average()
        losses.append(loss.item())
    print(f"hidden layer {hidden_layer!r}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return learner


# By name: a torchvision network; everything behind the layer is left out of training.
resnet = torchvision.models.resnet18()
learner = pretrain(resnet, "avgpool")

# By index among the children: a network of your own.
network = torch.nn.Sequential(
    torch.nn.Conv2d(3, 32, 3, stride=2),
    torch.nn.BatchNorm2d(32),
    torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(2),
    torch.nn.Flatten(),
    torch.nn.Linear(128, 10),
)
pretrain(network, -2, steps=30)

# Representations of images; the network itself was trained, so it can be saved as it is.
learner.eval()
with torch.no_grad():
    images = sample_unlabelled_images(4)
    projection, embedding = learner(images, return_embedding=True)
print(f"projection {list(projection.shape)}, embedding {list(embedding.shape)}")
assert "layer1.0.conv1.weight" in resnet.state_dict()  # torch.save(resnet.state_dict(), "net.pt")
