"""The detectors and the segmenter: what they are built of, beside torchvision's own."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, roi_align

from byol_fast.evaluate.dense import detector, fcn, recipes
from byol_fast.evaluate.dense.detect import loss_of
from byol_fast.networks.padding import set_padding
from tests.byol_fast.dense_data import thin_resnet

MEAN = STD = (0.5, 0.5, 0.5)
C4, FPN = (
    replace(recipes.quick_detection(r), short_sides=(64,), rois_per_image=8)
    for r in (recipes.VOC, recipes.COCO)
)


def build(recipe, net=None, classes=3):
    torch.manual_seed(0)
    return detector.build(net or thin_resnet(), classes, recipe, mean=MEAN, std=STD)


def sample(masks=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8, generator=generator)
    target = {"boxes": torch.tensor([[5.0, 5, 30, 35]]), "labels": torch.tensor([2])}
    if masks:
        target["masks"] = torch.ones(1, 60, 80, dtype=torch.uint8)
    return x, target


def test_c4_with_resnet50_is_the_published_layout():
    with torch.device("meta"):
        model = detector.build(resnet50(), 20, recipes.VOC, mean=MEAN, std=STD)
    assert model.backbone.out_channels == 1024
    assert model.rpn.anchor_generator.num_anchors_per_location() == [15]
    assert model.rpn.head.conv[0][0].weight.shape == (1024, 1024, 3, 3)
    pool, head = model.roi_heads.box_roi_pool, model.roi_heads.box_head
    assert pool.output_size == (14, 14) and pool.strides == (16,)
    assert head.norm.num_features == 2048  # the extra norm after layer 4
    predictor = model.roi_heads.box_predictor
    assert predictor.cls_score.weight.shape == (21, 2048)
    assert predictor.bbox_pred.weight.shape == (84, 2048)
    assert model.rpn._pre_nms_top_n == {"training": 12_000, "testing": 6_000}
    assert model.rpn._post_nms_top_n == {"training": 2_000, "testing": 1_000}
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 512
    assert model.roi_heads.detections_per_img == 100
    assert model.transform.min_size == tuple(range(480, 801, 32))
    assert model.transform.max_size == 1333 and all(p.requires_grad for p in model.parameters())
    detector.test_sizes(model, recipes.VOC)
    assert model.transform.min_size[-1] == 800


def test_fpn_with_resnet50_has_normalised_heads():
    with torch.device("meta"):
        model = detector.build(resnet50(), 80, recipes.COCO, mean=MEAN, std=STD)
    heads = model.roi_heads
    assert model.backbone.out_channels == 256
    assert heads.box_roi_pool.strides == (4, 8, 16, 32) and heads.box_roi_pool.output_size == (7, 7)
    convolutions = [m for m in heads.box_head.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 4 and heads.box_predictor.cls_score.weight.shape == (81, 1024)
    assert heads.mask_roi_pool.output_size == (14, 14)
    assert heads.mask_predictor.mask_fcn_logits.out_channels == 81
    for part, norms in ((model.backbone.fpn, 8), (heads.box_head, 4), (heads.mask_head, 4)):
        assert sum(isinstance(m, nn.BatchNorm2d) for m in part.modules()) == norms
    assert model.rpn.anchor_generator.num_anchors_per_location() == [3] * 5


@pytest.mark.parametrize("recipe", [C4, FPN], ids=["c4", "fpn"])
def test_every_parameter_learns_from_one_batch(recipe):
    model = build(recipe).train()
    torch.manual_seed(0)
    loss = loss_of(model, torch.device("cpu"), [sample(recipe is FPN)] * 2)
    loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Biases before a norm, and the classes and mask rows of which no example was shown.
    assert [name for name in still if "weight" in name and "bn" not in name] == []


def test_heads_start_small():
    model = build(C4)
    predictor = model.roi_heads.box_predictor
    assert predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.2)


def test_bf16_keeps_boxes_in_fp32():
    """Anchors take the dtype of the features: bf16 would round 1001 to 1000."""
    x = torch.randn(1, 3, 64, 64)
    images = ImageList(x, [(64, 64)])
    for recipe in (C4, FPN):
        model = build(recipe)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.backbone(x)
            assert model.backbone.body.conv1(x).dtype == torch.bfloat16
        assert {level.dtype for level in features.values()} == {torch.float32}
        (anchors,) = model.rpn.anchor_generator(images, list(features.values()))
        assert anchors.dtype == torch.float32


def test_aligned_pooling_of_a_ramp_is_exact():
    """On f(x, y) = x a bin's value is the feature coordinate of its centre, half-pixel aligned."""
    ramp = (torch.arange(32) + 0.5).repeat(32, 1)[None, None]  # value = position in feature pixels
    pool = detector.AlignedRoIAlign(["0"], 2, [4])
    box = torch.tensor([[16.0, 16.0, 80.0, 80.0]])  # 4 … 20 in feature pixels
    out = pool({"0": ramp}, [box], [(128, 128)])
    assert torch.allclose(out[0, 0], torch.tensor([[8.0, 16.0], [8.0, 16.0]]))
    theirs = MultiScaleRoIAlign(["0"], 2, 2)({"0": ramp}, [box], [(128, 128)])
    assert torch.allclose(theirs[0, 0] - out[0, 0], torch.full((2, 2), 0.5))  # half a pixel off


def test_pooling_takes_the_level_of_each_box():
    features = {str(i): torch.full((2, 1, 64 >> i, 64 >> i), float(i)) for i in range(4)}
    pool = detector.AlignedRoIAlign(["0", "1", "2", "3"], 2, [4, 8, 16, 32])
    boxes = [
        torch.tensor([[0.0, 0, 60, 60], [0, 0, 120, 120]]),
        torch.tensor([[0.0, 0, 230, 230], [0, 0, 256, 450]]),
    ]
    out = pool(features, boxes, [(256, 256)] * 2)
    assert out[:, 0, 0, 0].tolist() == [0, 1, 2, 2]
    noise = {"0": torch.randn(2, 3, 16, 16)}
    rois = torch.tensor([[1.0, 3, 5, 40, 44]])
    ours = detector.AlignedRoIAlign(["0"], 3, [4])(noise, [rois[:0, 1:], rois[:, 1:]], [])
    assert torch.equal(ours, roi_align(noise["0"], rois, 3, 1 / 4, aligned=True))


def test_the_small_stem_has_another_stride():
    net = thin_resnet()
    net.conv1, net.maxpool = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.Identity()
    model = build(C4, net)
    assert model.roi_heads.box_roi_pool.strides == (4,)
    assert loss_of(model.train(), torch.device("cpu"), [sample()] * 2).isfinite()


def test_same_padding_changes_no_stride_and_no_size():
    net = thin_resnet()
    set_padding(net, "same")
    model = build(C4, net)
    assert model.roi_heads.box_roi_pool.strides == (16,)
    net = thin_resnet()
    set_padding(net, "same")
    with torch.no_grad():
        assert segmenter(net=net).eval()(torch.zeros(1, 3, 64, 64))[0].shape[2:] == (8, 8)


def test_dilation_is_torchvision_s():
    torch.manual_seed(0)
    ours = resnet50().eval()
    theirs = resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    theirs.load_state_dict(ours.state_dict())
    fcn.dilate(ours.layer3, 2)
    fcn.dilate(ours.layer4, 4)
    for a, b in zip(ours.modules(), theirs.modules(), strict=True):
        if isinstance(a, nn.Conv2d):
            assert (a.stride, a.dilation, a.padding) == (b.stride, b.dilation, b.padding)
    x = torch.randn(1, 256, 4, 4)
    with torch.no_grad():
        parts = [nn.Sequential(n.layer2, n.layer3, n.layer4)(x) for n in (ours, theirs)]
    assert torch.equal(*parts) and parts[0].shape == (1, 2048, 2, 2)


def segmenter(recipe=recipes.VOC12AUG, net=None, classes=5, **changes):
    torch.manual_seed(0)
    return fcn.Segmenter(net or thin_resnet(), classes, replace(recipe, **changes))


@pytest.mark.parametrize("net", [resnet18, resnet50])
def test_the_head_is_the_published_one(net):
    with torch.device("meta"):
        model = fcn.Segmenter(net(), 21, recipes.VOC12AUG)
    wide = 2048 if net is resnet50 else 512
    shapes = [m.weight.shape[:2] for m in model.head.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(512, wide), (512, 512), (512, wide + 512), (21, 512)]
    shapes = [m.weight.shape[:2] for m in model.auxiliary.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(256, wide // 2), (21, 256)]
    assert model.head.dropout.p == 0.1


def test_logits_have_an_eighth_of_the_size():
    model = segmenter(channels=8)
    main, auxiliary = model(torch.randn(2, 3, 64, 64))
    assert main.shape == auxiliary.shape == (2, 5, 8, 8)
    assert len(model.eval()(torch.randn(1, 3, 64, 64))) == 1


def test_the_loss_counts_every_pixel_and_learns_from_the_known_ones():
    model = segmenter(channels=8, dropout=0.0)
    x, classes = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    classes[:, :8] = 255
    main, auxiliary = (model.upsample(y, 32, 32) for y in model(x))
    each = [
        F.cross_entropy(y, classes, ignore_index=255, reduction="none") for y in (main, auxiliary)
    ]
    assert model.loss(x, classes).item() == pytest.approx(
        (each[0].mean() + 0.4 * each[1].mean()).item(), rel=1e-5
    )
    assert model.loss(x, torch.full_like(classes, 255)).item() == 0


def test_windows_cover_the_image_and_their_mean_is_taken():
    assert fcn.starts(2049, 769, 513) == [0, 513, 1026, 1280]
    assert fcn.starts(1025, 769, 513) == [0, 256]
    assert fcn.starts(500, 769, 513) == [0] and fcn.starts(769, 769, 513) == [0]
    model = segmenter(recipes.CITYSCAPES, channels=8, crop=33, slide=20).eval()
    x = torch.randn(1, 3, 33, 60)
    with torch.no_grad():
        seen = model._by_windows(x, 20)
        left, middle, right = (model._whole(x[..., i : i + 33]) for i in (0, 20, 27))
    assert torch.allclose(seen[..., :20], left[..., :20])
    assert torch.allclose(seen[..., 53:], right[..., 26:])
    three = (left[..., 27:33] + middle[..., 7:13] + right[..., :6]) / 3
    assert torch.allclose(seen[..., 27:33], three, atol=1e-6)


def test_a_prediction_has_the_size_asked_for():
    for recipe, slide in ((recipes.VOC12AUG, None), (recipes.CITYSCAPES, 20)):
        model = segmenter(recipe, channels=8, crop=33, slide=slide).eval()
        with torch.no_grad():
            classes = model.predict(torch.randn(1, 3, 33, 60), 70, 90)
        assert classes.shape == (70, 90) and classes.max() < 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", [C4, FPN], ids=["c4", "fpn"])
def test_a_detector_trains_in_bf16_on_a_gpu(recipe):
    from byol_fast.evaluate.dense.loop import mixed_precision

    device = torch.device("cuda")
    model = build(recipe).train().to(device)
    with mixed_precision(device):
        loss = loss_of(model, device, [sample(recipe is FPN)] * 2)
    loss.backward()
    assert loss.isfinite() and all(
        p.grad.isfinite().all() for p in model.parameters() if p.grad is not None
    )
