"""Which query answers for which object: Hungarian matching and the union over all layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cohobate.detection.boxes import Targets, overlap, to_xyxy


@dataclass(frozen=True)
class MatchCost:
    """The cost of a pair: focal class cost, L1 and generalised IoU.

    Args:
        label: Weight of the class cost.
        l1: Weight of the L1 distance of normalised cxcywh.
        giou: Weight of -GIoU.
        alpha: Balance of the focal class cost.
        gamma: Focus of the focal class cost.
    """

    label: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """Costs of all pairs within each image.

        Args:
            logits: ``(O, B, Q, C)`` of O outputs.
            boxes: ``(O, B, Q, 4)`` cxcywh.
            targets: The batch's objects.

        Returns:
            ``(O, B, Q, G)``; NaN is replaced by 1.
        """
        labels = targets.labels[None, :, None].expand(*logits.shape[:3], -1)
        p = logits.gather(-1, labels).sigmoid()
        negative = (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()
        positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
        found, true = boxes[:, :, :, None], targets.boxes[None, :, None]
        distance = (found - true).abs().sum(-1)
        giou = overlap(to_xyxy(found), to_xyxy(true))[1]
        cost = self.l1 * distance + self.label * (positive - negative) - self.giou * giou
        return cost.nan_to_num(nan=1.0)


def hungarian(cost: Tensor, targets: Targets) -> Tensor:
    """One query for each object at the least total cost, in every output and image.

    All costs go to the CPU in one copy.

    Args:
        cost: ``(O, B, Q, G)``.
        targets: The batch's objects.

    Returns:
        ``(O, B, Q)`` int64: the object of each query, -1 for none.
    """
    outputs, images, queries, _ = cost.shape
    match = np.full((outputs, images, queries), -1, np.int64)
    array = cost.cpu().numpy()
    for image, count in enumerate(targets.counts):
        if count:
            for output in range(outputs):
                query, target = linear_sum_assignment(array[output, image, :, :count])
                match[output, image, query] = target
    return torch.from_numpy(match).to(cost.device)


def union(match: Tensor, num_targets: int) -> Tensor:
    """GO-LSD's matching union: each query takes the object that most outputs gave it.

    An object may keep several queries; of two objects given equally often the lower one is taken.

    Args:
        match: ``(O, B, Q)`` from `hungarian`.
        num_targets: G, the largest number of objects in an image.

    Returns:
        ``(B, Q)`` int64: the object of each query, -1 for none.

    Example:
        >>> union(torch.tensor([[[0, 1]], [[1, -1]], [[1, 0]]]), 2)
        tensor([[1, 0]])
    """
    votes = match.new_zeros(*match.shape[1:], num_targets + 1)
    votes.scatter_add_(-1, (match + 1).movedim(0, -1), torch.ones_like(match).movedim(0, -1))
    votes = votes[..., 1:]
    order = torch.arange(num_targets, 0, -1, device=match.device)
    most = (votes * (num_targets + 1) + order).argmax(-1)
    return most.where(votes.sum(-1) > 0, -1)
