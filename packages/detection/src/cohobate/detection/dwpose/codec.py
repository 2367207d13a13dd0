"""SimCC: key points as two classifications, over the columns and the rows of an image.

References:
    Li et al., SimCC, ECCV 2022, arXiv 2107.03332.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cohobate.detection.dwpose.losses import SimCC

SPLIT = 2  # bins a pixel


def sigmas(size: Sequence[int]) -> tuple[float, float]:
    """Widths of the label's bell in bins for an input size, √(pixels / 8) as in the released ones.

    Args:
        size: Width and height of the input in pixels.

    Example:
        >>> sigmas((192, 256)), sigmas((288, 384))
        ((4.9, 5.66), (6.0, 6.93))
    """
    x, y = (round((pixels / 8) ** 0.5, 2) for pixels in size)
    return x, y


def encode(
    keypoints: Tensor, visible: Tensor, size: Sequence[int], sigma: Sequence[float] | None = None
) -> tuple[SimCC, Tensor]:
    """Labels of key points.

    A bell ``exp(-(i - mu)² / (2 sigma²))``, not normalised, around ``mu = round(2 x)`` (half to
    even). A point that is not visible, or whose bell (three sigma) lies outside the input, has an
    empty label and weight 0.

    Args:
        keypoints: ``(B, K, 2)`` x and y in pixels of the input.
        visible: ``(B, K)``, 0 for a point without a label.
        size: Width and height of the input.
        sigma: Widths of the bell in bins, for x and y; by default `sigmas`.

    Returns:
        Labels ``(B, K, 2 · width)`` and ``(B, K, 2 · height)``, and weights ``(B, K)``.

    Example:
        >>> labels, weight = encode(torch.tensor([[[1.0, 0.5]]]), torch.ones(1, 1), (4, 4), (1, 1))
        >>> labels.x.argmax().item(), labels.y.argmax().item(), weight.item()
        (2, 1, 1.0)
    """
    widths = torch.tensor(sigmas(size) if sigma is None else sigma).to(keypoints)
    bins = torch.tensor(size).to(keypoints) * SPLIT
    # a point that is not a number, or far out, is outside like any other
    centre = (keypoints * SPLIT).round().nan_to_num(-1e6).clamp(-1e6, 1e6)
    inside = (centre - 3 * widths < bins) & (centre + 3 * widths + 1 >= 0)
    weight = visible * inside.all(-1)
    shown = (weight > 0.5)[..., None]
    rows = []
    for axis in (0, 1):
        places = torch.arange(int(bins[axis]), device=keypoints.device, dtype=keypoints.dtype)
        distance = places - centre[..., axis, None]
        bell = torch.exp(-(distance**2) / (2 * widths[axis] ** 2))
        rows.append(bell.where(shown, 0.0))
    return SimCC(*rows), weight


def decode(logits: SimCC) -> tuple[Tensor, Tensor]:
    """Key points of logits.

    Args:
        logits: Of a network.

    Returns:
        ``(B, K, 2)`` in pixels of the input, (-0.5, -0.5) where the score is not positive, and the
        scores ``(B, K)``: the smaller of the two largest logits.

    Example:
        >>> decode(SimCC(torch.tensor([[[0.0, 0.0, 0.7]]]), torch.tensor([[[0.0, 0.9, 0.0]]])))
        (tensor([[[1.0000, 0.5000]]]), tensor([[0.7000]]))
    """
    (score_x, x), (score_y, y) = (axis.max(-1) for axis in logits)
    score = torch.minimum(score_x, score_y)
    place = torch.stack([x, y], -1).to(score).where(score[..., None] > 0, -1.0)
    return place / SPLIT, score


def flip_back(logits: SimCC, flip: Sequence[int]) -> SimCC:
    """What the logits of a mirrored image say about the image.

    Args:
        logits: Of the mirrored image.
        flip: For each key point the one that it becomes in a mirror.
    """
    order = list(flip)
    return SimCC(logits.x[:, order].flip(-1), logits.y[:, order])
