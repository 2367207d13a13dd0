"""How well lesions are found and told apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.functional import classification as tm

from cohobate.medseg.tsddnet.network import Detections
from cohobate.medseg.tsddnet.selection import iou


def average_precision(detections: Detections, truth: Tensor) -> dict[str, float]:
    """AP at IoU 0.5 and averaged over IoU 0.5 : 0.95, by all-point interpolation.

    Args:
        detections: Of M images.
        truth: True boxes (M, 4), one an image.

    Returns:
        ``ap50`` and ``ap``.

    Example:
        >>> boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30]]])
        >>> average_precision(Detections(boxes, torch.tensor([[0.3, 0.9]])), boxes[:, 0])["ap50"]
        0.5
    """
    count = len(truth)
    # The recall of n true boxes takes the values k/n. The area under the interpolated curve is the
    # mean of its heights between them: with these thresholds COCO's sum is that area.
    between = [(k + 0.5) / count for k in range(count)]
    metric = MeanAveragePrecision(rec_thresholds=between, backend="faster_coco_eval")
    real = detections.scores >= 0
    metric.update(
        [
            {"boxes": b[r], "scores": s[r], "labels": torch.ones(int(r.sum()), dtype=torch.long)}
            for b, s, r in zip(detections.boxes, detections.scores, real, strict=True)
        ],
        [{"boxes": t[None], "labels": torch.ones(1, dtype=torch.long)} for t in truth],
    )
    found = metric.compute()
    return {"ap50": float(found["map_50"]), "ap": float(found["map"])}


def localisation(boxes: Tensor, truth: Tensor) -> dict[str, float]:
    """Mean IoU of the best detection with the true box, and the share with IoU ≥ 0.5 (CorLoc).

    Args:
        boxes: The best detection of each image (M, 4).
        truth: True boxes (M, 4).

    Returns:
        ``miou`` and ``corloc``.

    Example:
        >>> localisation(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 20]]))
        {'miou': 0.5, 'corloc': 1.0}
    """
    overlap = iou(boxes, truth)
    return {"miou": float(overlap.mean()), "corloc": float((overlap >= 0.5).float().mean())}


def diagnosis(probability: Tensor, label: Tensor) -> dict[str, float]:
    """Accuracy, sensitivity, specificity, precision, F1 at 0.5, and the area under the ROC curve.

    Args:
        probability: Of the positive class (M,).
        label: 1 is positive (malignant), 0 negative (M,).

    Returns:
        By name; without the AUC when one class is missing.

    Example:
        >>> diagnosis(torch.tensor([0.9, 0.2, 0.6]), torch.tensor([1, 0, 0]))["specificity"]
        0.5
    """
    found = {
        "accuracy": tm.binary_accuracy(probability, label),
        "sensitivity": tm.binary_recall(probability, label),
        "specificity": tm.binary_specificity(probability, label),
        "precision": tm.binary_precision(probability, label),
        "f1": tm.binary_f1_score(probability, label),
    }
    if len(label.unique()) == 2:
        found["auc"] = tm.binary_auroc(probability, label)
    return {name: float(value) for name, value in found.items()}


class Scores:
    """Collects what the network says of each image and sums it up."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, ...]] = []

    def add(
        self, detections: Detections, box: Tensor, probability: Tensor, truth: Tensor, label: Tensor
    ) -> None:
        """Take a batch.

        Args:
            detections: All of them.
            box: The one that was taken (B, 4).
            probability: Of each class (B, K).
            truth: True boxes (B, 4), not a number for none.
            label: Classes (B,).
        """
        padded = torch.nn.functional.pad
        missing = 100 - detections.scores.shape[1]
        boxes = padded(detections.boxes, (0, 0, 0, missing))
        scores = padded(detections.scores, (0, missing), value=-1.0)
        row = (boxes, scores, box, probability[:, 1], truth, label)
        self._rows.append(tuple(t.detach().float().cpu() for t in row))

    def summary(self, *, precision: bool = True) -> dict[str, float]:
        """All metrics by name; those of detection over the images that have a true box.

        Args:
            precision: Whether to work out the average precisions, which takes time.
        """
        boxes, scores, box, probability, truth, label = map(
            torch.cat, zip(*self._rows, strict=True)
        )
        known = truth.isfinite().all(1)
        found = diagnosis(probability, label.long())
        if known.any():
            found |= localisation(box[known], truth[known])
            if precision:
                found |= average_precision(Detections(boxes[known], scores[known]), truth[known])
        return found
