"""Candidate selection: of several boxes the one on which C-Net believes the label most.

All of it is array arithmetic on padded candidates, so it does not depend on their order or on how
images were batched.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cohobate.core.errors import InputError

Scope = Literal["all", "full", "partial", "none"]


class Decision(StrEnum):
    """What became of an image's box."""

    KEPT = "kept"  # the drawn box stays
    REPLACED = "replaced"  # a detection took the drawn box's place
    ACCEPTED = "accepted"  # an image without a box got one
    REJECTED = "rejected"  # there were candidates, none good enough
    NOTHING = "nothing found"  # no candidate


@dataclass(frozen=True)
class Selection:
    """How boxes are chosen.

    Attributes:
        scope: Whose boxes: of all images, only the fully annotated (``full``), only those without
            a box (``partial``), or ``none``.
        tau_iou: Smallest IoU of a candidate with the drawn box.
        tau_det: Smallest detector score of a candidate where no box was drawn.
        tau_cls: Smallest probability of the label at which a new box is accepted.
        delta: What a candidate's probability must exceed the drawn box's by.
        candidates: Most candidates an image, by detector score.
        nms: IoU of the non-maximum suppression before.

    Raises:
        InputError: A number is out of range.
    """

    scope: Scope = "all"
    tau_iou: float = 0.5
    tau_det: float = 0.05
    tau_cls: float = 0.5
    delta: float = 0.0
    candidates: int = 20
    nms: float = 0.7

    def __post_init__(self) -> None:
        for name in ("tau_iou", "tau_det", "tau_cls", "delta", "nms"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"model.selection.{name} {getattr(self, name)}: not in 0 to 1")
        if self.candidates < 1:
            raise InputError(f"model.selection.candidates {self.candidates}: must be at least 1")


class Choice(NamedTuple):
    """The outcome for a batch of images.

    Attributes:
        boxes: (B, 4), the boxes from now on; not a number where there is none.
        decisions: B of them.
        old: (B,), the label's probability on the drawn box; not a number without one.
        new: (B,), the same on the best candidate; not a number without candidates.
    """

    boxes: Tensor
    decisions: list[Decision]
    old: Tensor
    new: Tensor


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes, pair by pair.

    Args:
        one: (..., 4), x1 y1 x2 y2.
        other: (..., 4) of a shape that broadcasts.

    Returns:
        (...); not a number where a box is.

    Example:
        >>> a, b = torch.tensor([10.0, 10, 50, 50]), torch.tensor([12.0, 12, 52, 52])
        >>> round(iou(a, b).item(), 3)
        0.822
    """
    low, high = (
        torch.maximum(one[..., :2], other[..., :2]),
        torch.minimum(one[..., 2:], other[..., 2:]),
    )
    common = (high - low).clamp(min=0).prod(-1)
    areas = (one[..., 2:] - one[..., :2]).prod(-1) + (other[..., 2:] - other[..., :2]).prod(-1)
    return common / (areas - common)


def eligible(boxes: Tensor, scores: Tensor, drawn: Tensor, rule: Selection) -> Tensor:
    """Which detections are candidates.

    Args:
        boxes: (B, N, 4).
        scores: (B, N), -1 for padding.
        drawn: (B, 4), not a number where no box was drawn.
        rule: Thresholds.

    Returns:
        (B, N), at most ``rule.candidates`` true in a row.
    """
    sound = boxes.isfinite().all(-1) & (boxes[..., 2:] > boxes[..., :2]).all(-1) & (scores >= 0)
    has_box = drawn.isfinite().all(-1)
    close = iou(boxes, drawn[:, None]) >= rule.tau_iou  # False where no box was drawn
    allowed = torch.where(has_box[:, None], close, scores >= rule.tau_det) & sound
    # Rank by score among the allowed; boxes of equal score by place, so that order never matters.
    order = _order([boxes[..., i] for i in (3, 2, 1, 0)] + [scores], allowed)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return allowed & (rank < rule.candidates)


def choose(
    boxes: Tensor,
    scores: Tensor,
    probabilities: Tensor,
    candidates: Tensor,
    drawn: Tensor,
    drawn_probability: Tensor,
    rule: Selection,
) -> Choice:
    """Choose each image's box: b* = argmax over the candidates of p_C(y | crop(x, b)).

    A drawn box gives way to b* when p(b*) > p(drawn) + δ. An image without a box gets b* when
    p(b*) ≥ τ_cls and stays without one otherwise. Equal probabilities: the higher detector score.

    Args:
        boxes: Detections (B, N, 4).
        scores: (B, N).
        probabilities: (B, N), C-Net's probability of the image's own class on each.
        candidates: (B, N), from `eligible`.
        drawn: (B, 4), not a number where no box was drawn.
        drawn_probability: (B,).
        rule: Thresholds and scope.

    References:
        Wang et al., arXiv:2306.06982: candidate selection by the class label; the criterion is a
        reconstruction.

    Example:
        >>> d = torch.tensor([[[12.0, 12, 52, 52], [10, 10, 30, 30], [8, 8, 48, 52]]])
        >>> p, s = torch.tensor([[0.80, 0.99, 0.75]]), torch.tensor([[0.9, 0.3, 0.02]])
        >>> drawn, rule = torch.tensor([[10.0, 10, 50, 50]]), Selection()
        >>> found = choose(d, s, p, eligible(d, s, drawn, rule), drawn, torch.tensor([0.78]), rule)
        >>> found.boxes.tolist(), str(found.decisions[0])
        ([[12.0, 12.0, 52.0, 52.0]], 'replaced')
    """
    has_box = drawn.isfinite().all(-1)
    keys = [boxes[..., i] for i in (3, 2, 1, 0)] + [scores, probabilities]
    best = _order(keys, candidates)[:, :1]
    found = candidates.any(1)
    box = boxes.gather(1, best[..., None].expand(-1, 1, 4))[:, 0]
    new = torch.where(found, probabilities.gather(1, best)[:, 0], float("nan"))
    old = torch.where(has_box, drawn_probability, float("nan"))
    better = torch.where(has_box, new > old + rule.delta, new >= rule.tau_cls)
    in_scope = torch.where(has_box, rule.scope in ("all", "full"), rule.scope in ("all", "partial"))
    taken = found & better & in_scope
    decisions = [
        _decision(*flags)
        for flags in zip(has_box.tolist(), taken.tolist(), found.tolist(), strict=True)
    ]
    return Choice(torch.where(taken[:, None], box, drawn), decisions, old, new)


def _decision(has_box: bool, taken: bool, found: bool) -> Decision:
    if has_box:
        return Decision.REPLACED if taken else Decision.KEPT
    if taken:
        return Decision.ACCEPTED
    return Decision.REJECTED if found else Decision.NOTHING


def _order(keys: list[Tensor], allowed: Tensor) -> Tensor:
    """Places (B, N) sorted by the last key, ties by the one before it, highest first.

    What is not allowed comes last.
    """
    order = torch.arange(allowed.shape[1], device=allowed.device).expand(allowed.shape)
    for key in [*keys, allowed.to(torch.float32)]:
        ranked = key.gather(1, order).argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, ranked)
    return order
