"""Losses of online distillation: binary cross-entropy against clicks and against soft labels."""

from __future__ import annotations

import torch
from torch import Tensor


def _mean(loss: Tensor, weight: Tensor | None, num_items: Tensor | int | None) -> Tensor:
    if weight is not None:
        loss = loss * weight
        num_items = weight.sum() if num_items is None else num_items
    return loss.mean() if num_items is None else loss.sum() / num_items


def click_loss(
    logit: Tensor,
    label: Tensor,
    *,
    weight: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Binary cross-entropy with logits, ``-y log s(z) - (1 - y) log(1 - s(z))``.

    Args:
        logit: (B,) z.
        label: (B,) y in [0, 1].
        weight: (B,) weight of each row; 0 leaves it out.
        num_items: divisor; default the number (or weight) of rows. Under several processes that
            of the global batch.

    Returns:
        A float32 scalar.

    References:
        Lai et al., RecSys 2025, arXiv:2508.15326: the first two terms of the training loss.

    Example:
        >>> round(click_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])).item(), 4)
        0.41
    """
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        logit.float(), label.float(), reduction="none"
    )
    return _mean(loss, weight, num_items)


def soft_click_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 2.0,
    weight: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Binary cross-entropy against the tempered teacher, ``BCE(z_S / t, s(z_T / t))``.

    Its gradient with respect to ``z_S`` is ``(s(z_S / t) - s(z_T / t)) / t`` per row, so a factor
    of t^2 keeps its size against the click loss; the caller applies it. The caller also detaches
    the teacher where the teacher shall learn from clicks alone.

    Args:
        student: (B,) logits z_S.
        teacher: (B,) logits z_T, not corrected for the sampling rate.
        target: not used: clicks play no part in this term.
        temperature: t.
        weight: (B,) weight of each row.
        num_items: divisor; default the number (or weight) of rows.

    Returns:
        A float32 scalar.

    References:
        Lai et al., RecSys 2025, arXiv:2508.15326: the third term of the training loss.

    Example:
        >>> z = torch.tensor([0.0]), torch.tensor([2.0])
        >>> round(soft_click_loss(*z, temperature=2.0).item(), 4)
        0.6931
    """
    soft = torch.sigmoid(teacher.float() / temperature)
    return click_loss(student.float() / temperature, soft, weight=weight, num_items=num_items)
