"""Cross-entropy against soft targets, and the classical distillation loss built on it.

``class_dim``, ``weight``, ``num_items`` and the types are those of ``cohobate.core.losses.kl``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.losses.divergences import divergence
from cohobate.core.losses.reduce import compute_dtype, reduce_items


def cross_entropy(
    student: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_dim: int = 1,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Cross-entropy with class indices, optionally smoothed.

    Args:
        student: Logits (B, C, *spatial).
        target: Class indices, the student's shape without the class axis.
        label_smoothing: Share ε of the target spread evenly over all classes.
        ignore_index: Items of this label are left out.
        class_dim: Axis of the classes.
        weight: Mask or weights that broadcast to the items.
        num_items: Count of items to divide by.

    Raises:
        InputError: The target has another shape.

    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016,
        arXiv:1512.00567, section 7 (label smoothing).

    Example:
        >>> import torch
        >>> round(cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item(), 4)
        1.3863
    """
    logits = student.to(compute_dtype(student)).movedim(class_dim, 1)
    if target.shape != logits.shape[:1] + logits.shape[2:]:
        raise InputError(
            f"target: shape {tuple(target.shape)} does not fit logits {tuple(student.shape)} "
            f"with classes on axis {class_dim}"
        )
    losses = F.cross_entropy(
        logits,
        target.long(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    weight = labelled(target, weight, ignore_index)
    return reduce_items(losses, weight, num_items, dtype=student.dtype)


def soft_cross_entropy(
    student: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    t_squared: bool = True,
    class_dim: int = 1,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Cross-entropy T² · −Σ_c y_c log softmax(z/T)_c with target probabilities y.

    Args:
        student: Logits (B, C, *spatial).
        target: Probabilities of the same shape.
        temperature: T > 0; the targets are taken as they are.
        t_squared: Whether to multiply by T².
        class_dim: Axis of the classes.
        weight: Mask or weights that broadcast to the items.
        num_items: Count of items to divide by.

    Raises:
        InputError: Shapes differ.

    Example:
        >>> import torch
        >>> y = torch.tensor([[0.25, 0.75]])
        >>> round(soft_cross_entropy(torch.tensor([[0.0, 1.0]]), y).item(), 4)
        0.5633
    """
    if student.shape != target.shape:
        raise InputError(
            f"target: shape {tuple(target.shape)} does not match the logits {tuple(student.shape)}"
        )
    dtype = compute_dtype(student, target)
    log_q = (student.to(dtype) / temperature).log_softmax(class_dim)
    losses = -(target.to(dtype) * log_q).sum(class_dim)
    if t_squared:
        losses = losses * temperature**2
    return reduce_items(losses, weight, num_items, dtype=student.dtype)


def smooth_labels(
    target: Tensor, num_classes: int, smoothing: float, *, class_dim: int = 1
) -> Tensor:
    """Probabilities (1−ε)·one-hot + ε/C from class indices.

    Args:
        target: Class indices, any shape.
        num_classes: C.
        smoothing: ε in [0, 1].
        class_dim: Where the class axis goes.

    Returns:
        Float32 probabilities of the target's shape with a class axis.

    Example:
        >>> import torch
        >>> smooth_labels(torch.tensor([1]), 2, 0.1)
        tensor([[0.0500, 0.9500]])
    """
    one_hot = F.one_hot(target.long(), num_classes).movedim(-1, class_dim).to(torch.float32)
    return one_hot * (1 - smoothing) + smoothing / num_classes


def labelled(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor | None:
    """The weight with the items of label ``ignore_index`` set to zero."""
    keep = target != ignore_index
    return keep if weight is None else torch.where(keep, weight, 0)


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_dim: int = 1,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Classical distillation (1−α)·CE(z_s, y) + α·T²·KL(softmax(z_t/T) ‖ softmax(z_s/T)).

    Args:
        student: Logits (B, C, *spatial).
        teacher: Logits of the same shape.
        target: Class indices, the student's shape without the class axis.
        temperature: T > 0 of the divergence; the cross-entropy has T = 1.
        alpha: Share of the divergence.
        label_smoothing: Smoothing of the cross-entropy.
        ignore_index: Items of this label are left out of both terms.
        class_dim: Axis of the classes.
        weight: Mask or weights that broadcast to the items.
        num_items: Count of items to divide by.

    Raises:
        InputError: Shapes differ.

    References:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        arXiv:1503.02531, section 2.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(kd_loss(s, t, torch.tensor([1]), temperature=2.0, alpha=0.5).item(), 4)
        0.4072
    """
    weight = labelled(target, weight, ignore_index)
    hard = cross_entropy(
        student,
        target,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        class_dim=class_dim,
        weight=weight,
        num_items=num_items,
    )
    soft = divergence(
        student,
        teacher,
        "forward_kl",
        temperature=temperature,
        class_dim=class_dim,
        weight=weight,
        num_items=num_items,
    )
    return (1 - alpha) * hard + alpha * soft
