"""Losses of online distillation: binary cross-entropy against clicks and against soft labels.

``weight`` and ``num_items`` follow the rule of ``cohobate.core.losses.reduce``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from cohobate.core.losses.reduce import compute_dtype, reduce_items


def click_loss(
    logit: Tensor,
    label: Tensor,
    *,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy with logits, ``-y log s(z) - (1 - y) log(1 - s(z))``.

    Args:
        logit: (B,) z.
        label: (B,) y in [0, 1].
        weight: (B,) mask or weight of each row.
        num_items: count of rows to divide by.

    Returns:
        A scalar.

    References:
        Lai et al., RecSys 2025, arXiv:2508.15326: the first two terms of the training loss.

    Example:
        >>> round(click_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])).item(), 4)
        0.41
    """
    dtype = compute_dtype(logit)
    loss = binary_cross_entropy_with_logits(logit.to(dtype), label.to(dtype), reduction="none")
    return reduce_items(loss, weight, num_items, dtype=logit.dtype)


def soft_click_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 2.0,
    t_squared: bool = True,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy against the tempered teacher, ``t^2 BCE(z_S / t, s(z_T / t))``.

    Its gradient with respect to ``z_S`` is ``t (s(z_S / t) - s(z_T / t))`` per row: the factor t^2
    undoes what the temperature takes from it. The caller detaches the teacher where the teacher
    shall learn from clicks alone.

    Args:
        student: (B,) logits z_S.
        teacher: (B,) logits z_T, not corrected for the sampling rate.
        temperature: t.
        t_squared: multiply by t^2.
        weight: (B,) mask or weight of each row.
        num_items: count of rows to divide by.

    Returns:
        A scalar.

    References:
        Lai et al., RecSys 2025, arXiv:2508.15326: the third term of the training loss.

    Example:
        >>> z = torch.tensor([0.0]), torch.tensor([2.0])
        >>> round(soft_click_loss(*z, temperature=2.0).item(), 4)
        2.7726
    """
    dtype = compute_dtype(student, teacher)
    soft = torch.sigmoid(teacher.to(dtype) / temperature)
    tempered = student.to(dtype) / temperature
    loss = click_loss(tempered, soft, weight=weight, num_items=num_items)
    return (loss * temperature**2 if t_squared else loss).to(student.dtype)
