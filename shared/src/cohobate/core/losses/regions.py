"""Pooling over regions given by an index: superpixels, segments, masks, bags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.core.errors import InputError
from cohobate.core.losses.reduce import compute_dtype


class _SegmentSum(torch.autograd.Function):
    """Sum of rows by segment; its gradient is one gather, whichever way the sum was taken."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, segments: int, sort: bool) -> Tensor:
        ctx.save_for_backward(index)
        ctx.values_dtype = values.dtype
        rows = values.to(compute_dtype(values))
        if not sort:
            return rows.new_zeros(segments, rows.shape[1]).index_add_(0, index, rows)
        lengths = torch.bincount(index, minlength=segments)
        rows = rows.index_select(0, index.argsort(stable=True))
        return torch.segment_reduce(rows, "sum", lengths=lengths, unsafe=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index).to(ctx.values_dtype), None, None, None


def segment_mean(
    values: Tensor,
    index: Tensor,
    num_segments: int,
    *,
    weight: Tensor | None = None,
    eps: float = 0.0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean of the rows of every segment.

    Args:
        values: Rows (N, D).
        index: Segment of each row (N,) in [0, num_segments); rows with a negative index are
            left out.
        num_segments: S.
        weight: Weight of each row (N,); the mean is then Σ w·x / Σ w.
        eps: Added to the count before dividing.
        deterministic: Sum in the order of the rows on every device; on a GPU this sorts the index
            and avoids atomic additions, on the CPU the sum is in order anyway.

    Returns:
        Means (S, D) in the type of ``values``, zero for empty segments; and counts (S,), the sums
        of weights, float32 (float64 for float64).

    Raises:
        InputError: Shapes do not fit.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [3.0], [5.0]])
        >>> mean, count = segment_mean(x, torch.tensor([0, 0, 2]), 3)
        >>> mean.flatten().tolist(), count.tolist()
        ([2.0, 0.0, 5.0], [2.0, 0.0, 1.0])
    """
    if values.dim() != 2 or index.shape != values.shape[:1]:
        raise InputError(
            f"index: shape {tuple(index.shape)} does not fit values {tuple(values.shape)}, "
            "expected (N,) and (N, D)"
        )
    sort = deterministic and values.device.type != "cpu"
    bucket = torch.where(index < 0, num_segments, index)  # one more segment holds what is left out
    ones = torch.ones_like(index, dtype=compute_dtype(values))
    if weight is not None:
        ones = ones * weight.to(ones.dtype)
        values = (values * ones[:, None]).to(values.dtype)
    count = _SegmentSum.apply(ones[:, None], bucket, num_segments + 1, sort)[:num_segments, 0]
    total = _SegmentSum.apply(values, bucket, num_segments + 1, sort)[:num_segments]
    divisor = torch.where(count == 0, 1, count) + eps
    return (total / divisor[:, None]).to(values.dtype), count
