"""Boxes: two forms, overlaps, and the padded targets of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-16


def to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size ``(..., 4)`` (cx, cy, w, h) → corners (x1, y1, x2, y2).

    Example:
        >>> to_xyxy(torch.tensor([0.5, 0.5, 0.2, 0.4]))
        tensor([0.4000, 0.3000, 0.6000, 0.7000])
    """
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners ``(..., 4)`` (x1, y1, x2, y2) → centre and size (cx, cy, w, h).

    Example:
        >>> to_cxcywh(torch.tensor([0.4, 0.3, 0.6, 0.7]))
        tensor([0.5000, 0.5000, 0.2000, 0.4000])
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes one by one; the shapes broadcast.

    A box whose side is negative has no area: nothing is asserted, both stay finite.

    Args:
        boxes: Corners ``(..., 4)``.
        others: Corners ``(..., 4)``.

    Returns:
        IoU in [0, 1] and GIoU in [-1, 1], of the broadcast shape without the last axis.

    References:
        Rezatofighi et al. Generalized intersection over union. CVPR 2019, arXiv 1902.09630.

    Example:
        >>> a, b = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 3.0, 2.0])
        >>> [round(x.item(), 4) for x in overlap(a, b)]
        [0.3333, 0.3333]
    """
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    union = _area(boxes) + _area(others) - intersection
    iou = intersection / union.clamp(min=_TINY)
    low = torch.minimum(boxes[..., :2], others[..., :2])
    high = torch.maximum(boxes[..., 2:], others[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    return iou, iou - (hull - union) / hull.clamp(min=_TINY)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


@dataclass(frozen=True)
class Targets:
    """The objects of a batch, padded to the fullest image.

    Attributes:
        labels: ``(B, G)`` int64 class indices; padding is 0. G is at least 1.
        boxes: ``(B, G, 4)`` normalised cxcywh; padding is an empty box.
        counts: Objects of each image.
    """

    labels: Tensor
    boxes: Tensor
    counts: tuple[int, ...]

    @property
    def valid(self) -> Tensor:
        """``(B, G)``: which slots hold an object."""
        slots = torch.arange(self.labels.shape[1], device=self.labels.device)
        return slots < torch.tensor(self.counts, device=self.labels.device)[:, None]

    @property
    def total(self) -> int:
        """Objects of the batch."""
        return sum(self.counts)

    def to(self, device: torch.device | str) -> Targets:
        """The same on another device."""
        return Targets(self.labels.to(device), self.boxes.to(device), self.counts)


def pad_targets(labels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Targets:
    """Join the objects of several images.

    Args:
        labels: Class indices ``(n,)`` of each image.
        boxes: Normalised cxcywh ``(n, 4)`` of each image.

    Example:
        >>> pad_targets([torch.tensor([2]), torch.tensor([], dtype=torch.long)],
        ...             [torch.rand(1, 4), torch.rand(0, 4)]).counts
        (1, 0)
    """
    pad = torch.nn.utils.rnn.pad_sequence
    joined, placed = pad(list(labels), batch_first=True), pad(list(boxes), batch_first=True)
    if joined.shape[1] == 0:  # no object in the whole batch: one empty slot keeps shapes simple
        joined, placed = joined.new_zeros(len(labels), 1), placed.new_zeros(len(labels), 1, 4)
    return Targets(joined.long(), placed, tuple(len(x) for x in labels))
