"""Data sets of coloured rectangles in the layouts of VOC, COCO and Cityscapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

COLOURS = {"car": (220, 40, 40), "dog": (40, 200, 40), "person": (40, 40, 220)}
HEIGHT, WIDTH = 48, 64
Thing = tuple[str, tuple[int, int, int, int]]  # class; left, top, right, bottom, exclusive


def draw(seed: int, things: int = 1) -> tuple[np.ndarray, list[Thing]]:
    """An image of rectangles on noise, and where they are."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(100, 140, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    found = []
    for i in range(things):
        name = list(COLOURS)[(seed + i) % len(COLOURS)]
        wide, high = rng.integers(18, 28, 2)
        left, top = rng.integers(0, WIDTH - wide), rng.integers(0, HEIGHT - high)
        box = (int(left), int(top), int(left + wide), int(top + high))
        pixels[box[1] : box[3], box[0] : box[2]] = COLOURS[name]
        found.append((name, box))
    return pixels, found


def voc_xml(things: list[Thing], **changes: Any) -> str:
    """An annotation as the devkit has it; boxes count from 1 and include the last pixel."""
    objects = "".join(
        f"<object><name>{name}</name><difficult>{changes.get('difficult', 0)}</difficult><bndbox>"
        f"<xmin>{b[0] + 1}</xmin><ymin>{b[1] + 1}</ymin><xmax>{b[2]}</xmax><ymax>{b[3]}</ymax>"
        "</bndbox></object>"
        for name, b in things
    )
    size = f"<width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth>"
    return f"<annotation><size>{size}</size>{objects}</annotation>"


def make_voc(root: Path, *, train: int = 4, test: int = 2) -> Path:
    """Boxes in VOC2007 and VOC2012, and classes for pixels in VOC2012."""
    seed = 0
    for year, split, images in (
        ("VOC2007", "trainval", train // 2),
        ("VOC2012", "trainval", train - train // 2),
        ("VOC2007", "test", test),
    ):
        folder = root / "VOCdevkit" / year
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        ids = []
        for _ in range(images):
            pixels, things = draw(seed)
            identity = f"{seed:06}"
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{identity}.jpg", quality=95)
            (folder / "Annotations" / f"{identity}.xml").write_text(voc_xml(things))
            ids.append(identity)
            seed += 1
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return root / "VOCdevkit"


def make_voc_masks(root: Path, *, train: int = 4, test: int = 2) -> Path:
    """Classes for pixels in VOC2012: half of the training images among the extra ones."""
    folder = root / "VOCdevkit" / "VOC2012"
    numbers = {"car": 7, "dog": 12, "person": 15}
    names = ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation")
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    lists: dict[str, list[str]] = {"train": [], "aug": [], "val": []}
    for seed in range(train + test):
        split = "val" if seed >= train else "aug" if seed % 2 else "train"
        pixels, things = draw(seed)
        label = np.zeros((HEIGHT, WIDTH), np.uint8)
        for name, (left, top, right, bottom) in things:
            label[top:bottom, left:right] = 255  # VOC's borders have no class
            label[top + 1 : bottom - 1, left + 1 : right - 1] = numbers[name]
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{seed}.jpg", quality=95)
        save_palette(label, folder / f"SegmentationClass{'Aug' * (split == 'aug')}/{seed}.png")
        lists[split].append(str(seed))
    for split, ids in lists.items():
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(ids))
    return root / "VOCdevkit"


def save_palette(label: np.ndarray, path: Path) -> None:
    """A PNG of palette numbers, as VOC's."""
    image = Image.fromarray(label, mode="P")
    image.putpalette([value % 256 for value in range(768)])
    image.save(path)


def make_coco(root: Path, *, train: int = 4, test: int = 2) -> Path:
    """Polygons, one run-length crowd, and categories whose numbers have gaps."""
    categories = [{"id": 3, "name": "car"}, {"id": 18, "name": "dog"}, {"id": 90, "name": "person"}]
    numbers = {category["name"]: category["id"] for category in categories}
    seed = 0
    for split, count in (("train2017", train), ("val2017", test)):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for _ in range(count):
            pixels, things = draw(seed)
            name = f"{seed:012}.jpg"
            Image.fromarray(pixels).save(root / split / name, quality=95)
            images.append({"id": seed + 100, "file_name": name, "height": HEIGHT, "width": WIDTH})
            for thing, (left, top, right, bottom) in things:
                wide, high = right - left, bottom - top
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": seed + 100,
                        "category_id": numbers[thing],
                        "bbox": [left, top, wide, high],
                        "area": wide * high,
                        "iscrowd": 0,
                        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                    }
                )
            seed += 1
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": 100 + seed - 1,
                "category_id": 3,
                "bbox": [0, 0, WIDTH, 4],
                "area": 4 * WIDTH,
                "iscrowd": 1,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]},
            }
        )
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def make_cityscapes(root: Path, *, train: int = 4, test: int = 2) -> Path:
    """Two towns; label numbers as stored: road 7, car 26, person 24, 1 is not evaluated."""
    numbers = {"car": 26, "dog": 1, "person": 24}
    for split, town, seeds in (
        ("train", "aachen", range(train)),
        ("val", "lindau", range(train, train + test)),
    ):
        for seed in seeds:
            pixels, things = draw(seed)
            label = np.full((HEIGHT, WIDTH), 7, np.uint8)
            for name, (left, top, right, bottom) in things:
                label[top:bottom, left:right] = numbers[name]
            name = f"{town}_{seed:06}_000019"
            image = root / "leftImg8bit" / split / town / f"{name}_leftImg8bit.png"
            where = root / "gtFine" / split / town / f"{name}_gtFine_labelIds.png"
            for path, array in ((image, pixels), (where, label)):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return root


def thin_resnet() -> ResNet:
    """A ResNet's layout with next to no arithmetic."""
    net = ResNet(BasicBlock, [1, 1, 1, 1])
    net.inplanes = 16
    net.conv1, net.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
    for number, (width, stride) in enumerate(((16, 1), (32, 2), (64, 2), (64, 2)), start=1):
        setattr(net, f"layer{number}", net._make_layer(BasicBlock, width, 1, stride))
    net.fc = nn.Identity()
    return net
