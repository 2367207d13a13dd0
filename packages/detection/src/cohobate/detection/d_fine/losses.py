"""The equations of D-FINE as pure functions: usable in any detector with learnt queries.

Symbols: N intervals and N + 1 bins of an edge's distribution, W(n) the weighting function, a its
upper bound (``up``), s its scale (``reg_scale``), T the temperature. Edges are in the order left,
top, right, bottom; an offset is positive outwards.

References:
    Peng et al. D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement.
    ICLR 2025, arXiv 2410.13842, sections 4.1 (FDR, FGL) and 4.2 (GO-LSD, DDF).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cohobate.core.errors import InputError
from cohobate.core.losses import forward_kl


def weighting(num_bins: int, up: float | Tensor = 0.5, reg_scale: float | Tensor = 4.0) -> Tensor:
    """W(n), the offset that each bin stands for: fine around 0, coarse at the ends (equation 4).

    Args:
        num_bins: N, even and at least 4.
        up: a; the inner bins reach ±a of a box side. Its absolute value is taken.
        reg_scale: s; the paper's curvature c is 1/s. Its absolute value is taken.

    Returns:
        ``(N + 1,)``, in units of "box side / s".

    Raises:
        InputError: N is odd or too small.

    Differences:
        The paper gives W in box sides: divide by s.

    Example:
        >>> [round(w, 3) for w in weighting(8).tolist()]
        [-4.0, -2.0, -1.08, -0.442, 0.0, 0.442, 1.08, 2.0, 4.0]
    """
    if num_bins < 4 or num_bins % 2:
        raise InputError(f"number of bins: needs an even number of at least 4, got {num_bins}")
    a, s = (torch.as_tensor(x).detach().abs().reshape(()) for x in (up, reg_scale))
    a = a if a.is_floating_point() else a.float()
    bound = a * s
    power = torch.arange(1, num_bins // 2, device=bound.device, dtype=bound.dtype)
    inner = ((bound + 1) ** (2 / (num_bins - 2))) ** power - 1
    zero = bound.new_zeros(1)
    return torch.cat([-2 * bound[None], -inner.flip(0), zero, inner, 2 * bound[None]])


def expected_offsets(edges: Tensor, weights: Tensor) -> Tensor:
    """The offsets that the edges' distributions stand for: Σ_n softmax(z)(n) W(n) (equation 2).

    Args:
        edges: Logits z ``(..., 4, N + 1)``.
        weights: W ``(N + 1,)``.

    Returns:
        ``(..., 4)``, in units of "box side / s".
    """
    return edges.softmax(-1) @ weights.to(edges.dtype)


def decode(reference: Tensor, offsets: Tensor, reg_scale: float | Tensor = 4.0) -> Tensor:
    """Move the edges of the initial boxes by the offsets (equation 1).

    Args:
        reference: b⁰ ``(..., 4)`` cxcywh.
        offsets: ``(..., 4)`` left, top, right, bottom, in units of "box side / s".
        reg_scale: s.

    Returns:
        ``(..., 4)`` cxcywh; a side is negative when two edges have passed each other.

    Example:
        >>> decode(torch.tensor([0.5, 0.5, 0.2, 0.2]), torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([0.4750, 0.5000, 0.2500, 0.2000])
    """
    s = _magnitude(reg_scale)
    centre, unit = reference[..., :2], reference[..., 2:] / s
    low = centre - (0.5 * s + offsets[..., :2]) * unit
    high = centre + (0.5 * s + offsets[..., 2:]) * unit
    return torch.cat([(low + high) / 2, high - low], -1)


def _magnitude(scale: float | Tensor) -> float | Tensor:
    return scale.abs() if isinstance(scale, Tensor) else abs(scale)


@dataclass(frozen=True)
class BinTargets:
    """Where the true edges lie among the bins.

    Attributes:
        index: Left bin n ``(..., 4)``, int64 in [0, N - 1].
        left: Weight of bin n.
        right: Weight of bin n + 1.
    """

    index: Tensor
    left: Tensor
    right: Tensor


@torch.no_grad()
def bin_targets(
    reference: Tensor, boxes: Tensor, weights: Tensor, reg_scale: float | Tensor = 4.0
) -> BinTargets:
    """The two bins around each true edge and their weights (equation 6).

    Args:
        reference: b⁰ of the matched queries ``(..., 4)`` cxcywh.
        boxes: Their ground truth ``(..., 4)`` xyxy.
        weights: W ``(N + 1,)``.
        reg_scale: s.

    Returns:
        An edge below W(0) or from W(N) on has all its weight on the end bin.
    """
    s = _magnitude(reg_scale)
    centre, unit = reference[..., :2], reference[..., 2:] / s + 1e-16
    outward = torch.cat([(centre - boxes[..., :2]) / unit, (boxes[..., 2:] - centre) / unit], -1)
    phi = (outward - 0.5 * s).contiguous()
    last = len(weights) - 2
    index = torch.searchsorted(weights, phi, right=True).sub_(1).clamp_(0, last)
    below, above = (phi - weights[index]).abs(), (weights[index + 1] - phi).abs()
    right = below / (below + above)
    right = right.where(phi >= weights[0], 0.0).where(phi < weights[-1], 1.0)
    return BinTargets(index, 1 - right, right)


def fine_grained_localization(edges: Tensor, target: BinTargets) -> Tensor:
    """FGL before its IoU weight: cross-entropy to the two bins around the true edge (equation 5).

    Args:
        edges: Logits ``(..., 4, N + 1)``.
        target: From `bin_targets`, ``(..., 4)``.

    Returns:
        ``(..., 4)``. The paper's loss is the sum of this times IoU_k over the matched pairs of the
        union and their edges, divided by the number of pairs.

    Example:
        >>> z = torch.zeros(1, 4, 9)
        >>> target = BinTargets(torch.zeros(1, 4).long(), torch.ones(1, 4), torch.zeros(1, 4))
        >>> fine_grained_localization(z, target)[0, 0].item() == torch.tensor(9.0).log().item()
        True
    """
    two = torch.stack([target.index, target.index + 1], -1)
    left, right = edges.gather(-1, two).unbind(-1)
    return edges.logsumexp(-1) - target.left * left - target.right * right


def decoupled_distillation_focal(
    student: Tensor,
    teacher: Tensor,
    matched: Tensor,
    weight: Tensor,
    counts: tuple[Tensor, Tensor] | None = None,
    *,
    temperature: float = 5.0,
) -> Tensor:
    """DDF: the last layer's edge distributions teach an earlier layer's (equation 8).

    Args:
        student: Edge logits of L layers ``(L, B, Q, 4, N + 1)``.
        teacher: The last layer's ``(B, Q, 4, N + 1)``; no gradient flows to it.
        matched: ``(B, Q)`` bool: queries in the matching union.
        weight: ``(L, B, Q)``: IoU_k of a matched query, the teacher's confidence of another.
        counts: K_m and K_u; by default those of ``matched``. Denoising queries are weighed by the
            counts of the matching queries.
        temperature: T.

    Returns:
        ``(L,)``: the two decoupled means weighed by √K_m and √K_u.

    Example:
        >>> t = torch.zeros(1, 2, 4, 3); t[..., 0] = 5.0
        >>> args = t, torch.tensor([[True, False]]), torch.tensor([[[1.0, 0.0]]])
        >>> round(decoupled_distillation_focal(torch.zeros(1, 1, 2, 4, 3), *args).item(), 4)
        1.5411
    """
    layers = len(student)
    kl = forward_kl(
        student, teacher.detach().expand_as(student), temperature=temperature,
        class_dim=-1, reduction="none",
    )  # fmt: skip
    found = (kl * weight.detach()[..., None]).flatten(1)
    mask = matched[..., None].expand(kl.shape[1:]).reshape(1, -1).to(found.dtype)
    on, off = mask.sum(), (1 - mask).sum()
    km, ku = (on, off) if counts is None else counts
    km, ku = km.to(found.dtype).sqrt(), ku.to(found.dtype).sqrt()
    mean_on = (found * mask).sum(1) / on.clamp(min=1)
    mean_off = (found * (1 - mask)).sum(1) / off.clamp(min=1)
    return ((mean_on * km + mean_off * ku) / (km + ku)).reshape(layers)


def varifocal(
    logits: Tensor, quality: Tensor, positive: Tensor, *, alpha: float = 0.75, gamma: float = 2.0
) -> Tensor:
    """VFL of every query and class: binary cross-entropy to the IoU, hard negatives weigh more.

    Args:
        logits: ``(..., C)``.
        quality: ``(..., C)``: IoU with the matched object at its class, else 0.
        positive: ``(..., C)`` bool: the matched class.
        alpha: Weight of negatives.
        gamma: Focus of negatives.

    Returns:
        ``(..., C)``; the paper's loss is the sum divided by the number of objects.

    References:
        Zhang et al. VarifocalNet. CVPR 2021, arXiv 2008.13367, equation 2.

    Example:
        >>> one = torch.ones(1)
        >>> round(varifocal(torch.zeros(1), one * 0, one < 0).item(), 5)
        0.12997
    """
    p = logits.detach().sigmoid()
    weight = torch.where(positive, quality, alpha * p**gamma)
    return F.binary_cross_entropy_with_logits(logits, quality, weight=weight, reduction="none")
