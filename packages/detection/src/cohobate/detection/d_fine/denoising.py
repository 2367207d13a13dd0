"""Denoising queries: noised objects that are reconstructed beside the matching queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cohobate.detection.boxes import Targets, to_cxcywh, to_xyxy


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of probabilities that are kept off 0 and 1 by ``eps``."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


class Queries(NamedTuple):
    """Denoising queries of a batch.

    Attributes:
        labels: ``(B, D)`` noised class indices; C in padded slots.
        boxes: ``(B, D, 4)`` noised boxes before the sigmoid.
        blocked: ``(D + Q, D + Q)`` bool: which query (row) must not see which (column).
        match: ``(B, D)`` the object each query reconstructs, -1 for negatives and padding.
        groups: Number of groups.
    """

    labels: Tensor
    boxes: Tensor
    blocked: Tensor
    match: Tensor
    groups: int


class Draws(NamedTuple):
    """The random numbers of a batch, in the order they are drawn.

    Attributes:
        flip: ``(B, D)`` in [0, 1): below half the label noise the label is replaced.
        labels: ``(B, D)`` the labels to replace by.
        sign: ``(B, D, 4)``, 0 or 1.
        part: ``(B, D, 4)`` in [0, 1).
    """

    flip: Tensor
    labels: Tensor
    sign: Tensor
    part: Tensor


@dataclass(frozen=True)
class Denoising:
    """Contrastive denoising of DINO as D-FINE uses it.

    Args:
        budget: Queries to spend, over two for a group of positives and negatives; 0 turns it off.
        label_noise: Twice the share of labels that are replaced by a random one.
        box_noise: Size of the noise of each edge, in half box sides.

    References:
        Zhang et al. DINO. ICLR 2023, arXiv 2203.03605, section 3.3.
    """

    budget: int = 100
    label_noise: float = 0.5
    box_noise: float = 1.0

    def shape(self, targets: Targets) -> tuple[int, int]:
        """Groups and slots (two for each object of the fullest image) of a group."""
        fullest = max(targets.counts, default=0)
        return max(1, self.budget // max(fullest, 1)), 2 * fullest

    def draw(self, targets: Targets, num_classes: int) -> Draws:
        """Random numbers from torch's generator, in the order of the official code."""
        groups, slots = self.shape(targets)
        size = (len(targets.counts), groups * slots)
        device = targets.boxes.device
        return Draws(
            torch.rand(size, device=device),
            torch.randint(0, num_classes, size, device=device),
            torch.randint(0, 2, (*size, 4), device=device),
            torch.rand((*size, 4), device=device),
        )

    def __call__(
        self, targets: Targets, num_classes: int, num_queries: int, draws: Draws | None = None
    ) -> Queries | None:
        """Noise the objects of a batch.

        Each group has a positive slot for every object of the fullest image, noised by less than
        half a side, then a negative one each, noised by more.

        Args:
            targets: The batch's objects.
            num_classes: C.
            num_queries: Q, the matching queries that follow.
            draws: Random numbers; drawn when not given.

        Returns:
            The queries; None when there is no object in the batch or no budget.
        """
        if self.budget < 1 or targets.total == 0:
            return None
        groups, slots = self.shape(targets)
        draws = self.draw(targets, num_classes) if draws is None else draws
        fullest = slots // 2
        place = torch.arange(groups * slots, device=targets.boxes.device)
        target, negative = place % fullest, place % slots >= fullest
        real = targets.valid[:, target]
        labels = targets.labels[:, target]
        labels = labels.where(draws.flip >= self.label_noise * 0.5, draws.labels.long())
        labels = labels.where(real, num_classes)
        boxes = targets.boxes[:, target] * real[..., None]
        part = (draws.part + negative[:, None]) * (draws.sign * 2.0 - 1.0)
        noise = part * (boxes[..., 2:] * 0.5 * self.box_noise).tile(2)
        corners = (to_xyxy(boxes) + noise).clamp(0, 1)
        # two edges may have passed each other: the side is taken without its sign
        placed = inverse_sigmoid(to_cxcywh(corners).abs())
        match = target.where(~negative, -1).where(real, -1)
        group = torch.cat([place // slots, place.new_full((num_queries,), -1)])
        blocked = (group >= 0) & (group != group[:, None])
        return Queries(labels, placed, blocked, match, groups)
