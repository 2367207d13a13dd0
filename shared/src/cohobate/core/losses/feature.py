"""Losses between feature maps.

Features are (B, C, *spatial), or any shape with the channels on axis ``channel_dim``. Except where
said otherwise an item is a position (all axes but the channels), its loss is the mean over
channels, and ``weight``/``num_items`` follow ``cohobate.core.losses.reduce``. All compute in
float32 (float64 for float64) and return the student's type; student and teacher must have one
shape, which is what the adapters of ``cohobate.core.taps`` are for.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.losses.reduce import compute_dtype, reduce_items


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in the computing type, shapes checked."""
    if student.shape != teacher.shape:
        raise InputError(
            f"teacher: features {tuple(teacher.shape)} do not match the student's "
            f"{tuple(student.shape)}"
        )
    dtype = compute_dtype(student, teacher)
    return student.to(dtype), teacher.to(dtype)


def mse(
    student: Tensor,
    teacher: Tensor,
    *,
    channel_dim: int = 1,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Mean squared error, averaged over channels and valid positions.

    Args:
        student: Features (B, C, *spatial).
        teacher: Features of the same shape.
        channel_dim: Axis of the channels.
        weight: Mask or weights that broadcast to the positions (B, *spatial).
        num_items: Count of positions to divide by.

    Raises:
        InputError: Shapes differ.

    Example:
        >>> import torch
        >>> mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item()
        2.5
    """
    s, t = _pair(student, teacher)
    return reduce_items((s - t).square().mean(channel_dim), weight, num_items, dtype=student.dtype)


def smooth_l1(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    channel_dim: int = 1,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Smooth L1 (Huber divided by β), averaged over channels and valid positions.

    Args:
        student: Features (B, C, *spatial).
        teacher: Features of the same shape.
        beta: Error at which the square turns into the absolute value; 0 is plain L1.
        channel_dim: Axis of the channels.
        weight: Mask or weights that broadcast to the positions (B, *spatial).
        num_items: Count of positions to divide by.

    Raises:
        InputError: Shapes differ.

    Example:
        >>> import torch
        >>> smooth_l1(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]])).item()
        1.5
    """
    s, t = _pair(student, teacher)
    losses = F.smooth_l1_loss(s, t, beta=beta, reduction="none").mean(channel_dim)
    return reduce_items(losses, weight, num_items, dtype=student.dtype)


def cosine(
    student: Tensor,
    teacher: Tensor,
    *,
    channel_dim: int = 1,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """One minus the cosine between the channel vectors, averaged over valid positions.

    Args:
        student: Features (B, C, *spatial).
        teacher: Features of the same shape.
        channel_dim: Axis of the channels.
        weight: Mask or weights that broadcast to the positions (B, *spatial).
        num_items: Count of positions to divide by.
        eps: Smallest norm that is divided by.

    Raises:
        InputError: Shapes differ.

    Example:
        >>> import torch
        >>> round(cosine(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])).item(), 4)
        0.2929
    """
    s, t = _pair(student, teacher)
    losses = 1 - F.cosine_similarity(s, t, dim=channel_dim, eps=eps)
    return reduce_items(losses, weight, num_items, dtype=student.dtype)


def attention_map(features: Tensor, *, power: float = 2.0, channel_dim: int = 1) -> Tensor:
    """Spatial attention Σ_c |A_c|^p, flattened and scaled to norm 1 per sample.

    Args:
        features: (B, C, *spatial).
        power: Exponent p.
        channel_dim: Axis of the channels.

    Returns:
        (B, positions).

    Example:
        >>> import torch
        >>> attention_map(torch.tensor([[[3.0, 0.0]], [[0.0, 2.0]]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    energy = features.to(compute_dtype(features)).abs().pow(power).sum(channel_dim)
    return F.normalize(energy.flatten(1), dim=1)


def attention_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    power: float = 2.0,
    squared: bool = True,
    channel_dim: int = 1,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Distance between the normalised spatial attention maps; the item is a sample.

    Channel counts may differ, positions may not.

    Args:
        student: Features (B, C_s, *spatial).
        teacher: Features (B, C_t, *spatial).
        power: Exponent p of the attention map.
        squared: Squared distance; ``False`` is the norm itself.
        channel_dim: Axis of the channels.
        weight: Mask or weights of the samples (B,).
        num_items: Count of samples to divide by.

    Raises:
        InputError: The positions differ.

    References:
        Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv:1612.03928,
        equation 2.

    Differences:
        The equation has the norm, whose gradient is undefined at 0; the square is the default.

    Example:
        >>> import torch
        >>> s = torch.tensor([[[1.0, 0.0]]])
        >>> t = torch.tensor([[[0.0, 1.0]]])
        >>> attention_transfer(s, t).item()
        2.0
    """
    s = attention_map(student, power=power, channel_dim=channel_dim)
    t = attention_map(teacher, power=power, channel_dim=channel_dim)
    if s.shape != t.shape:
        raise InputError(
            f"teacher: {t.shape[1]} positions per sample do not match the student's {s.shape[1]}"
        )
    losses = (s - t).square().sum(1)
    if not squared:
        losses = losses.sqrt()
    return reduce_items(losses, weight, num_items, dtype=student.dtype)


def hint(
    student: Tensor,
    teacher: Tensor,
    *,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """FitNets hint loss ½ ‖r(student) − teacher‖², summed over all but the batch axis.

    The regressor r is a trained adapter (``cohobate.core.taps.adapter``) applied beforehand; the
    item is a sample.

    Args:
        student: Adapted features (B, ...).
        teacher: Features of the same shape.
        weight: Mask or weights of the samples (B,).
        num_items: Count of samples to divide by.

    Raises:
        InputError: Shapes differ.

    References:
        Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550, equation 3.

    Example:
        >>> import torch
        >>> hint(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item()
        2.5
    """
    s, t = _pair(student, teacher)
    losses = 0.5 * (s - t).square().flatten(1).sum(1)
    return reduce_items(losses, weight, num_items, dtype=student.dtype)
