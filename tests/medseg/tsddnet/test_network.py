"""Detector, crops and fusion: against torchvision itself, and what must have no gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torchvision.models import detection as tv
from torchvision.ops import roi_align

from cohobate.core.errors import InputError
from cohobate.medseg.tsddnet.network import MEAN, STD, Detections, Detector, Diagnoser

NONE = [float("nan")] * 4
SIZE = torch.tensor([[64.0, 54.0], [64.0, 64.0]])


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_the_detector_is_torchvisions(images):
    """Losses and detections equal those of the untouched module with the same weights."""
    torch.manual_seed(3)
    own = Detector("fasterrcnn_mobilenet_v3_large_320_fpn", None, 64)
    plain = tv.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=64, max_size=64,
        box_score_thresh=0.0, box_nms_thresh=0.7,
    )  # fmt: skip
    state = {k.removeprefix("heads."): v for k, v in own.state_dict().items()}
    plain.load_state_dict(state)
    boxes = torch.tensor([[10.0, 10, 40, 40], [5, 20, 30, 60]])
    targets = [{"boxes": b[None], "labels": torch.ones(1, dtype=torch.long)} for b in boxes]
    torch.manual_seed(4)
    want = sum(plain.train()(list(images), targets).values())
    own.train()
    torch.manual_seed(4)
    got = own.losses(own.features(images), images, boxes)
    torch.testing.assert_close(got, want)
    own.load_state_dict({k: plain.state_dict()[k.removeprefix("heads.")] for k in own.state_dict()})
    own.eval()
    with torch.no_grad():
        expected = plain.eval()(list(images))
        found = own.detect(own.features(images), images, SIZE)
    for i, one in enumerate(expected):
        count = len(one["scores"])
        torch.testing.assert_close(found.scores[i, :count], one["scores"])
        assert (found.scores[i, count:] == -1).all()
    inside = expected[1]["boxes"]
    torch.testing.assert_close(found.boxes[1, : len(inside)], inside)
    assert (found.boxes[0, :, 2] <= 54).all(), "beyond the image is padding"


def test_one_stage_detectors_work_too(images):
    torch.manual_seed(0)
    net = Detector("retinanet_resnet50_fpn", {"detections_per_img": 5}, 64)
    features = net.features(images)
    loss = net.losses(features, images, torch.tensor([[10.0, 10, 40, 40], NONE]))
    assert loss.isfinite()
    assert loss.requires_grad
    net.eval()
    found = net.detect(features, images, SIZE)
    assert found.boxes.shape[0] == 2


def test_images_without_a_box_do_not_reach_the_detectors_heads(net, images):
    net.train()
    features = net.detector.features(images)
    loss = net.detector.losses(features, images, torch.tensor([NONE, NONE]))
    assert loss.item() == 0.0
    assert not loss.requires_grad
    boxes = torch.tensor([[0.0, 0, 30, 30], [5, 5, 40, 40]])
    said = net.diagnose(features, images, SIZE, boxes)
    F.cross_entropy(said.logits, torch.tensor([0, 1])).backward()
    assert all(p.grad is None for p in net.detector.heads.parameters())
    assert any(p.grad.abs().sum() > 0 for p in net.detector.backbone.parameters())


def test_a_batch_with_and_without_boxes_trains_on_those_with(net, images):
    """The loss is that of the boxed image alone, given the same features."""
    net.eval()
    features = net.detector.features(images)
    boxes = torch.tensor([[10.0, 10, 40, 40], NONE])
    torch.manual_seed(1)
    both = net.detector.losses(features, images, boxes)
    torch.manual_seed(1)
    first = {k: v[:1] for k, v in features.items()}
    alone = net.detector.losses(first, images[:1], boxes[:1])
    torch.testing.assert_close(both, alone)


def test_crops_are_those_of_a_loop(net, images):
    boxes = torch.tensor([[10.0, 12, 40, 52], [0, 0, 20, 20], [30, 30, 54, 64]])
    of = torch.tensor([1, 0, 0])
    crops = net.crops(images, SIZE, boxes, of)
    for i, (box, source) in enumerate(zip(boxes, of, strict=True)):
        height, width = SIZE[source]
        w, h = box[2] - box[0], box[3] - box[1]
        wide = torch.stack([
            (box[0] - 0.1 * w).clamp(min=0), (box[1] - 0.1 * h).clamp(min=0),
            (box[2] + 0.1 * w).clamp(max=width), (box[3] + 0.1 * h).clamp(max=height),
        ])  # fmt: skip
        want = roi_align(images[source][None], [wide[None]], 32, sampling_ratio=2, aligned=True)
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(crops[i], (want[0] - mean) / std)


def test_the_crop_is_differentiable_in_the_image(net, images):
    images.requires_grad_()
    net.crops(images, SIZE, torch.tensor([[10.0, 10, 20, 20], [0, 0, 9, 9]])).sum().backward()
    assert images.grad[0, :, 14, 14].abs().sum() > 0
    assert images.grad[0, :, 40, 40].abs().sum() == 0


def test_no_detection_takes_the_whole_image_and_says_so():
    boxes = torch.tensor([[[1.0, 1, 9, 9], [2, 2, 8, 8]], [[1, 1, 9, 9], [3, 3, 3, 9]]])
    scores = torch.tensor([[0.03, 0.04], [0.5, 0.9]])
    box, score = Detections(boxes, scores).top(SIZE, 0.05)
    assert box.tolist() == [[0, 0, 54, 64], [0, 0, 64, 64]]  # the second's best has no area
    assert score.tolist() == [0, 0]
    box, score = Detections(boxes, scores).top(SIZE, 0.04)
    assert box[0].tolist() == [2, 2, 8, 8]


def test_the_plain_pipeline_has_no_branches(small_args, images):
    detector = Detector("test_resnet", small_args, 64)
    plain = Diagnoser(detector, "test_resnet", 2, 32, fusion=False).eval()
    box, _, logits = plain(images, SIZE)
    assert logits.shape == (2, 2)
    crops = plain.crops(images, SIZE, box)
    torch.testing.assert_close(logits, plain.classifier(crops))
    assert not any("branch" in name or "fuse" in name for name in plain.state_dict())


def test_weights_of_torchvision_load_but_for_the_predictor():
    build = tv.fasterrcnn_mobilenet_v3_large_320_fpn
    coco = build(weights=None, weights_backbone=None, num_classes=91).state_dict()
    net = Detector("fasterrcnn_mobilenet_v3_large_320_fpn", None, 64)
    fitting, left = net.torchvision_state(coco)
    assert {name.rsplit(".", 2)[-2] for name in left} == {"cls_score", "bbox_pred"}
    net.load_state_dict(fitting, strict=False)
    assert torch.equal(net.heads.state_dict()["roi_heads.box_head.fc6.weight"],
                       coco["roi_heads.box_head.fc6.weight"])  # fmt: skip
    del coco["roi_heads.box_head.fc6.weight"]
    with pytest.raises(InputError, match=r"roi_heads\.box_head\.fc6\.weight"):
        net.torchvision_state(coco)


@pytest.mark.parametrize(
    ("name", "args", "side", "message"),
    [
        ("fasterrcnn_resnet50_fpnn", None, 64, "did you mean 'fasterrcnn_resnet50_fpn'"),
        ("test_resnet", {"widths": 8}, 64, "test_resnet has no .widths."),
        ("test_resnet", None, 70, "image_size 70: not a multiple of 32"),
    ],
)
def test_a_detector_that_does_not_exist(name, args, side, message):
    with pytest.raises(InputError, match=message):
        Detector(name, args, side)


def test_a_classifier_that_does_not_exist(small_args):
    with pytest.raises(InputError, match="did you mean 'resnet18'"):
        Diagnoser(Detector("test_resnet", small_args, 64), "resnet1", 2, 32)
