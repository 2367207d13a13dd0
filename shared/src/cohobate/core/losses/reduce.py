"""One rule for masks, weights and counts, used by every loss.

An *item* is one thing that has a loss of its own: a token, a voxel, a row, a sample. A loss is

    sum over items of weight · loss  /  num_items

Items of weight zero (or ``False``) are left out entirely, whatever their values. ``num_items``
counts items and defaults to the number of items whose weight is not zero; give the count of the
whole batch when the loss is computed in parts (gradient accumulation, several ranks), and the
parts add up to the loss of the whole. A batch without any valid item gives 0 with a graph.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cohobate.core.errors import InputError

Reduction = Literal["mean", "none"]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Float32, or float64 when any of the tensors is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def expand_weight(weight: Tensor, shape: torch.Size) -> Tensor:
    """Broadcast ``weight`` to the shape of the items.

    Raises:
        InputError: The weight does not broadcast to ``shape``.
    """
    try:
        return weight.expand(shape)
    except RuntimeError:
        raise InputError(
            f"weight: shape {tuple(weight.shape)} does not broadcast to the items {tuple(shape)}"
        ) from None


def reduce_items(
    losses: Tensor,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Reduce the losses of single items by the one rule of this module.

    Args:
        losses: Loss of every item, any shape.
        weight: Mask or weights that broadcast to ``losses``; ``None`` keeps all.
        num_items: What the sum is divided by; ``None`` counts the items of non-zero weight.
        dtype: Type of the result; ``None`` keeps that of ``losses``.
        reduction: ``"none"`` returns the weighted losses unreduced.

    Returns:
        A scalar, or a tensor like ``losses`` for ``reduction="none"``.

    Raises:
        InputError: The weight does not broadcast, or ``num_items`` is given without a reduction.

    Example:
        >>> import torch
        >>> losses = torch.tensor([1.0, 2.0, 6.0])
        >>> reduce_items(losses, torch.tensor([True, True, False])).item()
        1.5
    """
    dtype = dtype or losses.dtype
    if weight is not None:
        weight = expand_weight(weight, losses.shape)
        losses = torch.where(weight != 0, losses * weight.to(losses.dtype), 0)
    if reduction == "none":
        if num_items is not None:
            raise InputError("num_items: has no meaning with reduction='none'")
        return losses.to(dtype)
    if num_items is None:
        num_items = losses.numel() if weight is None else (weight != 0).sum()
    if isinstance(num_items, Tensor):
        divisor: float | Tensor = torch.where(num_items == 0, 1, num_items)
    else:
        divisor = num_items or 1
    return (losses.sum() / divisor).to(dtype)


def global_items(items: Tensor | int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Number of items over all ranks, divided by the number of ranks.

    This is the ``num_items`` for a loss under DDP or FSDP: those average gradients over ranks,
    and the average of ``sum of rank / global_items`` is the mean over the global batch, however
    unequal the ranks are.

    Args:
        items: Mask or weights of this rank's items, or their count.
        group: Process group; ``None`` for the default one. Without one, this rank is all there is.

    Returns:
        A scalar tensor on the device of ``items``.

    Example:
        >>> import torch
        >>> global_items(torch.tensor([True, False, True])).item()
        2.0
    """
    if isinstance(items, Tensor):
        count = (items != 0).sum().to(torch.float32)
    else:
        count = torch.tensor(float(items))
    if not (dist.is_available() and dist.is_initialized()):
        return count
    dist.all_reduce(count, group=group)
    return count / dist.get_world_size(group)
