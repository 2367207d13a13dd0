"""COCO's average precision by faster-coco-eval, and the mean overlap of matched boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cohobate.detection.boxes import overlap
from cohobate.detection.data.annotations import Category, Picture

_NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


class CocoScores:
    """Box AP (0.50:0.95), AP50, AP75 and AP by size, as COCO defines them, collected by images.

    Beside it ``iou``, the mean IoU over all objects with the detection of their class that a
    one-to-one match of most overlap gives them (0 for an object without one): how exact the boxes
    are.

    Args:
        categories: All classes.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        self._categories = list(categories)
        self._images: list[dict[str, Any]] = []
        self._truth: list[dict[str, Any]] = []
        self._found: list[np.ndarray] = []
        self._overlaps: list[np.ndarray] = []

    def add(self, picture: Picture, labels: Tensor, boxes: Tensor, scores: Tensor) -> None:
        """Take one image's detections.

        Args:
            picture: The image with its objects.
            labels: Class indices ``(K,)``.
            boxes: ``(K, 4)`` xyxy in its pixels.
            scores: ``(K,)``.
        """
        number = len(self._images) + 1
        self._images.append({"id": number, "width": picture.width, "height": picture.height})
        for crowd, true, kinds in (
            (0, picture.boxes, picture.labels),
            (1, picture.crowd, picture.crowd_labels),
        ):
            for box, label in zip(true.tolist(), kinds.tolist(), strict=True):
                size = [box[2] - box[0], box[3] - box[1]]
                self._truth.append({
                    "id": len(self._truth) + 1, "image_id": number, "category_id": label + 1,
                    "bbox": [*box[:2], *size], "area": size[0] * size[1], "iscrowd": crowd,
                })  # fmt: skip
        labels, boxes, scores = labels.cpu(), boxes.float().cpu(), scores.float().cpu()
        self._overlaps.append(_overlaps(picture, labels, boxes))
        rows = torch.cat([
            torch.full((len(labels), 1), float(number)), boxes[:, :2], boxes[:, 2:] - boxes[:, :2],
            scores[:, None], labels[:, None] + 1.0,
        ], 1)  # fmt: skip
        self._found.append(rows.double().numpy())

    def summary(self) -> dict[str, float]:
        """All scores; one that has no object to be computed from is NaN."""
        truth = COCO(
            {
                "images": self._images,
                "annotations": self._truth,
                "categories": [
                    {"id": n, "name": c.name} for n, c in enumerate(self._categories, 1)
                ],
            }
        )
        overlaps = np.concatenate(self._overlaps) if self._overlaps else np.zeros(0)
        mean = {"iou": float(overlaps.mean()) if len(overlaps) else float("nan")}
        rows = np.concatenate(self._found)
        if not len(rows) or not self._truth:
            return dict.fromkeys(_NAMES, 0.0 if self._truth else float("nan")) | mean
        evaluation = COCOeval_faster(truth, truth.loadRes(rows), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        values = [float(v) for v in evaluation.stats[:6]]
        named = zip(_NAMES, values, strict=True)
        return {n: v if v >= 0 else float("nan") for n, v in named} | mean


def _overlaps(picture: Picture, labels: Tensor, boxes: Tensor) -> np.ndarray:
    """IoU of each object with the detection that a match by overlap within its class gives it."""
    true = torch.from_numpy(picture.boxes)
    if not len(true):
        return np.zeros(0)
    same = torch.from_numpy(picture.labels)[:, None] == labels[None]
    iou = overlap(true[:, None], boxes[None])[0].where(same, 0.0).numpy()
    found = np.zeros(len(true))
    rows, columns = linear_sum_assignment(iou, maximize=True)
    found[rows] = iou[rows, columns]
    return found
