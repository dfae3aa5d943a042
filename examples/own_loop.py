"""The data pipeline alone: pairs of views for a training loop and a loss of your own.

`python examples/own_loop.py [FOLDER]` runs on a CPU in seconds. Without a folder of images it takes
blotches of colour made up here; a `.beton`, tar shards and `.npz` files do as well.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, interpolate, normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run in a checkout

import pipelines
from pipelines.spec import AugmentSpec, ViewSpec
from pipelines.stores.arrays import ArrayStore

torch.manual_seed(0)
if len(sys.argv) > 1:
    data: object = sys.argv[1]
else:
    pixels = interpolate(torch.rand(64, 3, 4, 4), size=40, mode="bilinear")
    data = ArrayStore((pixels * 255).byte().permute(0, 2, 3, 1).numpy(), np.arange(64) % 4)

# Two views as data: here crops and mirror images, no more.
view = ViewSpec(crop_area=(0.5, 1.0), jitter=0.0, grey=0.0, blur=0.0, solarize=0.0)
spec = AugmentSpec(image_size=32, views=(view, view), semantics="torchvision")
pipeline = pipelines.build(data, spec=spec, batch_size=16, seed=0, device="cpu")

network = torch.nn.Sequential(
    torch.nn.Conv2d(3, 32, 3, stride=2),
    torch.nn.ReLU(),
    torch.nn.Conv2d(32, 64, 3, stride=2),
    torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1),
    torch.nn.Flatten(),
    torch.nn.Linear(64, 32),
)
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
losses = []
for epoch in range(10):
    for views in pipeline.epoch(epoch):  # views.x [2, B, 3, S, S], views.index, views.label
        first, second = (normalize(network(x), dim=1) for x in views.x)
        loss = cross_entropy(first @ second.T / 0.1, torch.arange(len(first)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, last images {views.index[:4].tolist()}")
pipeline.close()
