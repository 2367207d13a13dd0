"""Losses of RTMPose and DWPose on SimCC logits, a row of bins for x and one for y a key point."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from cohobate.core.errors import InputError


class SimCC(NamedTuple):
    """Scores of bins on both axes; logits of a network, or labels.

    Attributes:
        x: ``(B, K, W)`` for B people, K key points and W bins, two a pixel.
        y: ``(B, K, H)``.
    """

    x: Tensor
    y: Tensor


def simcc_loss(
    student: SimCC,
    target: SimCC,
    weight: Tensor,
    *,
    beta: float = 10.0,
    label_softmax: bool = True,
    reference_batch_size: int | None = None,
) -> Tensor:
    """The task loss: KL divergence of the bins from the label's.

    ``L_ori = 1/K Σ_axes Σ_B Σ_K w · mean_bins p (log p - log q)`` with ``q = softmax(beta S)`` and
    ``p = softmax(beta G)``. The sum runs over the batch and the mean over the bins, so its size
    next to the distillation terms, which are means over the batch, grows with the batch: the
    released settings have 64 people on a device.

    Args:
        student: Logits S.
        target: Labels G, as `cohobate.detection.dwpose.codec.encode` makes them.
        weight: w ``(B, K)``; 0 leaves a key point out.
        beta: Inverse temperature.
        label_softmax: Whether p is the softmax of the labels, or the labels themselves.
        reference_batch_size: Scale the sum as if the batch had this many people; None leaves it.

    Returns:
        A scalar, float32 inside.

    Raises:
        InputError: Shapes do not fit.

    References:
        Jiang et al., RTMPose, arXiv 2303.07399; Yang et al., arXiv 2307.15880, L_ori.

    Differences:
        Sum over the batch and mean over the bins are the released code's; the paper leaves them
        open.

    Example:
        >>> import torch
        >>> target = SimCC(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]]))
        >>> flat = SimCC(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
        >>> round(simcc_loss(flat, target, torch.ones(1, 1)).item(), 4)
        0.6926
    """
    _same_shapes(student, target)
    if weight.shape != student.x.shape[:2]:
        raise InputError(f"weight: shape {tuple(weight.shape)}, needs {tuple(student.x.shape[:2])}")
    people, points = weight.shape
    scale = 1.0 if reference_batch_size is None else reference_batch_size / max(people, 1)
    parts = []
    for logits, labels in zip(student, target, strict=True):
        if label_softmax:
            divergence = _divergence(logits, labels, beta)
        else:
            log_q = (beta * _wide(logits)).log_softmax(-1)
            divergence = F.kl_div(log_q, _wide(labels), reduction="none").sum(-1)
        parts.append((divergence * weight.to(divergence)).sum() / logits.shape[-1])
    return ((parts[0] + parts[1]) * (scale / points)).to(student.x.dtype)


def simcc_distillation(student: SimCC, teacher: SimCC, *, beta: float = 10.0) -> Tensor:
    """The logit loss: KL divergence of the student's bins from the teacher's.

    ``L_logit = 1/K Σ_axes mean_B Σ_K KL(softmax(beta T) || softmax(beta S))``. Every key point
    counts, seen or not: there the teacher knows more than the label.

    Args:
        student: Logits S.
        teacher: Logits T of the same shape; no gradient reaches them.
        beta: Inverse temperature.

    Returns:
        A scalar, float32 inside.

    Raises:
        InputError: Shapes do not fit.

    References:
        Yang et al., arXiv 2307.15880, L_logit of both stages.

    Example:
        >>> import torch
        >>> teacher = SimCC(torch.tensor([[[0.0, 0.1]]]), torch.tensor([[[0.1, 0.0]]]))
        >>> flat = SimCC(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
        >>> round(simcc_distillation(flat, teacher).item(), 4)
        0.2219
    """
    _same_shapes(student, teacher)
    x, y = (_divergence(s, t.detach(), beta).mean() for s, t in zip(student, teacher, strict=True))
    return (x + y).to(student.x.dtype)


def feature_loss(student: Tensor, teacher: Tensor, *, alpha: float = 7e-5) -> Tensor:
    """The feature loss: squared distance of two feature maps, ``alpha / B Σ (F_s - F_t)²``.

    Args:
        student: F_s ``(B, C, h, w)``, after the 1 × 1 convolution to the teacher's channels.
        teacher: F_t of the same shape; no gradient reaches it.
        alpha: Its weight.

    Returns:
        A scalar, float32 inside.

    Raises:
        InputError: Shapes do not fit.

    References:
        Yang et al., arXiv 2307.15880, L_fea of the first stage.

    Differences:
        The paper writes a mean over channels and places; the released code sums, which is what
        its alpha belongs to.

    Example:
        >>> import torch
        >>> feature_loss(torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), alpha=0.5).item()
        2.0
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"features: the student has shape {tuple(student.shape)}, the teacher "
            f"{tuple(teacher.shape)}"
        )
    squared = F.mse_loss(_wide(student), _wide(teacher).detach(), reduction="sum")
    return (squared * (alpha / len(student))).to(student.dtype)


def _divergence(student: Tensor, target: Tensor, beta: float) -> Tensor:
    """KL divergences ``(B, K)`` of the softmax of the target from that of the student."""
    log_q = (beta * _wide(student)).log_softmax(-1)
    log_p = (beta * _wide(target)).log_softmax(-1)
    # exp costs less than the logarithm that a divergence of probabilities takes again
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _same_shapes(student: SimCC, other: SimCC) -> None:
    for axis, ours, theirs in zip("xy", student, other, strict=True):
        if ours.shape != theirs.shape:
            raise InputError(
                f"SimCC {axis}: the student has shape {tuple(ours.shape)}, the target or teacher "
                f"{tuple(theirs.shape)}"
            )


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.element_size() >= 4 else x.float()
