"""Confusion matrix and intersection over union."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def confusion(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Counts (C, C), rows the truth, columns the prediction.

    Args:
        prediction: Class of each point (N,).
        target: True class of each point (N,).
        num_classes: C.
    """
    pairs = target.long() * num_classes + prediction.long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def intersection_over_union(
    matrix: Tensor, *, ignore: int = 0, names: Sequence[str] | None = None
) -> dict[str, float]:
    """Metrics of a confusion matrix; what has no label does not count.

    Args:
        matrix: (C, C) of `confusion`.
        ignore: The class that counts as no label.
        names: Names of all classes; an ``iou_<name>`` for each present class is added.

    Returns:
        ``miou``, where a class absent from truth and prediction counts as 1, as in the official
        code; ``miou_present``, the mean over the classes present in the truth; ``micro_iou``.

    Example:
        >>> matrix = torch.tensor([[0, 0, 0], [0, 3, 1], [0, 0, 0]])
        >>> {name: round(value, 3) for name, value in intersection_over_union(matrix).items()}
        {'miou': 0.375, 'miou_present': 0.75, 'micro_iou': 0.6}
    """
    counts = matrix.double().clone()
    counts[ignore] = 0
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    iou = torch.where(union > 0, hits / union.clamp(min=1), 1.0)
    keep = torch.arange(len(counts)) != ignore
    present = keep & (counts.sum(1) > 0)
    total, right = float(counts.sum()), float(hits.sum())
    found = {
        "miou": float(iou[keep].mean()),
        "miou_present": float(iou[present].mean()) if bool(present.any()) else 0.0,
        "micro_iou": right / (2 * total - right) if total else 0.0,
    }
    for name, there, value in zip(names or (), present.tolist(), iou.tolist(), strict=False):
        if there:
            found[f"iou_{name}"] = value
    return found
