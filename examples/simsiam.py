"""SimSiam: no target network, the online network behind a stop-gradient is the goal.

`python examples/simsiam.py` runs on a CPU in seconds, on blotches of colour made up here.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run in a checkout

from byol_fast import BYOL

torch.manual_seed(0)
network = torch.nn.Sequential(
    torch.nn.Conv2d(3, 32, 3, stride=2),
    torch.nn.BatchNorm2d(32),
    torch.nn.ReLU(),
    torch.nn.Conv2d(32, 64, 3, stride=2),
    torch.nn.BatchNorm2d(64),
    torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1),
)
learner = BYOL(
    network,
    image_size=32,
    use_momentum=False,
    projection_size=64,
    projection_hidden_size=256,
)
optimizer = torch.optim.SGD(learner.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
losses = []
for _ in range(30):
    images = torch.nn.functional.interpolate(torch.rand(16, 3, 4, 4), size=40, mode="bilinear")
    loss = learner(images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()  # and nothing else: there is no moving average to update
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

with torch.no_grad():  # a collapsed network maps all images to one point: a spread of 0
    z, _ = learner(images, return_embedding=True)
    spread = torch.nn.functional.normalize(z, dim=1).std(0).mean()
print(f"spread of the projections {spread:.3f}, healthy {64**-0.5:.3f}")
