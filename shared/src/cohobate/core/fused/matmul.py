"""The four matrix products, with sums in the working type whatever the type of the operands.

On CUDA the product itself writes float32. On the CPU, where it cannot, low-precision operands are
widened one tile of classes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cohobate.core.fused.spec import low_precision, working_dtype

_TILE = 2048  # classes widened at a time


def _tiles(w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a low-precision weight in float32, tile by tile; other weights whole."""
    if not low_precision(w.dtype):
        yield slice(None), w
        return
    for i in range(0, w.shape[0], _TILE):
        yield slice(i, i + _TILE), w[i : i + _TILE].float()


def project(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Raw logits x wᵀ + bias (n, V), written to ``out`` in the working type."""
    if low_precision(x.dtype) and x.is_cuda:
        torch.mm(x, w.t(), out_dtype=out.dtype, out=out)
    else:
        x = x.to(out.dtype)
        for classes, tile in _tiles(w):
            torch.mm(x, tile.t(), out=out[:, classes])
    return out if bias is None else out.add_(bias)


def input_grad(dz: Tensor, w: Tensor) -> Tensor:
    """Gradient dz · w (n, H) with respect to the hidden states."""
    if low_precision(w.dtype) and w.is_cuda:
        return torch.mm(dz, w, out_dtype=torch.float32)
    if not low_precision(w.dtype):
        return dz @ w
    total = dz.new_zeros(dz.shape[0], w.shape[1])
    for classes, tile in _tiles(w):
        total.addmm_(dz[:, classes], tile)
    return total


def add_weight_grad(total: Tensor, dz: Tensor, x: Tensor, *, first: bool) -> None:
    """Add dzᵀ · x (V, H) to ``total``, or write it there when it is the first."""
    if low_precision(x.dtype) and x.is_cuda:
        torch.addmm(total, dz.t(), x, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    else:
        x = x.to(working_dtype(x.dtype))
        total.addmm_(dz.t(), x, beta=0 if first else 1)
