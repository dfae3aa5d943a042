"""VOC, COCO and Cityscapes as they lie on the disk, whole and broken; what a sample is."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from byol_fast.evaluate.dense import coco, crop, masks, recipes, voc
from byol_fast.evaluate.dense.boxes import fit_box, training_images, training_sample
from byol_fast.evaluate.dense.images import read_image
from byol_fast.evaluate.dense.stream import generator
from pipelines.errors import DataError
from tests.byol_fast.dense_data import (
    HEIGHT,
    WIDTH,
    draw,
    make_cityscapes,
    make_coco,
    make_voc,
    make_voc_masks,
    save_palette,
    voc_xml,
)

SETS = ("VOC2007/trainval", "VOC2012/trainval")


@pytest.fixture
def devkit(tmp_path):
    return make_voc(tmp_path)


def annotation(devkit, name="VOC2007", identity="000000"):
    return devkit / name / "Annotations" / f"{identity}.xml"


def test_voc_boxes_are_the_rectangles_drawn(devkit):
    data = voc.read(devkit.parent, SETS)  # the folder above VOCdevkit will do
    assert [image.id for image in data.images] == [
        *("VOC2007/000000", "VOC2007/000001", "VOC2012/000002", "VOC2012/000003")
    ]
    assert not data.left_out and len(data.classes) == 20
    for seed, image in enumerate(data.images):
        ((name, box),) = draw(seed)[1]
        assert image.boxes.tolist() == [list(map(float, box))]
        assert data.classes[image.labels[0] - 1] == name and not image.difficult.any()
    other = voc.read(devkit, SETS[:1])
    assert other.fingerprint != data.fingerprint == voc.read(devkit, SETS).fingerprint


def test_voc_difficult_objects_are_marked_and_kept(devkit):
    annotation(devkit).write_text(voc_xml(draw(0)[1], difficult=1))
    assert voc.read(devkit, SETS).images[0].difficult.tolist() == [True]


@pytest.mark.parametrize(
    ("things", "reason"),
    [
        ([("car", (10, 10, 10, 20))], "the box is empty"),
        ([("car", (200, 10, 220, 20))], "less than a pixel inside the image (64×48)"),
    ],
)
def test_voc_boxes_that_are_none_are_left_out_and_named(devkit, things, reason):
    annotation(devkit).write_text(voc_xml([*things, ("dog", (1, 1, 9, 9))]))
    data = voc.read(devkit, SETS)
    assert len(data.left_out) == 1
    assert reason in data.left_out[0] and "000000.xml: car" in data.left_out[0]
    assert data.images[0].boxes.tolist() == [[1, 1, 9, 9]]


def test_a_box_that_reaches_out_is_cut():
    box, reason = fit_box(np.array([-5, 10, 70, 90], np.float32), 48, 64)
    assert box.tolist() == [0, 10, 64, 48] and not reason
    assert fit_box(np.array([np.nan, 0, 1, 1], np.float32), 48, 64)[0] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (voc_xml([("unicorn", (1, 1, 9, 9))]), "'unicorn' is none of VOC's twenty classes"),
        ("<annotation><size><width>a</width>", "no XML"),
        ("<annotation/>", "size/width is None"),
        (voc_xml([("car", (1, 1, 9, 9))]).replace(">9<", ">x<"), "bndbox/xmax is 'x'"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "document type"),
        ("<?xml version='1.0'?>\n<!ENTITY b 'c'><annotation/>", "document type"),
        ("<annotation/>".encode("utf-16"), "no XML in UTF-8"),
    ],
)
def test_a_broken_voc_annotation_is_named(devkit, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    annotation(devkit).write_bytes(data)
    with pytest.raises(DataError) as caught:
        voc.read(devkit, SETS)
    assert message in str(caught.value) and "000000.xml" in str(caught.value)


def test_all_that_is_missing_is_counted(devkit):
    (devkit / "VOC2007" / "JPEGImages" / "000000.jpg").unlink()
    annotation(devkit, identity="000001").unlink()
    with pytest.raises(DataError, match=r"2 faults in .*") as caught:
        voc.read(devkit, SETS)
    assert "000000.jpg is missing" in str(caught.value)
    assert "000001.xml cannot be read" in str(caught.value)


def test_an_image_of_another_size_or_damaged_is_named(devkit):
    image = voc.read(devkit, SETS).images[0]
    Image.new("RGB", (30, 20)).save(image.image)
    with pytest.raises(DataError, match=r"000000\.jpg is 20×30 .* is for 48×64"):
        training_sample(image, 0, 0)
    image.image.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000000\.jpg cannot be decoded"):
        read_image(image.image)


def test_a_flip_takes_boxes_and_masks_along(tmp_path):
    pytest.importorskip("pycocotools")
    data = coco.read(make_coco(tmp_path), ("train2017",))
    image, flipped = data.images[0], []
    for place in range(20):
        x, target = training_sample(image, place, 0, coco.masks)
        ((left, top, right, bottom),) = target["boxes"].int().tolist()
        area = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
        area[top:bottom, left:right] = 1
        assert torch.equal(target["masks"][0], area)
        inside = x[:, top + 4 : bottom - 4, left + 4 : right - 4].float().mean((1, 2))
        assert inside[0] > 180 and inside[1:].max() < 80  # the first one is a red car
        flipped.append(left != int(image.boxes[0, 0]))
    assert 4 <= sum(flipped) <= 16
    again, _ = training_sample(image, 19, 0, coco.masks)
    assert torch.equal(again, x)


def test_coco_crowds_are_not_trained_on_and_empty_images_neither(tmp_path):
    root = make_coco(tmp_path)
    data = coco.read(root, ("train2017",))
    assert [len(image.boxes) for image in data.images] == [1, 1, 1, 1]  # a crowd in the last one
    assert [int(image.labels[0]) for image in data.images] == [1, 2, 3, 1]
    source = coco.annotation_file(root, "train2017")
    content = json.loads(source.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 100]
    source.write_text(json.dumps(content))
    data = coco.read(root, ("train2017",))
    assert len(data.images) == 4 and [i.id for i in training_images(data)] == [101, 102, 103]


def _edit(key, value):
    def edit(content):
        content["annotations"][0][key] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit("category_id", 5), "annotation 1: category_id 5 is unknown"),
        (_edit("image_id", 5), "annotation 1: image_id 5 is not among the images"),
        (_edit("bbox", [1, 2]), "annotation 1: bbox is [1, 2]"),
        (lambda c: c["images"][0].update(file_name="x.jpg"), "x.jpg is missing"),
        (lambda c: c["images"][0].update(file_name="../x.jpg"), "leads out of"),
        (lambda c: c.pop("categories"), "no COCO instance file"),
        (lambda c: c["images"][0].pop("height"), "no COCO instance file: KeyError('height')"),
        (lambda c: c["categories"][0].pop("name"), "no COCO instance file: KeyError('name')"),
    ],
)
def test_a_broken_coco_file_is_named(tmp_path, edit, message):
    source = coco.annotation_file(make_coco(tmp_path), "train2017")
    content = json.loads(source.read_text())
    edit(content)
    source.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        coco.read(tmp_path, ("train2017",))
    assert message in str(caught.value) and "instances_train2017.json" in str(caught.value)


def test_coco_boxes_that_are_none_are_left_out_and_named(tmp_path):
    source = coco.annotation_file(make_coco(tmp_path), "train2017")
    content = json.loads(source.read_text())
    content["annotations"][0]["bbox"] = [5, 5, 0, 9]
    source.write_text(json.dumps(content))
    data = coco.read(tmp_path, ("train2017",))
    (left_out,) = data.left_out
    assert "annotation 1 of 000000000000.jpg: the box is empty" in left_out
    source.write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        coco.read(tmp_path, ("train2017",))


def test_a_segmentation_that_is_none_is_named(tmp_path):
    pytest.importorskip("pycocotools")
    source = coco.annotation_file(make_coco(tmp_path), "train2017")
    content = json.loads(source.read_text())
    content["annotations"][0]["segmentation"] = None
    source.write_text(json.dumps(content))
    image = coco.read(tmp_path, ("train2017",)).images[0]
    with pytest.raises(DataError, match=r"000000000000\.jpg: object 1 has a segmentation"):
        coco.masks(image)


def test_voc_masks_come_from_both_folders(tmp_path):
    root = make_voc_masks(tmp_path)
    data = masks.read_voc(root, ("train", "aug"))
    folders = {pair.id: pair.label.parent.name for pair in data.pairs}
    assert folders == {
        **{"0": "SegmentationClass", "2": "SegmentationClass"},
        **{"1": "SegmentationClassAug", "3": "SegmentationClassAug"},
    }
    pixels, label = masks.read_pair(data.pairs[0], data)
    assert pixels.shape == (HEIGHT, WIDTH, 3) and sorted(np.unique(label)) == [0, 7, 255]
    assert data.classes[7] == "car" and data.classes[0] == "background"


def test_cityscapes_labels_become_the_nineteen_classes(tmp_path):
    data = masks.read_cityscapes(make_cityscapes(tmp_path), ("train",))
    assert len(data.classes) == 19 and len(data.pairs) == 4
    seen = [sorted(np.unique(masks.read_label(pair, data))) for pair in data.pairs]
    assert seen == [[0, 13], [0, 255], [0, 11], [0, 13]]  # road and car, not evaluated, person
    assert (data.numbers == 255).sum() == 34 - 19 + 1
    with pytest.raises(DataError, match=r"no CITY/\*_leftImg8bit.png"):
        masks.read_cityscapes(tmp_path, ("test",))


def test_broken_masks_are_named(tmp_path):
    root = make_voc_masks(tmp_path)
    data = masks.read_voc(root, ("train",))
    pair = data.pairs[0]
    label = np.array(Image.open(pair.label))
    label[0, 0] = 77
    save_palette(label, pair.label)
    with pytest.raises(DataError, match=r"0\.png has the value 77, which is no class"):
        masks.read_label(pair, data)
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(pair.label)
    with pytest.raises(DataError, match=r"0\.png is stored as RGB"):
        masks.read_label(pair, data)
    save_palette(np.zeros((9, 9), np.uint8), pair.label)
    with pytest.raises(DataError, match=r"0\.jpg is 48×64 .* is for 9×9"):
        masks.read_pair(pair, data)
    pair.label.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png cannot be decoded"):
        masks.read_label(pair, data)
    pair.label.unlink()
    data.pairs[1].image.unlink()
    with pytest.raises(DataError, match="2 faults") as caught:
        masks.read_voc(root, ("train",))
    assert "0.png is missing" in str(caught.value) and "2.jpg is missing" in str(caught.value)


def test_a_test_image_must_not_be_trained_on(tmp_path):
    root = make_voc_masks(tmp_path)
    train, test = masks.read_voc(root, ("train", "aug")), masks.read_voc(root, ("val",))
    masks.apart(train, test)
    with pytest.raises(DataError, match=r"2 test images are in the training sets too, .*0\.jpg"):
        masks.apart(train, masks.read_voc(root, ("train", "val")))


QUICK = recipes.quick_segmentation(recipes.VOC12AUG)


def cut(place, recipe=QUICK, label=None):
    pixels, _ = draw(0)
    if label is None:
        label = (pixels[..., 0] > 180).astype(np.uint8)
    mean = std = (0.5, 0.5, 0.5)
    return crop.training_crop(pixels, label, recipe, generator(0, place), mean=mean, std=std)


def test_a_crop_is_a_function_of_its_place():
    x, label = cut(3)
    assert x.shape == (3, 64, 64) and label.shape == (64, 64) and label.dtype == torch.int64
    again, _ = cut(3)
    other, _ = cut(4)
    assert torch.equal(x, again) and not torch.equal(x, other)


def test_what_lies_beyond_the_image_is_zero_and_has_no_class():
    sizes = set()
    for place in range(8):
        x, label = cut(place)
        beyond = label == 255
        assert bool((x[:, beyond] == 0).all())
        sizes.add(int(beyond.sum()))
    assert 0 in sizes and max(sizes) > 1000  # factors below and above 1


def test_pixels_and_classes_stay_together():
    plain = replace(QUICK, scales=(1.0, 1.0))
    for place in range(12):
        x, label = cut(place, plain)
        if (label == 1).sum() < 50:
            continue
        # Distorted or not, the car's colour is far from the noise around it.
        inside, outside = x[:, label == 1].mean(1), x[:, label == 0].mean(1)
        assert (inside - outside).abs().max() > 0.2


def test_fitting_into_a_size():
    assert crop.scaled_size(375, 500, (2048, 512)) == (512, 683)
    assert crop.scaled_size(1024, 2048, (2049, 1025)) == (1025, 2049)
    assert crop.scaled_size(100, 1000, (2048, 512)) == (205, 2048)
    assert crop.scaled_size(375, 500, (2048, 512), 0.5) == (256, 341)


def test_distortion_changes_what_it_says():
    grey, red = torch.full((3, 4, 4), 100.0), torch.zeros(3, 4, 4)
    red[0] = 200.0
    seen = {tuple(crop.distort(grey, generator(0, i))[:, 0, 0].round().tolist()) for i in range(40)}
    assert len(seen) > 10 and all(max(c) - min(c) <= 1 for c in seen)  # grey stays grey
    hues = torch.stack([crop.distort(red, generator(0, i))[:, 0, 0] for i in range(40)])
    assert bool((hues >= 0).all() and (hues <= 255).all())
    assert bool((hues.argmax(1) == 0).all()) and hues[:, 1:].max() > 30  # 36° at most
    halved = crop._saturate(red, 0.5)[:, 0, 0].tolist()
    assert halved == [200.0, 100.0, 100.0]  # S 1 to ½, V kept
    assert torch.allclose(crop._saturate(red, 1.5), red)


def test_a_crop_of_nearly_one_class_is_drawn_again():
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    label[:, 40:] = 1
    small = replace(QUICK, resize_to=(WIDTH, HEIGHT), scales=(1.0, 1.0), crop=16)

    def most(recipe, place):
        classes = cut(place, recipe, label)[1]
        return float(torch.bincount(classes.ravel()).max() / classes.numel())

    drawn = [most(small, place) for place in range(30)]
    free = [most(replace(small, most_of_one_class=1.0), place) for place in range(30)]
    assert sum(share < 0.75 for share in drawn) > 25 > sum(share < 0.75 for share in free)
