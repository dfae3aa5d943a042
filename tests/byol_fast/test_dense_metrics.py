"""AP and mIoU on cases worked out by hand, and AP against pycocotools."""

import numpy as np
import pytest
import torch

from byol_fast.evaluate.dense import coco
from byol_fast.evaluate.dense.boxes import Annotated
from byol_fast.evaluate.dense.segment import class_iou, count, mean_iou
from byol_fast.evaluate.dense.voc_metric import Detections, average_precision, evaluate, iou
from tests.byol_fast.dense_data import make_coco


def truth(boxes, labels, difficult=None, identity=0):
    n = len(boxes)
    return Annotated(
        id=identity,
        image=None,
        height=100,
        width=100,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels, np.int64),
        difficult=np.zeros(n, np.bool_) if difficult is None else np.array(difficult),
    )


def found(boxes, labels, scores):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Detections(boxes, np.array(labels, np.int64), np.array(scores, np.float32))


A, B, C = (0, 0, 20, 20), (50, 50, 80, 80), (0, 60, 30, 90)
NONE = found([], [], [])


def test_a_perfect_detector_has_1_and_a_blind_one_0():
    images = [truth([A, B], [1, 2]), truth([C], [1]), truth([], [])]
    perfect = [found([A, B], [1, 2], [0.9, 0.8]), found([C], [1], [0.3]), NONE]
    measured = evaluate(perfect, images)
    assert (measured.ap, measured.ap50, measured.ap75) == (1, 1, 1)
    assert measured.by_class == {1: 1, 2: 1}
    blind = evaluate([NONE] * 3, images)
    assert (blind.ap, blind.ap50, blind.ap75) == (0, 0, 0)


def test_wrong_classes_and_wrong_places_have_0():
    images = [truth([A, B], [1, 2])]
    assert evaluate([found([A, B], [2, 1], [0.9, 0.8])], images).ap50 == 0
    assert evaluate([found([C, C], [1, 2], [0.9, 0.8])], images).ap50 == 0
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 90, (200, 2))
    random = np.concatenate([corner, corner + rng.uniform(2, 10, (200, 2))], 1)
    guesses = found(random, rng.integers(1, 3, 200), rng.random(200))
    assert evaluate([guesses], images).ap50 < 0.02


def test_overlap_decides_at_which_threshold_it_counts():
    near = (0, 0, 20, 16)  # IoU .8 with A
    measured = evaluate([found([near], [1], [0.9])], [truth([A], [1])])
    assert measured.ap50 == measured.ap75 == 1
    assert measured.ap == pytest.approx(0.6)  # .5 … .75: the overlap must be above, not equal
    half = (0, 0, 20, 10)
    assert evaluate([found([half], [1], [0.9])], [truth([A], [1])]).ap50 == 0


def test_a_second_hit_is_a_false_positive():
    images = [truth([A], [1]), truth([B], [1])]
    twice = [found([A, A], [1, 1], [0.9, 0.8]), found([B], [1], [0.7])]
    # Outcomes 1 0 1: recall .5 at precision 1, recall 1 at 2/3; six points at 1, five at 2/3.
    assert evaluate(twice, images).ap50 == pytest.approx((6 + 5 * 2 / 3) / 11)
    late = [found([A, A], [1, 1], [0.9, 0.1]), found([B], [1], [0.7])]
    assert evaluate(late, images).ap50 == 1  # after full recall it costs nothing


def test_a_difficult_object_counts_neither_way():
    images = [truth([A, B], [1, 1], [False, True])]
    assert evaluate([found([A], [1], [0.5])], images).ap50 == 1  # missing it costs nothing
    both = found([B, B, A], [1, 1, 1], [0.9, 0.8, 0.7])
    assert evaluate([both], images).ap50 == 1  # nor does finding it, even twice
    with pytest.raises(ValueError, match="no object that is not difficult"):
        evaluate([NONE], [truth([A], [1], [True])])


def test_eleven_points():
    outcomes = np.array([1, 0, 1, -1, 0])
    # Recall .25 at 1, .5 at 2/3, of four objects: points 0 .1 .2 at 1; .3 .4 .5 at 2/3; 0 beyond.
    assert average_precision(outcomes, 4) == pytest.approx((3 + 3 * 2 / 3) / 11)
    assert average_precision(np.array([], np.int64), 4) == 0


def test_iou():
    a, b = np.array([[0, 0, 10, 10]], np.float32), np.array([[5, 0, 15, 10], [20, 20, 30, 30]])
    assert iou(a, b).tolist() == [[pytest.approx(1 / 3), 0]]
    assert iou(a[:0], b).shape == (0, 2)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_pycocotools_on_eleven_points(seed):
    """Objects apart from each other, where both assign alike; pycocotools given eleven points."""
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    from pycocotools.coco import COCO

    rng = np.random.default_rng(seed)
    images, outputs, boxes, results = [], [], [], []
    for image in range(1, 9):
        places = rng.permutation(9)[: rng.integers(1, 6)]
        corners = np.stack([places % 3, places // 3], 1) * 33 + rng.uniform(0, 8, (len(places), 2))
        objects = np.concatenate([corners, corners + rng.uniform(12, 22, (len(places), 2))], 1)
        labels = rng.integers(1, 4, len(places))
        images.append(truth(objects, labels, identity=image))
        seen = np.repeat(objects, 2, 0) + rng.normal(0, 1.5, (2 * len(objects), 4))
        guess = np.where(rng.random(len(seen)) < 0.8, np.repeat(labels, 2), rng.integers(1, 4))
        scores = rng.random(len(seen))
        outputs.append(found(seen, guess, scores))
        for box, label in zip(images[-1].boxes.tolist(), labels, strict=True):
            wide, high = box[2] - box[0], box[3] - box[1]
            boxes.append({"id": len(boxes) + 1, "image_id": image, "category_id": int(label)})
            boxes[-1] |= {"bbox": [*box[:2], wide, high], "area": wide * high, "iscrowd": 0}
        for box, label, score in zip(outputs[-1].boxes.tolist(), guess, scores, strict=True):
            wide_high = [box[2] - box[0], box[3] - box[1]]
            one = {"image_id": image, "category_id": int(label), "score": float(np.float32(score))}
            results.append({**one, "bbox": [*box[:2], *wide_high]})
    data = COCO()
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
    listed = [{"id": i, "height": 100, "width": 100} for i in range(1, 9)]
    data.dataset = {"images": listed, "annotations": boxes, "categories": categories}
    data.createIndex()
    counted = cocoeval.COCOeval(data, data.loadRes(results), "bbox")
    counted.params.recThrs = np.linspace(0, 1, 11)
    counted.evaluate()
    counted.accumulate()
    counted.summarize()
    ours = evaluate(outputs, images)
    assert [ours.ap, ours.ap50, ours.ap75] == pytest.approx(counted.stats[:3].tolist(), abs=1e-9)
    assert 0.2 < ours.ap < ours.ap50 < 1


def test_coco_figures_of_perfect_shifted_and_no_results(tmp_path):
    pytest.importorskip("pycocotools")
    root = make_coco(tmp_path)
    source = coco.annotation_file(root, "val2017")
    data = coco.read(root, ("val2017",))
    ids = [image.id for image in data.images]
    numbers = coco.category_numbers(source)
    assert numbers == [3, 18, 90] and data.classes == ("car", "dog", "person")
    perfect, masks = [], []
    for image in data.images:
        for box, label, mask in zip(image.boxes, image.labels, coco.masks(image), strict=True):
            left, top, right, bottom = box.tolist()
            one = {"image_id": image.id, "category_id": numbers[label - 1], "score": 0.9}
            perfect.append({**one, "bbox": [left, top, right - left, bottom - top]})
            masks.append({**one, "segmentation": coco.run_length(mask > 0)})
    all_right = pytest.approx({"AP": 1, "AP50": 1, "AP75": 1})
    assert coco.evaluate(source, perfect, "bbox", ids) == all_right
    assert coco.evaluate(source, masks, "segm", ids) == all_right
    away = [{**one, "bbox": [0, 0, 3, 3]} for one in perfect]
    assert coco.evaluate(source, away, "bbox", ids)["AP50"] == 0
    assert coco.evaluate(source, [], "bbox", ids)["AP"] == 0


def test_miou_of_perfect_background_and_half():
    label = torch.zeros(10, 10, dtype=torch.int64)
    label[:5] = 1
    label[0, 0] = 255
    label[9, 9] = 2
    assert mean_iou(count(label, label.clamp(max=2), 3)) == 1
    background = count(label, torch.zeros_like(label), 3)
    # Class 0: 49 of the 99 known pixels it claims; classes 1 and 2: nothing.
    assert class_iou(background).tolist() == pytest.approx([49 / 99, 0, 0])
    assert mean_iou(background) == pytest.approx(49 / 99 / 3)
    assert int(background.sum()) == 99
    # A class that is neither there nor predicted is left out of the mean.
    assert mean_iou(count(label, label.clamp(max=2), 5)) == 1
    assert torch.isnan(class_iou(count(label, label.clamp(max=2), 5))[3:]).all()
    mixed = torch.tensor([[0, 0, 1, 1]])
    guess = torch.tensor([[0, 1, 1, 1]])
    assert class_iou(count(mixed, guess, 2)).tolist() == pytest.approx([1 / 2, 2 / 3])
