"""D-Net, C-Net and the fusion network that joins them.

D-Net is any detector of torchvision, C-Net any classifier of timm. The backbone of the detector is
run once: its features serve the detector and branch A of the fusion network.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torchvision.models import detection as tv
from torchvision.models import get_model, list_models
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align

from cohobate.core.catalog import suggestion
from cohobate.core.errors import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CANDIDATES = 100  # detections an image, before selection takes its own share


class Detections(NamedTuple):
    """Detections of a batch, best first, filled up with score -1.

    Attributes:
        boxes: (B, N, 4), x1 y1 x2 y2 in pixels of the canvas.
        scores: (B, N).
    """

    boxes: Tensor
    scores: Tensor

    def top(self, size: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """The best box of each image, or the whole image where no score reaches the threshold.

        Args:
            size: (B, 2), height and width of each image on its canvas.
            threshold: Lowest score of a detection.

        Returns:
            Boxes (B, 4) and scores (B,); a score of 0 marks the whole image.
        """
        score, place = self.scores.max(1)
        box = self.boxes.gather(1, place[:, None, None].expand(-1, 1, 4))[:, 0]
        whole = torch.cat([torch.zeros_like(size), size.flip(1)], 1).to(box.dtype)
        found = (score >= threshold) & (box[:, 2:] > box[:, :2]).all(1)
        return torch.where(found[:, None], box, whole), torch.where(found, score, 0.0)


class _Given(nn.Module):
    """Stands in a detector where its backbone was and returns features that are there already."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.features: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.features


class _Pyramid(nn.Module):
    """A timm backbone under a feature pyramid, as torchvision's detectors want it."""

    def __init__(self, name: str, channels: int, levels: int) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, pretrained=False)
        widths = self.body.feature_info.channels()  # type: ignore[operator, union-attr]
        self.levels = min(levels, len(widths))
        self.fpn = FeaturePyramidNetwork(widths[-self.levels :], channels)
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)[-self.levels :]
        return self.fpn({str(i): x for i, x in enumerate(maps)})


class Detector(nn.Module):
    """D-Net: a torchvision detector with one class, "lesion".

    Args:
        name: A detector of torchvision (``fasterrcnn_resnet50_fpn``, ``retinanet_resnet50_fpn``,
            ...), or a timm backbone, which gets a feature pyramid and the heads of Faster R-CNN.
        args: Arguments of torchvision's builder; for a timm backbone those of its ``FasterRCNN``
            and ``channels`` of the pyramid, ``levels`` in it, ``hidden`` units of the box head.
        image_size: Height and width of the canvas in pixels, a multiple of 32.
        nms: IoU above which the worse of two detections is dropped.

    Raises:
        InputError: The name is unknown, the arguments do not fit, or the size is no multiple of 32.
    """

    backbone: Any
    heads: Any

    def __init__(
        self, name: str, args: dict[str, Any] | None, image_size: int, nms: float = 0.7
    ) -> None:
        super().__init__()
        if image_size < 32 or image_size % 32:
            raise InputError(f"data.image_size {image_size}: not a multiple of 32")
        built = _build_detector(name, dict(args or {}), image_size)
        for part in (built, getattr(built, "roi_heads", None)):
            if part is not None and hasattr(part, "score_thresh"):
                # All candidates: selection and diagnosis have thresholds of their own.
                part.score_thresh, part.nms_thresh = 0.0, nms
                part.detections_per_img = CANDIDATES
        self.backbone = built.backbone
        self.channels = int(self.backbone.out_channels)
        built.backbone = _Given(self.channels)
        self.heads = built

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps by level of images (B, 3, S, S) in [0, 1]."""
        batch, _ = self.heads.transform(list(images))
        found = self.backbone(batch.tensors)
        return {"0": found} if isinstance(found, Tensor) else dict(found)

    def losses(self, features: dict[str, Tensor], images: Tensor, boxes: Tensor) -> Tensor:
        """The detector's own losses, each with weight 1, on the images that have a box.

        Args:
            features: Of all images.
            images: (B, 3, S, S).
            boxes: (B, 4); not a number where an image has none. Such an image takes no part: it is
                not "no lesion" either.

        Returns:
            Their sum; a zero that carries no gradient when no image has a box.
        """
        chosen = boxes.isfinite().all(1)
        if not chosen.any():
            return images.new_zeros(())
        targets = [
            {"boxes": box[None], "labels": torch.ones(1, dtype=torch.long, device=box.device)}
            for box in boxes[chosen]
        ]
        training = self.heads.training
        self.heads.train()
        terms = self._run({k: v[chosen] for k, v in features.items()}, images[chosen], targets)
        self.heads.train(training)
        return torch.stack(list(terms.values())).sum()

    @torch.no_grad()
    def detect(self, features: dict[str, Tensor], images: Tensor, size: Tensor) -> Detections:
        """Detections after non-maximum suppression, clipped to the images; no gradient.

        Args:
            features: Of the images.
            images: (B, 3, S, S).
            size: (B, 2), height and width of each image on its canvas.
        """
        training = self.heads.training
        self.heads.eval()
        found = self._run(features, images, None)
        self.heads.train(training)
        boxes = nn.utils.rnn.pad_sequence([f["boxes"] for f in found], batch_first=True)
        scores = nn.utils.rnn.pad_sequence([f["scores"] for f in found], True, -1.0)
        if boxes.shape[1] == 0:
            boxes, scores = (
                images.new_zeros(len(images), 1, 4),
                images.new_full((len(images), 1), -1.0),
            )
        limit = size.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)
        return Detections(torch.minimum(boxes.clamp(min=0), limit), scores)

    def torchvision_state(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Weights under torchvision's names as this module's, without what does not fit.

        Args:
            weights: ``state_dict`` of a torchvision detector or backbone.

        Returns:
            The fitting tensors, and the names left out: the predictor, which has other classes.

        Raises:
            InputError: Something other than the predictor is missing.
        """
        own = self.state_dict()
        renamed = {k if k.startswith("backbone.") else f"heads.{k}": v for k, v in weights.items()}
        fitting = {k: v for k, v in renamed.items() if k in own and own[k].shape == v.shape}
        left = [k for k in own if k not in fitting and not k.endswith("num_batches_tracked")]
        wrong = [k for k in left if not _predicts(k)]
        if wrong:
            raise InputError(f"no fitting weights for {wrong[0].removeprefix('heads.')}")
        return fitting, [k.removeprefix("heads.") for k in left]

    def _run(self, features: dict[str, Tensor], images: Tensor, targets: Any) -> Any:
        self.heads.backbone.features = features
        try:
            return self.heads(list(images), targets)
        finally:
            self.heads.backbone.features = {}


class Diagnosis(NamedTuple):
    """What the classifiers say about one box of each image.

    Attributes:
        logits: z_F (B, K); without fusion the C-Net's own.
        branches: z_A and z_B (B, K) each; empty without fusion.
        features: The branches' vectors (B, width) each; empty without fusion.
        fused: f_F (B, fused width), the teacher's features.
    """

    logits: Tensor
    branches: tuple[Tensor, ...] = ()
    features: tuple[Tensor, ...] = ()
    fused: Tensor | None = None


class Diagnoser(nn.Module):
    """The whole network: finds the lesion and says what it is.

    Branch A is RoIAlign 7 × 7 on the detector's pyramid and a two-layer head. Branch B is RoIAlign
    on the image (the crop is differentiable in the image, not in the box), C-Net, and a linear
    layer. The fused head reads both vectors.

    Args:
        detector: D-Net.
        classifier: C-Net's name in timm.
        num_classes: K.
        crop_size: Side of C-Net's input in pixels.
        context: Share of the box's size that is added on each side of a crop.
        fusion: False leaves D-Net and C-Net a plain pipeline.
        roi_hidden: Hidden units of branch A's head.
        width: Size of each branch's vector.
        fused_width: Size of the fused head's vector.
        threshold: Lowest score of a detection; below, the whole image is the box.

    Raises:
        InputError: timm has no such classifier.
    """

    classifier: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        detector: Detector,
        classifier: str,
        num_classes: int,
        crop_size: int,
        context: float = 0.1,
        fusion: bool = True,
        roi_hidden: int = 1024,
        width: int = 256,
        fused_width: int = 128,
        threshold: float = 0.05,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.classifier = build_classifier(classifier, num_classes)
        self.crop_size, self.context, self.threshold = crop_size, context, threshold
        self.fusion = fusion
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        if fusion:
            levels = [k for k in _levels(detector) if k != "pool"]
            self.pool = MultiScaleRoIAlign(levels, 7, 2)
            self.branch_a = TwoMLPHead(detector.channels * 49, roi_hidden)
            self.branch_a.fc7 = nn.Linear(roi_hidden, width)
            pooled = self.classifier.head_hidden_size
            self.branch_b = nn.Linear(int(pooled), width)
            self.out_a, self.out_b = nn.Linear(width, num_classes), nn.Linear(width, num_classes)
            self.fuse = nn.Sequential(
                nn.Linear(2 * width, 2 * width), nn.ReLU(),
                nn.Linear(2 * width, fused_width), nn.ReLU(),
            )  # fmt: skip
            self.out = nn.Linear(fused_width, num_classes)

    def forward(self, images: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find and diagnose.

        Args:
            images: (B, 3, S, S) in [0, 1].
            size: (B, 2), height and width of each image on its canvas; beyond is padding.

        Returns:
            The best box (B, 4), its score (B,), 0 where the whole image was taken, and the logits
            (B, K) of the diagnosis.
        """
        features = self.detector.features(images)
        found = self.detector.detect(features, images, size)
        box, score = found.top(size, self.threshold)
        return box, score, self.diagnose(features, images, size, box).logits

    def diagnose(
        self, features: dict[str, Tensor], images: Tensor, size: Tensor, boxes: Tensor
    ) -> Diagnosis:
        """Classify one box of each image.

        Args:
            features: The detector's, of the images.
            images: (B, 3, S, S) in [0, 1].
            size: (B, 2), height and width.
            boxes: (B, 4) in pixels of the canvas.
        """
        crops = self.crops(images, size, boxes)
        if not self.fusion:
            return Diagnosis(self.classifier(crops))
        side = images.shape[-1]
        levels = {k: v for k, v in features.items() if k != "pool"}
        regions = self.pool(levels, list(boxes[:, None]), [(side, side)] * len(images))
        a = self.branch_a(regions)
        maps = self.classifier.forward_features(crops)
        pooled = self.classifier.forward_head(maps, pre_logits=True)
        b = self.branch_b(pooled).relu()
        fused = self.fuse(torch.cat([a, b], 1))
        return Diagnosis(self.out(fused), (self.out_a(a), self.out_b(b)), (a, b), fused)

    def crops(
        self, images: Tensor, size: Tensor, boxes: Tensor, of: Tensor | None = None
    ) -> Tensor:
        """Cut boxes with their context out of the images, for C-Net.

        Args:
            images: (B, 3, S, S) in [0, 1].
            size: (B, 2), height and width of each image.
            boxes: (N, 4) in pixels of the canvas.
            of: (N,), the image each box lies in; default one box an image, in order.

        Returns:
            (N, 3, crop, crop), normalised.
        """
        if of is None:
            of = torch.arange(len(boxes), device=boxes.device)
        margin = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2) * self.context
        sign = boxes.new_tensor([-1.0, -1.0, 1.0, 1.0])
        limit = size[of].flip(1).repeat(1, 2).to(boxes.dtype)
        wide = torch.minimum((boxes + sign * margin).clamp(min=0), limit)
        rois = torch.cat([of[:, None].to(images.dtype), wide.to(images.dtype)], 1)
        found = roi_align(images, rois, self.crop_size, sampling_ratio=2, aligned=True)
        return (found - self.mean) / self.std


def build_classifier(name: str, num_classes: int) -> nn.Module:
    """C-Net from timm, without weights.

    Raises:
        InputError: timm has no such model.
    """
    try:
        return timm.create_model(name, num_classes=num_classes, pretrained=False)
    except RuntimeError:
        known = timm.list_models()
        raise InputError(
            f"model.classifier: timm has no model '{name}'{suggestion(name, known)}"
        ) from None


def _build_detector(name: str, args: dict[str, Any], image_size: int) -> nn.Module:
    size = {"min_size": image_size, "max_size": image_size}
    own: set[str] = set()
    try:
        if name in list_models(tv):
            built = get_model(
                name, weights=None, weights_backbone=None, num_classes=2, **size, **args
            )
        elif name in timm.list_models():
            built = _timm_faster_rcnn(name, size, **args)
            own = set(inspect.signature(_timm_faster_rcnn).parameters)
        else:
            known = [*list_models(tv), *timm.list_models()]
            raise InputError(f"model.detector: unknown detector '{name}'{suggestion(name, known)}")
    except TypeError as error:
        raise InputError(f"model.detector_args: {error}") from None
    # torchvision hands what it does not know to a part that ignores it
    taken = own | set(inspect.signature(type(built)).parameters) | {"trainable_backbone_layers"}
    if unknown := sorted(set(args) - taken):
        raise InputError(
            f"model.detector_args: {name} has no '{unknown[0]}'{suggestion(unknown[0], taken)}"
        )
    return built


def _timm_faster_rcnn(
    name: str,
    size: dict[str, int],
    channels: int = 256,
    levels: int = 4,
    hidden: int = 1024,
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512),
    **args: Any,
) -> nn.Module:
    backbone = _Pyramid(name, channels, levels)
    names = [str(i) for i in range(backbone.levels)]
    each = tuple(tuple(anchors) for _ in names)
    return tv.FasterRCNN(
        backbone,
        rpn_anchor_generator=tv.rpn.AnchorGenerator(each, ((0.5, 1.0, 2.0),) * len(names)),
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        box_head=TwoMLPHead(channels * 49, hidden),
        box_predictor=FastRCNNPredictor(hidden, 2),
        **size,
        **args,
    )


@torch.no_grad()
def _levels(detector: Detector) -> list[str]:
    """Names of the levels that the backbone gives, by a dry run."""
    training = detector.backbone.training
    names = list(detector.backbone.eval()(torch.zeros(1, 3, 64, 64)))
    detector.backbone.train(training)
    return names


def _predicts(name: str) -> bool:
    """Whether a tensor belongs to the part of a detector that depends on the classes."""
    return "box_predictor" in name or "classification_head.cls_logits" in name
