"""A small Pascal VOC folder in its own format: squares of the classes' colours on noise."""

import numpy as np
from PIL import Image

COLOURS = {"bird": (200, 40, 40), "boat": (40, 200, 40), "cat": (40, 40, 200)}


def voc_folder(root, train: int = 36, test: int = 24, *, seed: int = 0):
    """Write `root/VOC2007` and return it; one image in six shows a `difficult` object too."""
    rng = np.random.default_rng(seed)
    folder, names = root / "VOC2007", list(COLOURS)
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    lists = {"train": [], "val": [], "test": []}
    for i in range(train + test):
        name = f"{i:06d}"
        shown = {names[i % 3]: 0}
        if i % 2:
            shown[names[(i + 1) % 3]] = 0
        if i % 6 == 0:
            shown[names[(i + 2) % 3]] = 1
        split = "test" if i >= train else ("val" if i % 4 == 3 else "train")
        lists[split].append(name)
        image = rng.integers(90, 130, (40, 48, 3), dtype=np.uint8)
        for place, (label, difficult) in enumerate(shown.items()):
            top, left = rng.integers(0, 4), 16 * place
            side = 5 if difficult else 15
            image[top : top + 2 * side, left : left + side] = COLOURS[label]
        Image.fromarray(image).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        write_annotation(folder, name, shown)
    lists["trainval"] = sorted(lists["train"] + lists["val"])
    for split, listed in lists.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(listed) + "\n")
    return folder


def write_annotation(folder, name: str, objects: dict[str, int]) -> None:
    """objects: class -> whether it is difficult."""
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    found = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult>{box}</object>"
        for label, difficult in objects.items()
    )
    text = f"<annotation><filename>{name}.jpg</filename>{found}</annotation>"
    (folder / "Annotations" / f"{name}.xml").write_text(text)
