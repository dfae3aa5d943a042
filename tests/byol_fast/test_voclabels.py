"""Image-level labels of a VOC folder, and what a broken one is refused with."""

import numpy as np
import pytest

from byol_fast.evaluate.voclabels import open_voc, voc_root
from pipelines.errors import DataError
from tests.byol_fast.voc_folder import COLOURS, voc_folder, write_annotation

LAUGHS = (
    '<!DOCTYPE a [<!ENTITY e0 "ha">'
    + "".join(f'<!ENTITY e{n + 1} "&e{n};&e{n};">' for n in range(30))
    + "]><annotation><object><name>&e30;</name></object></annotation>"
)
OUTSIDE = '<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/hostname">]><annotation>&f;</annotation>'


@pytest.fixture
def root(tmp_path):
    return voc_folder(tmp_path / "VOCdevkit", train=12, test=6)


def test_the_folder_is_found_at_three_depths(root, tmp_path):
    assert voc_root(root) == voc_root(root.parent) == voc_root(tmp_path) == root
    assert voc_root(root / "JPEGImages") is None and voc_root(tmp_path / "nowhere") is None


def test_labels_are_present_absent_or_difficult(root):
    write_annotation(root, "000001", {"bird": 1, "cat": 0})
    path = root / "Annotations" / "000002.xml"  # one plain object among difficult ones is enough
    path.write_text(path.read_text().replace("</annotation>", "") + "</annotation>")
    extra = "<object><name>boat</name><difficult>{}</difficult></object>"
    path.write_text(f"<annotation>{extra.format(1)}{extra.format(0)}{extra.format(1)}</annotation>")
    voc = open_voc(root)
    assert voc.classes == tuple(COLOURS) and len(voc.train) == 12 and len(voc.test) == 6
    assert voc.train_targets[:3].tolist() == [[1, 0, -1], [-1, 0, 1], [0, 1, 0]]
    assert voc.train.name(1).endswith("JPEGImages/000001.jpg")
    assert np.flatnonzero(voc.validation).tolist() == [3, 7, 11]
    assert voc.train.fingerprint != voc.test.fingerprint
    assert "6 images of" in voc.source and "test.txt" in voc.source


def test_test_images_may_lie_elsewhere(root, tmp_path):
    other = voc_folder(tmp_path / "test", train=3, test=9, seed=1)
    (root / "ImageSets" / "Main" / "test.txt").unlink()
    with pytest.raises(DataError, match=r"test\.txt cannot be read.*--test-data"):
        open_voc(root)
    assert len(open_voc(root, other).test) == 9


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "JPEGImages" / "000003.jpg").unlink(), r"lacks 1 listed.*000003"),
        (lambda r: (r / "Annotations" / "000003.xml").unlink(), r"000003\.xml cannot be read"),
        (lambda r: (r / "Annotations" / "000003.xml").write_text("<a>"), r"000003\.xml is no XML"),
        (lambda r: (r / "Annotations" / "000003.xml").write_text(LAUGHS), "refused, unread"),
        (lambda r: (r / "Annotations" / "000003.xml").write_text(OUTSIDE), "refused, unread"),
        (
            lambda r: (r / "Annotations" / "000003.xml").write_bytes(b" " * (8 << 20) + b"<a/>"),
            "more than any annotation",
        ),
        (lambda r: write_annotation(r, "000003", {"": 0}), r"000003\.xml has an object without"),
        (lambda r: (r / "ImageSets" / "Main" / "trainval.txt").write_text(""), "is empty"),
    ],
)
def test_what_is_broken_is_named(root, damage, message):
    damage(root)
    with pytest.raises(DataError, match=message):
        open_voc(root)
