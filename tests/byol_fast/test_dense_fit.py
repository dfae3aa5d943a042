"""Detection and segmentation below the command line, on a thin ResNet: resuming and learning."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from byol_fast import checkpoint
from byol_fast.errors import Preempted
from byol_fast.evaluate.dense import coco, detect, masks, recipes, segment, voc
from byol_fast.evaluate.dense.loop import parameter_groups
from byol_fast.evaluate.dense.stream import Order, generator, step_seed
from tests.byol_fast.dense_data import (
    make_cityscapes,
    make_coco,
    make_voc,
    make_voc_masks,
    thin_resnet,
)

USUAL = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "device": torch.device("cpu")}


def tiny(recipe, iterations=3, **changes):
    if isinstance(recipe, recipes.DetectionRecipe):
        quick = recipes.quick_detection(recipe)
        usual = {"before_nms": (40, 20), "after_nms": (20, 8), "rois_per_image": 4}
        usual |= {"short_sides": (56, 64), "test_short_side": 64, "detections_per_image": 4}
    else:
        quick, usual = recipes.quick_segmentation(recipe), {"channels": 8}
    short = quick.changed(iterations=iterations, batch_size=2, lr=0.005)
    return replace(short, **{**usual, **changes})


def fit(recipe, root, folder, **more):
    torch.manual_seed(1)
    net = thin_resnet()
    more = {"identity": {"a": 1}, "threads": 2, **USUAL, **more}
    if isinstance(recipe, recipes.SegmentationRecipe):
        sets = [masks.read(recipe.name, root, s) for s in (recipe.train_sets, (recipe.test_set,))]
        return segment.fit(net, *sets, recipe, folder=folder, **more)
    read = voc.read if recipe.name == "voc" else coco.read
    sets = [read(root, names) for names in (recipe.train_sets, (recipe.test_set,))]
    return detect.fit(net, *sets, recipe, folder=folder, **more)


@pytest.mark.parametrize(
    ("recipe", "make"),
    [
        (recipes.VOC, make_voc),
        (recipes.COCO, make_coco),
        (recipes.VOC12AUG, make_voc_masks),
        (recipes.CITYSCAPES, make_cityscapes),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_stopped_and_resumed_equals_uninterrupted(recipe, make, tmp_path, monkeypatch):
    if recipe is recipes.COCO:
        pytest.importorskip("pycocotools")
    root, recipe = make(tmp_path / "data"), tiny(recipe)
    whole = fit(recipe, root, tmp_path / "whole")

    module, calls = {"D": detect, "S": segment}[type(recipe).__name__[0]], []
    original = module.loss_of

    def stop_in_the_second(model, device, samples):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, device, samples)

    monkeypatch.setattr(module, "loss_of", stop_in_the_second)
    with pytest.raises(Preempted, match="after iteration 2 of 3"):
        fit(recipe, root, tmp_path / "halved", threads=3)
    resumed = fit(recipe, root, tmp_path / "halved", threads=1)

    once, twice = (checkpoint.latest(tmp_path / name) for name in ("whole", "halved"))
    assert once["step"] == twice["step"] == 3
    assert once["model"].keys() == twice["model"].keys()
    assert all(torch.equal(once["model"][key], twice["model"][key]) for key in once["model"])
    assert resumed.trained.resumed_at == 2 and whole.trained.resumed_at == 0
    assert resumed.trained.final_loss == whole.trained.final_loss
    figures = ("figures", "by_class", "miou", "pixel_accuracy")
    assert [getattr(resumed, f, 0) for f in figures] == [getattr(whole, f, 0) for f in figures]


def test_training_leaves_torch_s_generator_alone(tmp_path):
    root = make_voc_masks(tmp_path / "data")
    sets = [masks.read_voc(root, names) for names in (("train", "aug"), ("val",))]
    net, recipe = thin_resnet(), tiny(recipes.VOC12AUG, iterations=1)
    before = torch.get_rng_state()
    segment.fit(net, *sets, recipe, folder=tmp_path / "c", identity={}, **USUAL)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_a_detector_learns_what_it_is_shown(tmp_path):
    root = make_voc(tmp_path / "data", train=6, test=1)
    one = replace(recipes.VOC, test_set="VOC2007/trainval", train_sets=("VOC2007/trainval",))
    recipe = tiny(
        one, iterations=120, short_sides=(96,), test_short_side=96, rois_per_image=32,
        before_nms=(200, 100), after_nms=(60, 30),
    )  # fmt: skip
    recipe = replace(recipe, lr=0.02, milestones=(96,))
    untrained = fit(replace(recipe, iterations=1, lr=1e-6), root, tmp_path / "untrained")
    result = fit(recipe, root, tmp_path / "c")
    # Three objects, so one is a third; by processor and seed the training gives 0.5 to 1, from 0.
    assert result.figures["box"]["AP50"] > 0.3 > 0.1 > untrained.figures["box"]["AP50"]
    assert result.trained.final_loss < untrained.trained.final_loss / 3  # 0.3 to 0.6, from 4
    assert set(result.by_class) == {"car", "dog", "person"}


@pytest.mark.slow
def test_a_segmenter_learns_what_it_is_shown(tmp_path):
    root = make_voc_masks(tmp_path / "data", train=6, test=1)
    recipe = tiny(recipes.VOC12AUG, iterations=120, scales=(1.0, 1.0), channels=32, dropout=0.0)
    recipe = replace(recipe, lr=0.2, batch_size=3)
    torch.manual_seed(1)
    net = thin_resnet()
    shown = masks.read_voc(root, ("train",))
    held_out = masks.read_voc(root, ("val",))
    folder, more = tmp_path / "c", {"identity": {}, **USUAL}
    model = segment.Segmenter(thin_resnet(), len(shown.classes), recipe)
    untrained = segment.mean_iou(segment.confusion(model, shown, **USUAL))
    segment.fit(net, shown, held_out, recipe, folder=folder, **more)
    model.load_state_dict(checkpoint.latest(folder)["model"])
    trained = segment.mean_iou(segment.confusion(model, shown, **USUAL))
    assert trained > 0.5 > 0.25 > untrained  # by processor and seed 0.87 to 0.93


def test_every_place_is_a_function_of_seed_and_step():
    order = Order(10, 4, seed=3)
    shown = [image for step in range(5) for image, _ in order.rows(step)]
    assert sorted(shown[:10]) == sorted(shown[10:]) == list(range(10))
    assert shown[:10] != shown[10:] != list(range(10))
    assert Order(10, 4, seed=3).rows(4) == order.rows(4) != Order(10, 4, seed=4).rows(4)
    assert [place for _, place in order.rows(2)] == [8, 9, 10, 11]
    draws = [generator(*key).random() for key in ((0, 0), (0, 1), (1, 0))]
    assert len(set(draws)) == 3 and generator(0, 1).random() == draws[1]
    assert len({step_seed(seed, step) for seed in range(3) for step in range(50)}) == 150


def test_rates_follow_the_published_schedules():
    voc_recipe = recipes.VOC
    assert voc_recipe.learning_rate(0) == pytest.approx(2e-5)
    assert voc_recipe.learning_rate(50) == pytest.approx(0.02 * (0.0005 + 0.5))
    at = [100, 17_999, 18_000, 21_999, 22_000, 23_999]
    assert [voc_recipe.learning_rate(s) for s in at] == pytest.approx(
        [0.02] * 2 + [2e-3] * 2 + [2e-4] * 2
    )
    poly = recipes.VOC12AUG
    assert poly.learning_rate(0) == 0.01
    assert poly.learning_rate(10_000) == pytest.approx(1e-4 + (0.01 - 1e-4) * 0.5**0.9)
    assert poly.learning_rate(20_000) == 1e-4
    half = voc_recipe.changed(iterations=12_000, batch_size=8, lr=None)
    assert half.lr == 0.01 and half.milestones == (9_000, 11_000)
    assert voc_recipe.changed(iterations=None, batch_size=8, lr=0.02).lr == 0.02
    assert voc_recipe.changed(iterations=None, batch_size=None, lr=None) == voc_recipe


def test_norms_decay_only_where_the_recipe_says_so():
    net = thin_resnet()
    groups = parameter_groups(net, recipes.VOC)
    norms = groups[1]["params"]
    assert [g["weight_decay"] for g in groups] == [1e-4, 0.0] and len(norms) == 2 * (1 + 8 + 3)
    assert all(p.dim() == 1 for p in norms)
    assert sum(len(g["params"]) for g in groups) == len(list(net.parameters()))
    (everything,) = parameter_groups(net, recipes.COCO)
    assert everything["weight_decay"] == 1e-4


def test_precise_statistics_are_the_mean_over_the_batches():
    from byol_fast.evaluate.dense.loop import Job, precise_statistics

    norm = torch.nn.BatchNorm1d(1)
    norm.running_mean.fill_(99)
    job = Job(
        model=norm,
        recipe=replace(recipes.VOC, batch_size=2, iterations=1),
        images=8,
        sample=lambda image, place: float(place),
        loss=lambda samples: norm(torch.tensor(samples)[:, None]).sum(),
        folder=None,
        identity={},
        device=torch.device("cpu"),
        seed=0,
        threads=1,
    )
    precise_statistics(job, 3)  # places 2, 3 | 4, 5 | 6, 7: after the end of training
    assert norm.running_mean.item() == pytest.approx(4.5)
    assert norm.running_var.item() == pytest.approx(0.5) and norm.momentum == 0.1
    precise_statistics(job, 0)
    assert norm.running_mean.item() == pytest.approx(4.5)
    assert np.isfinite(norm.running_var.item())
