"""The sparse convolution itself: gather rows, multiply, add to rows."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.core.errors import InputError
from cohobate.lidar.sparse.geometry import KernelMap

Backend = Literal["torch", "spconv"]


def sparse_conv(
    features: Tensor, kernel: Tensor, pairs: KernelMap, backend: Backend = "torch"
) -> Tensor:
    """``out[o] = Σ_k x[i] W_k`` over the pairs (i, o) of every kernel element k.

    Args:
        features: Rows x (N, C_in).
        kernel: W (K, C_in, C_out).
        pairs: Which rows meet.
        backend: ``torch``, plain PyTorch on any device; ``spconv``, the library of that name.

    Returns:
        (M, C_out); zero where no pair ends. Under autocast it is computed in float32: many products
        are added to one row.

    Raises:
        InputError: Shapes do not fit, or the backend is not installed.

    Example:
        >>> one = torch.tensor([0])
        >>> x, w = torch.tensor([[2.0]]), torch.tensor([[[3.0]]])
        >>> sparse_conv(x, w, KernelMap((one,), (one,), 1, 1)).item()
        6.0
    """
    expected = (len(pairs.inputs), features.shape[-1])
    if kernel.dim() != 3 or tuple(kernel.shape[:2]) != expected or len(features) != pairs.size_in:
        raise InputError(
            f"kernel: {tuple(kernel.shape)} with features {tuple(features.shape)} on a map of "
            f"{expected[0]} elements from {pairs.size_in} rows"
        )
    if backend not in get_args(Backend):
        raise InputError(f"backend: '{backend}' is none of {', '.join(get_args(Backend))}")
    device = features.device.type
    if torch.is_autocast_enabled(device):
        features, kernel = features.float(), kernel.float()
    with torch.autocast(device, enabled=False):
        if backend == "torch":
            return _GatherMatmulScatter.apply(features, kernel, pairs)
        from cohobate.lidar.sparse import spconv

        return spconv.convolve(features, kernel, pairs)


class _GatherMatmulScatter(torch.autograd.Function):
    """One matrix product for each kernel element; nothing larger than one element's rows is kept.

    Saved for the backward pass are the input and the kernel alone: the gathered rows are taken
    again, which is cheaper than to keep K copies of them.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, kernel: Tensor, pairs: KernelMap) -> Tensor:
        ctx.save_for_backward(features, kernel)
        ctx.pairs = pairs
        if pairs.centre is None:
            out = features.new_zeros(pairs.size_out, kernel.shape[2])
        else:
            out = features @ kernel[pairs.centre]
        for k, (rows, targets) in enumerate(zip(pairs.inputs, pairs.outputs, strict=True)):
            if k != pairs.centre and len(rows):
                out.index_add_(0, targets, features.index_select(0, rows) @ kernel[k])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, kernel = ctx.saved_tensors
        pairs: KernelMap = ctx.pairs
        grad = grad.contiguous()
        wants_features, wants_kernel = ctx.needs_input_grad[:2]
        grad_kernel = torch.zeros_like(kernel) if wants_kernel else None
        grad_features = None
        if wants_features:
            if pairs.centre is None:
                grad_features = torch.zeros_like(features)
            else:
                grad_features = grad @ kernel[pairs.centre].T
        if grad_kernel is not None and pairs.centre is not None:
            torch.mm(features.T, grad, out=grad_kernel[pairs.centre])
        for k, (rows, targets) in enumerate(zip(pairs.inputs, pairs.outputs, strict=True)):
            if k == pairs.centre or not len(rows):
                continue
            upper = grad.index_select(0, targets)
            if grad_features is not None:
                grad_features.index_add_(0, rows, upper @ kernel[k].T)
            if grad_kernel is not None:
                torch.mm(features.index_select(0, rows).T, upper, out=grad_kernel[k])
        return grad_features, grad_kernel, None
