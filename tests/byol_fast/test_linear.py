"""Linear evaluation: what is trained, on which crops, at which rates, and what is not touched."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from byol_fast.evaluate import head as head_module
from byol_fast.evaluate import linear
from byol_fast.evaluate.features import Features, extract
from byol_fast.evaluate.resume import Resume
from byol_fast.optim import LARS
from byol_fast.schedules import learning_rate
from pipelines.augment import reference
from pipelines.errors import DataError
from pipelines.plan import EpochPlan
from pipelines.sources.torch_source import TorchSource
from pipelines.spec import AugmentSpec, Colour
from pipelines.stores import open_store
from tests.byol_fast.networks import CountingMeans, NoGrey, Unreadable

COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (40, 200, 200))


def coloured_shapes(n: int, seed: int = 0, classes: int = 5):
    """Squares on noise; the class is the square's colour, so colour averages separate them."""
    rng = np.random.default_rng(seed)
    images = rng.integers(90, 130, (n, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(n) % classes
    for image, label in zip(images, labels, strict=True):
        top, left = rng.integers(4, 10, 2)
        image[top : top + 18, left : left + 18] = COLOURS[label]
    return open_store((images, labels))


class Averages(nn.Module):
    """[N, 3] means of the channels, through a frozen BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * self.norm(x).mean((2, 3))


SHORT = replace(linear.PAPER, epochs=12, batch_size=20, base_lr=8.0)


@pytest.mark.parametrize(
    "protocol",
    [
        SHORT,
        replace(linear.MMPRETRAIN, epochs=40, batch_size=20, base_lr=100.0),
        replace(linear.QUICK, batch_size=20, base_lr=1.0),
    ],
    ids=lambda p: p.name,
)
def test_separable_classes_are_separated(protocol):
    train, test = coloured_shapes(100), coloured_shapes(40, seed=1)
    result = linear.fit(Averages(), train, test, protocol=protocol, image_size=16, threads=2)
    assert result.top1 == 1.0 and result.top5 == 1.0
    assert result.final_loss < np.log(5) / 2
    assert result.test_images == 40 and result.bad_images == 0 and result.images_per_second > 0
    assert result.head.weight.shape == (5, 3)
    test_features = extract(Averages(), test, image_size=16, threads=1)
    guesses = result.head(test_features.features).argmax(1)
    assert torch.equal(guesses, test_features.labels)  # the head is for features as they are


def test_the_backbone_is_frozen():
    net = Averages().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    train, test = coloured_shapes(40), coloured_shapes(20, seed=1)
    linear.fit(net, train, test, protocol=replace(SHORT, epochs=1), image_size=16, threads=1)
    assert net.training and net.scale.grad is None
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_the_same_seed_gives_the_same_head_for_any_thread_count():
    train, test = coloured_shapes(40), coloured_shapes(20, seed=1)
    protocol = replace(SHORT, epochs=2)

    def weights(seed: int, threads: int):
        result = linear.fit(
            Averages(), train, test, protocol=protocol, image_size=16, threads=threads, seed=seed
        )
        return result.head.weight

    assert torch.equal(weights(0, 1), weights(0, 3))
    assert not torch.equal(weights(0, 1), weights(1, 1))


@pytest.mark.parametrize("protocol", [SHORT, replace(linear.QUICK, batch_size=20)])
def test_training_images_that_cannot_be_decoded_are_left_out_and_counted(protocol, caplog):
    train = Unreadable(coloured_shapes(50), (0, 9))
    test = coloured_shapes(20, seed=1)
    net = CountingMeans() if protocol.cached else NoGrey()  # there features are left out
    result = linear.fit(net, train, test, protocol=protocol, image_size=16, threads=1)
    assert result.bad_train == {0: "gone", 9: "gone"} and result.bad_test == {}
    assert result.bad_images == 2 and result.test_images == 20
    assert "2 images could not be decoded and are left out: images[0]: gone" in caplog.text


@pytest.mark.parametrize("protocol", [SHORT, replace(linear.MMPRETRAIN, batch_size=20, epochs=12)])
def test_a_training_that_was_killed_ends_with_the_same_weights(tmp_path, monkeypatch, protocol):
    protocol = replace(protocol, epochs=4, base_lr=1.0)  # 4 epochs of 2.5 steps
    train, test = coloured_shapes(50), coloured_shapes(20, seed=1)

    def run(folder=None, key="a"):
        resume = Resume(folder, {"what": key}, every_seconds=0.0) if folder else None
        return linear.fit(
            Averages(), train, test, protocol=protocol, image_size=16, threads=1, resume=resume
        )

    whole, steps, step = run(), [], head_module.HeadTrainer.step

    last = 7

    def dies(self, *batch):
        if len(steps) == last:
            raise KeyboardInterrupt
        steps.append(batch)
        step(self, *batch)

    monkeypatch.setattr(head_module.HeadTrainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r")
    monkeypatch.setattr(head_module.HeadTrainer, "step", lambda *a: steps.append(a) or step(*a))
    again = run(tmp_path / "r")
    assert len(steps) == 10  # three more
    assert torch.equal(again.head.weight, whole.head.weight)
    assert torch.equal(again.head.bias, whole.head.bias)
    assert again.final_loss == whole.final_loss and again.top1 == whole.top1
    done = run(tmp_path / "r")  # only the test was left
    assert len(steps) == 10 and torch.equal(done.head.weight, whole.head.weight)
    last = 13
    monkeypatch.setattr(head_module.HeadTrainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", key="b")  # another training starts anew, and is kept as well
    monkeypatch.setattr(head_module.HeadTrainer, "step", lambda *a: steps.append(a) or step(*a))
    assert torch.equal(run(tmp_path / "r", key="b").head.weight, whole.head.weight)
    assert len(steps) == 20
    for path in (tmp_path / "r").glob("*.pt"):
        path.write_bytes(b"damaged")
    assert torch.equal(run(tmp_path / "r", key="b").head.weight, whole.head.weight)
    assert len(steps) == 30
    Resume(tmp_path / "r", {}).clear()
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("semantics", ["deepmind", "torchvision"])
def test_training_crops_are_one_view_of_the_plan_flipped(monkeypatch, semantics):
    train, test = coloured_shapes(30), coloured_shapes(20, seed=1)
    asked, shown = [], []
    crops_of = TorchSource.crops

    def spy_crops(self, rows):
        yield from crops_of(self, (asked.append(r) or r for r in rows))

    def spy_choose(spec, device):
        def apply(crops, colours):
            out = reference.apply(crops, colours, spec)
            shown.append((crops, colours, out, spec))
            return out

        return apply

    monkeypatch.setattr(TorchSource, "crops", spy_crops)
    monkeypatch.setattr(linear, "choose", spy_choose)
    protocol = replace(SHORT, epochs=1, batch_size=30, semantics=semantics)
    linear.fit(Averages(), train, test, protocol=protocol, image_size=16, threads=1, seed=3)
    (crops, colours, out, spec), rows = shown[0], asked[0]
    assert spec.semantics == semantics
    plan = EpochPlan(spec, 3, 0, train.sizes)
    assert rows.ids.tolist() == plan.order.tolist()
    assert np.array_equal(rows.windows, plan.windows(rows.ids)[:, :1])
    assert crops.shape == (1, 30, 16, 16, 3)
    flips = colours[:, 0, Colour.FLIP].bool()
    assert 5 < flips.sum() < 25
    for column in (Colour.JITTER, Colour.GREY, Colour.SIGMA, Colour.SOLARIZE):
        assert not colours[:, :, column].any()
    plain = reference.normalise(crops, spec)
    assert torch.allclose(out[0, ~flips], plain[0, ~flips])
    assert torch.allclose(out[0, flips], plain[0, flips].flip(-1))


def test_published_recipes():
    paper, other = linear.PAPER, linear.MMPRETRAIN
    assert (paper.epochs, paper.batch_size, paper.optimizer) == (80, 1024, "sgd")
    assert paper.peak_lr == pytest.approx(0.2 * 1024 / 256)
    assert replace(paper, batch_size=4096).peak_lr == pytest.approx(3.2)
    assert (other.epochs, other.batch_size, other.optimizer) == (90, 4096, "lars")
    assert other.peak_lr == pytest.approx(1.6)
    assert (paper.semantics, other.semantics) == ("deepmind", "torchvision")
    assert not paper.cached and not other.cached and linear.QUICK.cached


@pytest.mark.parametrize("protocol", [linear.PAPER, linear.MMPRETRAIN], ids=lambda p: p.name)
def test_the_optimizer_is_the_recipe_s(protocol):
    trainer = head_module.HeadTrainer(4, 3, protocol, 10, torch.device("cpu"), 0)
    optimizer, rates = trainer._optimizer, []
    for _ in range(10):
        trainer.step(torch.randn(6, 4), torch.arange(6) % 3)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    peak = protocol.peak_lr
    expected = [learning_rate(s, peak=peak, warmup_steps=0, total_steps=10) for s in range(10)]
    assert rates == expected and rates[0] == peak
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == 0 and group["momentum"] == 0.9
    if protocol.optimizer == "sgd":
        assert isinstance(optimizer, torch.optim.SGD) and group["nesterov"]
    else:
        assert isinstance(optimizer, LARS) and group["adapt"] and optimizer.lr_in_momentum
        assert optimizer.norm == "sum"


def test_top_k_on_known_logits():
    eye = nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        eye.weight.copy_(torch.eye(6))
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]] * 4)
    test = Features(scores, torch.tensor([0, 1, 4, 5]), torch.arange(4))
    assert head_module.top_k(eye, test) == (0.25, 0.75)
    two = nn.Linear(6, 2)
    assert head_module.top_k(two, replace(test, labels=torch.tensor([0, 1, 0, 1])))[1] == 1.0


def test_quick_features_of_any_scale_and_dead_channels():
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    x = nn.functional.one_hot(labels, 3) * 1e-3 + 50 + 1e-5 * torch.randn(60, 3)
    x = torch.cat([x, torch.zeros(60, 1)], 1)
    bank = Features(x, labels, torch.arange(60))
    result = linear.fit_features(bank, bank, classes=3, protocol=replace(linear.QUICK, base_lr=1.0))
    assert result.top1 == 1.0 and result.protocol.batch_size == 60
    off = replace(bank, features=x + torch.tensor([0, 0, 0, 1.0]))  # the dead channel wakes up
    assert torch.isfinite(result.head(off.features)).all()


@pytest.mark.parametrize("protocol", [SHORT, replace(linear.QUICK, batch_size=20, base_lr=1.0)])
def test_large_class_numbers_make_a_small_head(protocol, caplog):
    numbers = np.array([3, 17, 90_000, 500_000, 900_000])
    train, test = coloured_shapes(100), coloured_shapes(40, seed=1)
    expected = linear.fit(Averages(), train, test, protocol=protocol, image_size=16, threads=1)
    train.labels, test.labels = numbers[train.labels], numbers[test.labels]
    result = linear.fit(Averages(), train, test, protocol=protocol, image_size=16, threads=1)
    assert result.numbers.tolist() == numbers.tolist() and expected.numbers is None
    assert torch.equal(result.head.weight, expected.head.weight) and result.top1 == expected.top1
    assert "a row for each of the 5 classes that occur" in caplog.text


def test_test_images_of_no_training_class_are_misses():
    x, ids = torch.eye(4), torch.arange(4)
    train = Features(x, torch.tensor([3, 900_000, 3, 900_000]), ids)
    test = Features(x, torch.tensor([3, 900_000, 5, 900_001]), ids)
    result = linear.fit_features(train, test, classes=900_002)
    assert result.top1 == 0.5 and result.head.weight.shape == (2, 4)


def test_batches_have_no_gap():
    seen = torch.cat(list(head_module.batches(10, 4, 5, torch.Generator().manual_seed(0))))
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))


def test_mistakes_are_named():
    train, test = coloured_shapes(30), coloured_shapes(20, seed=1)
    with pytest.raises(DataError, match="batch_size 1024 is larger"):
        linear.fit(Averages(), train, test, image_size=16, threads=1)
    unlabelled = open_store(np.zeros((4, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="needs a label"):
        linear.fit(Averages(), unlabelled, test, image_size=16)
    trainer = head_module.HeadTrainer(2, 3, linear.PAPER, 5, torch.device("cpu"), 0)
    trainer.step(torch.full((3, 2), 3e38), torch.arange(3))
    with pytest.raises(ValueError, match="lower --base-lr"):
        trainer.finish()
    with pytest.raises(ValueError, match="at least 1"):
        replace(linear.PAPER, epochs=0)


def test_normalisation_reaches_the_network():
    train, test = coloured_shapes(40), coloured_shapes(20, seed=1)
    seen = []

    class Spy(Averages):
        def forward(self, x):
            seen.append(x.mean().item())
            return super().forward(x)

    spec = AugmentSpec(mean=(0.0,) * 3, std=(1.0,) * 3)
    protocol = replace(SHORT, epochs=1)
    linear.fit(Spy(), train, test, protocol=protocol, image_size=16, spec=spec, threads=1)
    assert all(0.2 < value < 0.7 for value in seen)  # in [0, 1], not about 0
