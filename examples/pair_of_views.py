"""Two views in, four tensors out: BYOL with `criterion` and `updateTargetNetwork`.

`python examples/pair_of_views.py` runs on a CPU in seconds, on blotches of colour made up here.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run in a checkout

from byol_fast.pair import BYOL, criterion, get_byol_transforms

torch.manual_seed(0)
device = torch.device("cpu")
size, mean, std, lr = 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.05
images = torch.nn.functional.interpolate(torch.rand(64, 3, 4, 4), size=40, mode="bilinear")
dataset = torch.utils.data.TensorDataset(images, torch.zeros(len(images)))
train_loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True)

t, t1, _ = get_byol_transforms(size, mean, std)


def train(epochs: int = 2, **options: bool) -> None:
    model = BYOL(
        input_size=512,
        hidden_size=256,
        output_size=16,  # fewer than the batch's views: see closed_form
        depth_proj=2,
        depth_pred=2,
        t=0.99,
        backend="resnet18",
        pretrained=False,
        **options,
    )
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1.5e-4)
    losses = []
    for _epoch in range(epochs):
        model.train()
        for batch, _ in train_loader:
            batch = batch.to(device)
            x = t(batch)
            x1 = t1(batch)

            onlinex, onlinex1, targetx, targetx1 = model(x, x1)
            loss = criterion(onlinex, targetx1, onlinex1, targetx)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.updateTargetNetwork()
            losses.append(loss.item())
    print(f"{options}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


train(closedFormPredicator=False, EAvg=True)
train(closedFormPredicator=True, EAvg=True)
