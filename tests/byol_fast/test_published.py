"""Published figures: whose they are, and which data they stand beside."""

from argparse import Namespace

import pytest

from byol_fast.evaluate import differs, published
from byol_fast.evaluate.commands import common, mhead, semi
from byol_fast.evaluate.protocols import MMPRETRAIN, PAPER

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SYNSETS = tuple(f"n{number:08d}" for number in range(1000))


def test_figures_name_the_project_that_measured_them():
    theirs = [
        *(*published.KNN.values(), *published.LOW_SHOT.values(), *published.MHEAD["places205"]),
        *(published.SVM, published.VOC_DETECTION, published.VOC_SEGMENTATION),
        *(*published.COCO_BOX, *published.COCO_MASK),
    ]
    assert {figure.by for figure in theirs} == {"MMSelfSup"}
    assert published.LINEAR["mmpretrain"].by == "mmpretrain"
    assert {figure.by for figure in published.MHEAD["imagenet"]} == {"OpenMixup"}
    assert [figure.value for figure in published.CIFAR10_KNN] == [86.9, 86.8, 91.0]
    assert published.CIFAR10_LINEAR.value == 92.58 and published.CIFAR10_LINEAR.by == "solo-learn"


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (SYNSETS, "imagenet"),
        (tuple(map(str, range(1000))), "imagenet"),  # a list of it has numbers
        (SYNSETS[:100], None),  # ImageNet-100
        (CIFAR10, "cifar10"),
        (("car", "plane", *CIFAR10[2:]), "cifar10"),
        (tuple(map(str, range(10))), None),  # ten numbers may be anything
        (("cat", "dog"), None),
    ],
)
def test_data_sets_are_known_by_their_classes(classes, expected):
    assert published.dataset_of(classes) == expected
    args, labelled = Namespace(dataset=None), Namespace(classes=classes)
    assert common.dataset_of(args, labelled) == expected
    args.dataset = "cifar10"
    assert common.dataset_of(args, labelled) == "cifar10"


def test_figures_of_imagenet_need_its_classes():
    args = Namespace(dataset=None, quick=False, recipe="imagenet")
    here, other = Namespace(classes=SYNSETS), Namespace(classes=CIFAR10)
    assert mhead._published(args, here)[0].value == 15.16
    assert mhead._published(args, other) == (None,) * 5
    assert semi._published(args, here, 0.01).value == 53.2
    assert semi._published(args, other, 0.01) is None
    args.recipe = "places205"  # which its user has named
    assert mhead._published(args, other)[0].on == "Places205"


def test_mmpretrain_s_cosine_falls_by_the_epoch():
    total = 90 * 312
    rates = [MMPRETRAIN.learning_rate(step, total) for step in range(total)]
    assert len(set(rates)) == 90 and rates[:312] == [1.6] * 312
    assert rates[45 * 312] == pytest.approx(0.8) and "cosine per epoch" in MMPRETRAIN.arithmetic()
    assert len({PAPER.learning_rate(step, 1000) for step in range(1000)}) == 1000
    assert "cosine per step" in PAPER.arithmetic()


def test_a_protocol_is_published_where_nothing_differs():
    assert differs.record([]) == {"published_protocol": True, "differs": []}
    assert differs.record(["T 0.5"]) == {"published_protocol": False, "differs": ["T 0.5"]}
    assert differs.settings({"epochs": 3, "lr": None, "grid": False}) == ["epochs 3"]
    assert differs.size(224) == [] and differs.size(32)
