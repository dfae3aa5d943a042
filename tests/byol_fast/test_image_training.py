"""Training on images: recipes, batches, classifiers, scores, and going on where it stopped."""

import json
import os
import signal
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faults.harness import free_port
from torch import nn

from byol_fast import distributed
from byol_fast.distributed import World
from byol_fast.errors import Diverged, Preempted
from byol_fast.evaluate import fewlabels, finetune, heads, recipes, scores
from byol_fast.evaluate.batches import TrainingBatches
from byol_fast.evaluate.finetune import Progressing
from byol_fast.networks.backbone import build_backbone
from pipelines.errors import DataError
from pipelines.plan import EpochPlan
from pipelines.spec import AugmentSpec
from pipelines.stores import open_store
from tests.byol_fast.networks import NoGrey, Unreadable

SPEC = AugmentSpec(image_size=16)
ALONE = World(0, 1, torch.device("cpu"))
SHORT = replace(
    recipes.FINETUNE, steps=24, batch_size=12, base_lr=0.1 * 256 / 12, weight_decay=1e-5
)


def squares(n, seed=0, classes=3, size=(20, 24)):
    """The class is the colour of a square on noise."""
    rng, eye = np.random.default_rng(seed), 40 + 160 * np.eye(3, dtype=int)
    images = rng.integers(90, 130, (n, *size, 3), dtype=np.uint8)
    labels = np.arange(n) % classes
    for image, label in zip(images, labels, strict=True):
        image[3:17, 3:20] = eye[label]
    return open_store((images, labels))


def tiny(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    return heads.FineTuned(net, 8, 3)


def train(module, store, recipe=SHORT, **rest):
    rest = {"spec": SPEC, "world": ALONE, "threads": 1, **rest}
    return finetune.train(module, store, recipe=recipe, **rest)


def weights(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# -- recipes


@pytest.mark.parametrize(
    ("name", "epochs", "drops"),
    [
        ("imagenet", 90, (30, 60)),
        ("places205", 28, (7, 14, 21)),
        ("inaturalist18", 84, (24, 48, 72)),
    ],
)
def test_published_recipes_of_the_stages(name, epochs, drops):
    recipe = recipes.MHEAD[name]
    assert (recipe.epochs, recipe.batch_size, recipe.peak_lr) == (epochs, 256, 0.01)
    assert (recipe.nesterov, recipe.momentum, recipe.l2) == (True, 0.9, 1e-4)
    total = recipe.total_steps(1000 * 256)
    assert total == 1000 * epochs
    for number, drop in enumerate(drops):
        assert recipe.factor(drop * 1000 - 1, total) == pytest.approx(0.1**number)
        assert recipe.factor(drop * 1000, total) == pytest.approx(0.1 ** (number + 1))
    assert (recipe.view.jitter, recipe.lighting) == ((1, 0.1) if name == "imagenet" else (0, 0))
    assert recipe.from_square is (name == "places205")
    halved = recipe.changed({"epochs": epochs // 2})
    assert halved.factor(drops[0] * 500, total // 2) == pytest.approx(0.1)


def test_published_recipes_of_fine_tuning():
    one, ten = recipes.semi(0.01), recipes.semi(0.1)
    assert (one.l2, ten.l2) == (5e-4, 1e-4) and replace(ten, weight_decay=5e-4) == one
    assert (one.epochs, one.batch_size, one.peak_lr, one.head_lr_factor) == (20, 256, 0.01, 100)
    assert [one.factor(s, 20) for s in (0, 11, 12, 15, 16)] == pytest.approx([1, 1, 0.2, 0.2, 0.04])
    assert not one.nesterov and "× 0.2 after 12, 16 epochs" in one.arithmetic()
    fine = recipes.FINETUNE
    assert (fine.total_steps(99), fine.batch_size, fine.nesterov) == (20_000, 256, True)
    assert fine.l2 == pytest.approx(1e-6 / 0.01)  # the decay is divided by the rate
    assert [fine.factor(s, 20_000) for s in (0, 10_000)] == pytest.approx([1, 0.5])
    grid = recipes.FINETUNE_GRID
    assert len(grid["base_lr"]) == 7 and len(grid["weight_decay"]) == 8
    assert (grid["base_lr"][0], grid["base_lr"][-1]) == (1e-4, 0.1)
    assert (grid["weight_decay"][1], grid["weight_decay"][-1]) == (1e-6, 1e-3)
    assert replace(fine, weight_decay=0).l2 == 0
    assert recipes.quick(fine, 640).steps == 50 and recipes.quick(fine, 6).steps == 30
    few = recipes.quick(ten, 32)
    assert (few.epochs, few.batch_size, few.peak_lr) == (30, 32, 0.01)
    with pytest.raises(ValueError, match="one of epochs and steps"):
        replace(fine, epochs=1)
    with pytest.raises(ValueError, match="above 0"):
        replace(fine, base_lr=0)


# -- what is shown


def batch(recipe, store, spec=SPEC, step=0, **rest):
    batches = TrainingBatches(
        store, recipe, spec, device=torch.device("cpu"), seed=3, threads=1, **rest
    )
    try:
        return next(batches.steps(step, step + 1)), batches
    finally:
        batches.close()


def test_places_crops_lie_in_the_centre_square():
    store = open_store((np.zeros((40, 256, 400, 3), np.uint8), np.zeros(40, int)))
    recipe = replace(recipes.MHEAD["places205"], batch_size=40)
    _, batches = batch(recipe, store)
    windows = batches._rows(0).windows[:, 0]
    assert (windows[:, 2:] == 224).all()
    assert windows[:, 0].min() >= 0 and windows[:, 0].max() <= 32
    assert windows[:, 1].min() >= 72 and windows[:, 1].max() <= 72 + 32
    assert len(np.unique(windows[:, 1])) > 10


def test_batches_are_one_window_of_the_plan():
    store = squares(30)
    (x, y), batches = batch(replace(SHORT, batch_size=30), store)
    ids = batches._rows(0).ids
    plan = EpochPlan(batches._spec, 3, 0, store.sizes)
    assert ids.tolist() == plan.order.tolist()
    assert np.array_equal(batches._rows(0).windows, plan.windows(ids)[:, :1])
    assert x.shape == (30, 3, 16, 16) and y.tolist() == store.labels[ids].tolist()


def test_two_ranks_see_the_batch_of_one():
    store = squares(30)
    recipe = replace(recipes.MHEAD["imagenet"], batch_size=12)
    (whole, labels), _ = batch(recipe, store, step=3)
    halves = [batch(recipe, store, step=3, rank=r, world_size=2)[0] for r in (0, 1)]
    assert torch.equal(torch.cat([x for x, _ in halves]), whole)
    assert torch.equal(torch.cat([y for _, y in halves]), labels)


def test_lighting_shifts_colours_along_the_main_axes():
    store = squares(200)
    recipe = replace(recipes.MHEAD["inaturalist18"], batch_size=200)
    (plain, _), _ = batch(recipe, store)
    (lit, _), _ = batch(replace(recipe, lighting=0.1), store)
    std = torch.tensor(SPEC.std)[None, :, None, None]
    shift = (lit - plain) * std
    assert shift.std((2, 3)).max() < 1e-6  # one colour for a whole image
    each = shift.mean((2, 3))
    # the first axis is nearly grey, with 0.1 * 0.2175 along it
    assert each.norm(dim=1).square().mean().sqrt().item() == pytest.approx(0.0218, rel=0.2)
    spread = torch.linalg.eigvalsh(each.T @ each / 200).sqrt()
    assert spread[0] < spread[1] / 2 < spread[2] / 4


# -- classifiers


def test_published_poolings_of_a_resnet50():
    maps = zip((64, 256, 512, 1024, 2048), (112, 56, 28, 14, 7), strict=True)
    poolings = [heads._pooling(i, *shape) for i, shape in enumerate(maps)]
    assert [p.width for p in poolings] == [9216, 9216, 8192, 9216, 8192]
    assert [p.kernel for p in poolings] == list(heads.POOLS)
    for p in poolings:
        assert p.module()(torch.zeros(1, 1, p.side, p.side)).shape[-1] == p.out


def test_stages_of_a_small_resnet():
    torch.manual_seed(0)
    net = build_backbone("resnet18", image_size=32)
    module = heads.StageHeads(net, 3, image_size=32).train()
    assert [p.width for p in module.poolings] == [64 * 144, 64 * 36, 128 * 16, 256 * 4, 512]
    assert [p.out for p in module.poolings] == [12, 6, 4, 2, 1]
    assert module.poolings[0].describe() == "adaptive to 12×12"
    assert module.norms[0].training and not net.bn1.training
    x = torch.randn(4, 3, 32, 32)
    stem = net.relu(net.bn1(net.conv1(x)))  # before the max-pool: 16 pixels, not 8
    stages = [net.layer1(net.maxpool(stem))]
    for layer in (net.layer2, net.layer3, net.layer4):
        stages.append(layer(stages[-1]))
    for got, expected in zip(module._maps(x), [stem, *stages], strict=True):
        assert torch.equal(got, expected)
    first = F.adaptive_avg_pool2d(stem, 12)
    normed = F.batch_norm(first, None, None, training=True).flatten(1)
    assert torch.allclose(module(x)[0], module.linears[0](normed), atol=1e-5)
    assert all(norm.weight is None for norm in module.norms)
    with pytest.raises(ValueError, match="this is a Sequential"):
        heads.StageHeads(nn.Sequential(nn.Conv2d(3, 4, 3)), 3, image_size=32)


def test_only_the_classifiers_of_the_stages_are_trained():
    net = build_backbone("resnet18", image_size=16)
    before = weights(net)
    module = heads.StageHeads(net, 3, image_size=16)
    first = weights(module.linears)
    recipe = replace(recipes.MHEAD["inaturalist18"], epochs=1, batch_size=10, drops=())
    train(module, squares(20), recipe)
    assert same(weights(net), before)
    assert not any(torch.equal(first[k], v) for k, v in module.linears.state_dict().items())
    assert module.norms[4].running_mean.abs().sum() > 0


# -- scores


def test_scores_of_a_hand_made_case():
    guesses = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0], [0, 2]])
    labels = torch.tensor([0, 0, 0, 1, 2])
    got = scores.score(guesses, labels, classes=4)  # class 3 has no images: it does not count
    assert got.top1 == pytest.approx(4 / 5) and got.top5 == 1.0
    assert got.mean_per_class == pytest.approx((1 + 1 + 0) / 3)
    assert list(got.figures("mean per class")) == ["mean per class", "top-5"]


def test_measuring_knows_a_perfect_and_a_wrong_classifier():
    store = squares(30)

    class Colour(nn.Module):
        def forward(self, x):
            likely = x[:, :, 6:10, 6:10].mean((2, 3))
            return [likely, -likely, torch.zeros_like(likely)]

    spec = AugmentSpec(mean=(0.0,) * 3, std=(1.0,) * 3)
    each, tested, bad = scores.measure(Colour(), store, 3, image_size=16, spec=spec, threads=1)
    assert [s.top1 for s in each[:2]] == [1.0, 0.0] and (tested, bad) == (30, {})
    assert each[2].top1 == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="lower rate"):
        scores.measure(
            lambda_module(lambda x: [x.mean((2, 3)) * float("nan")]),
            store,
            3,
            image_size=16,
            threads=1,
        )


def lambda_module(function):
    module = nn.Module()
    module.forward = function
    return module


# -- training


def test_separable_classes_are_separated():
    module = tiny()
    result = train(module, squares(60), replace(SHORT, steps=60))
    (got,), _, _ = scores.measure(module, squares(30, seed=1), 3, image_size=16, threads=1)
    assert got.top1 == 1.0 and got.mean_per_class == 1.0
    assert result.steps == 60 and result.final_loss < 0.5 and result.images_per_second > 0


def test_rates_decay_and_norms_are_the_recipe_s(monkeypatch):
    module, store, seen = tiny(), squares(48), []
    recipe = replace(SHORT, steps=4, head_lr_factor=10.0)
    original = torch.optim.SGD.step

    def spy(self, *args):
        seen.append([dict(group, params=len(group["params"])) for group in self.param_groups])
        return original(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    train(module, store, recipe)
    head, rest = seen[1]
    cosine = (1 + np.cos(np.pi / 4)) / 2
    assert (head["params"], rest["params"]) == (2, 4)
    assert rest["lr"] == pytest.approx(recipe.peak_lr * cosine)
    assert head["lr"] == pytest.approx(10 * rest["lr"])
    assert head["weight_decay"] == pytest.approx(1e-5 / recipe.peak_lr) and head["nesterov"]
    assert module.backbone[1].momentum == 0.1  # 4 steps an epoch
    train(other := tiny(), squares(240), replace(SHORT, steps=1, batch_size=2))
    assert other.backbone[1].momentum == pytest.approx(10 / 120)


@pytest.mark.parametrize("stopped", ["killed", "signalled"])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, stopped):
    store, recipe = squares(30), replace(SHORT, steps=7)
    whole = tiny(dropout=0.3)
    loss = train(whole, store, recipe).final_loss
    resume = Progressing(folder=tmp_path, about={"recipe": asdict(recipe)}, every=0.0)
    original = finetune._Run.train_step

    class Killed(BaseException):
        pass

    def stop_at_4(self, x, y):
        if self.step == 4 and stopped == "killed":
            raise Killed
        original(self, x, y)
        if self.step == 4 and stopped == "signalled":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(finetune._Run, "train_step", stop_at_4)
    every = 0.0 if stopped == "killed" else 1e9
    with pytest.raises(Killed if stopped == "killed" else Preempted):
        train(tiny(dropout=0.3), store, recipe, resume=replace(resume, every=every))
    monkeypatch.setattr(finetune._Run, "train_step", original)
    assert sorted(p.name for p in tmp_path.glob("*.pt"))[-1] == "step-00000004.pt"
    again = tiny(seed=9, dropout=0.3)
    torch.manual_seed(123)
    result = train(again, store, recipe, resume=resume)
    assert same(weights(again), weights(whole)) and result.final_loss == loss
    done = train(tiny(seed=5), store, recipe, resume=resume)
    assert done.images_per_second == 0 and done.final_loss == loss  # nothing was left to do
    other = replace(resume, about={"recipe": asdict(SHORT)})
    with pytest.raises(ValueError, match="another setting"):
        train(tiny(), store, recipe, resume=other)


def test_the_caller_s_randomness_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    module = tiny()
    torch.manual_seed(7)
    train(module, squares(24), replace(SHORT, steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_mistakes_are_named():
    with pytest.raises(DataError, match="batch_size 12 is larger"):
        train(tiny(), squares(6))
    with pytest.raises(Diverged, match="lower rate"):
        train(tiny(), squares(24), replace(SHORT, base_lr=1e30))


BROKEN = (3, 7, 20, 28)


def test_images_that_cannot_be_decoded_are_not_trained_on(caplog):
    module = heads.FineTuned(NoGrey(), 3, 3)
    store = Unreadable(squares(30), BROKEN)
    result = train(module, store, replace(SHORT, steps=6))
    assert result.bad == dict.fromkeys(BROKEN, "gone") and np.isfinite(result.final_loss)
    assert "4 images could not be decoded and are left out: images[3]: gone" in caplog.text
    with pytest.raises(DataError, match="none of the 12 images of a training batch"):
        train(tiny(), Unreadable(squares(30), range(30)), replace(SHORT, steps=6))


def test_images_left_out_before_an_interruption_stay_counted(tmp_path, monkeypatch):
    store = Unreadable(squares(30), BROKEN)
    recipe = replace(SHORT, steps=5)  # the last two steps see most images, not all
    whole = train(tiny(), store, recipe)
    resume = Progressing(folder=tmp_path, about={}, every=0.0)
    look = finetune._Run.look

    def stopped(self, stop):
        look(self, stop)
        if self.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetune._Run, "look", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), store, recipe, resume=resume)
    monkeypatch.setattr(finetune._Run, "look", look)
    assert train(tiny(), store, recipe, resume=resume).bad == whole.bad


def _rank(rank, port, file):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    world = distributed.start("cpu")
    module = tiny()
    result = train(module, squares(30), replace(SHORT, steps=6), world=world)
    broken = Unreadable(squares(30), BROKEN)
    left_out = train(tiny(), broken, replace(SHORT, steps=6), world=world).bad
    if world.is_main:
        kept = {**module.state_dict(), "loss": result.final_loss, "bad": sorted(left_out)}
        torch.save(kept, file)
    distributed.stop()


@pytest.mark.dist
def test_two_ranks_train_what_one_does(in_ranks, tmp_path):
    in_ranks(_rank, 2, free_port(), tmp_path / "out.pt")
    one = train(alone := tiny(), squares(30), replace(SHORT, steps=6))
    two = torch.load(tmp_path / "out.pt", weights_only=True)
    for key, value in alone.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.allclose(two[key], value, atol=1e-4), key
    assert two["loss"] == pytest.approx(one.final_loss, rel=1e-4)  # not of rank 0's share alone
    assert two["bad"] == list(BROKEN)  # whichever rank met them


# -- few labels


def test_a_fraction_is_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [100, 50, 3])
    store = open_store((np.zeros((153, 8, 8, 3), np.uint8), labels))
    rows = fewlabels.fraction(store, 0.1)
    assert np.bincount(labels[rows]).tolist() == [10, 5, 1]
    assert np.array_equal(rows, fewlabels.fraction(store, 0.1))
    assert not np.array_equal(rows, fewlabels.fraction(store, 0.1, seed=1))
    assert (np.diff(rows) > 0).all() and len(fewlabels.fraction(store, 1.0)) == 153
    with pytest.raises(ValueError, match="share of labels"):
        fewlabels.fraction(store, 0.0)


class Named:
    def __init__(self, *names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def name(self, row):
        return self.names[row]


def test_lists_of_names(tmp_path):
    store = Named("/d/n1/n1_1.JPEG", "/d/n1/n1_2.JPEG", "/d/n2/1.JPEG", "/d/n3/1.JPEG")
    path = tmp_path / "1percent.txt"
    path.write_text("n1_2.JPEG\n\nn1_1.JPEG\nn1_2.JPEG\n")
    assert fewlabels.named(store, path).tolist() == [0, 1]
    path.write_text("n1/n1_2.JPEG 0\nn3/1.JPEG 2\n")
    assert fewlabels.named(store, path).tolist() == [1, 3]
    for text, message in (
        ("1.JPEG\n", "several images"),
        ("n1_1.JPEG\nx.JPEG\n", "1 of 2 lines name no training image.*x.JPEG"),
        ("\n", "names no images"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            fewlabels.named(store, path)
    with pytest.raises(DataError, match="cannot be read"):
        fewlabels.named(store, tmp_path / "none.txt")


def test_recipes_are_plain_values():
    for recipe in (*recipes.MHEAD.values(), recipes.semi(0.1), recipes.FINETUNE):
        assert json.loads(json.dumps(asdict(recipe)))["name"] == recipe.name
