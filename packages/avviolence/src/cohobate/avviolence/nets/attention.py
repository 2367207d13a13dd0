"""Attention with dropout on its weights, blocked to the cache where PyTorch has no fused form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 320_000
"""Attention weights held at a time: 1.3 MB in float32, about a core's second-level cache."""


def attend(query: Tensor, key_value: Tensor, heads: int, probability: float = 0.0) -> Tensor:
    r"""Multi-head ``dropout(softmax(Q K^T / sqrt(D))) V`` on projected inputs.

    PyTorch's fused CPU kernel has no dropout; its fallback stores four ``(B, H, T, S)`` arrays for
    the backward pass. Here the weights are made anew in the backward pass, a few heads at a time so
    that they stay in the cache, and only a mask of bytes is kept. Everywhere else this is
    `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: ``(B, T, H D)``.
        key_value: Keys, then values, ``(B, S, 2 H D)``.
        heads: Number of heads H.
        probability: Of dropping a weight; on a CPU rounded to a multiple of 2^-16.

    Returns:
        ``(B, T, H D)``.

    Example:
        >>> values = torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 3.0, 4.0]])[None]
        >>> attend(torch.ones(1, 1, 2), values, heads=1)
        tensor([[[2., 3.]]])
    """
    if probability and query.device.type == "cpu":
        shape = (heads, len(query), query.shape[1], key_value.shape[1])
        keep = keep_mask(shape, probability)
        out: Tensor = _BlockedAttention.apply(query, key_value, keep, _rescale(probability))
        return out
    key, value = key_value.chunk(2, dim=-1)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(q, k, v, dropout_p=probability)
    return attended.transpose(1, 2).flatten(2)


def dropout(x: Tensor, probability: float, base: Tensor | None = None) -> Tensor:
    """Add ``dropout(x)`` to ``base``, on a CPU twice as fast as `torch.nn.functional.dropout`.

    Args:
        x: Any shape.
        probability: Of zeroing an entry; on a CPU rounded to a multiple of 2^-16.
        base: What it is added to, of the same shape; nothing when not given.

    Example:
        >>> dropout(torch.ones(3), 0.0, base=torch.ones(3))
        tensor([2., 2., 2.])
    """
    if not probability or x.device.type != "cpu":
        dropped = F.dropout(x, probability)
        return dropped if base is None else base + dropped
    noise = keep_mask(x.shape, probability) * torch.tensor(_rescale(probability), dtype=x.dtype)
    return x * noise if base is None else torch.addcmul(base, x, noise)


def keep_mask(shape: Sequence[int], probability: float) -> Tensor:
    """Random mask on the CPU: 0 with the given probability, else 1.

    Four entries come from one 64-bit draw.

    Args:
        shape: Shape of the mask.
        probability: Of a zero, rounded to a multiple of 2^-16.

    Returns:
        Unsigned bytes, which multiply floats faster than booleans do.
    """
    size = math.prod(shape)
    words = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    threshold = round(probability * 2**16) - 2**15
    return (words.view(torch.int16)[:size] >= threshold).view(torch.uint8).view(*shape)


def _rescale(probability: float) -> float:
    return 1 / (1 - round(probability * 2**16) / 2**16)


class _BlockedAttention(torch.autograd.Function):
    """`attend` with a given ``(H, B, T, S)`` keep mask, weights recomputed in the backward pass."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, query: Tensor, key_value: Tensor, keep: Tensor, rescale: float) -> Tensor:
        out = torch.empty_like(query)
        root = (query.shape[-1] / len(keep)) ** -0.5
        for kept, q, k, v, o in _blocks(keep, query, *key_value.chunk(2, dim=-1), out):
            weights = _matmul(q, k.mT, root).softmax(-1).mul_(kept)
            _matmul(weights, v, rescale, out=o)
        ctx.save_for_backward(query, key_value, keep, out)
        ctx.rescale = rescale
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key_value, keep, out = ctx.saved_tensors
        grad = grad.contiguous()
        d_query, d_key_value = torch.empty_like(query), torch.empty_like(key_value)
        root = (query.shape[-1] / len(keep)) ** -0.5
        halves = (*key_value.chunk(2, dim=-1), *d_key_value.chunk(2, dim=-1))
        for kept, q, g, o, dq, k, v, dk, dv in _blocks(keep, query, grad, out, d_query, *halves):
            weights = _matmul(q, k.mT, root).softmax(-1)
            dropped = weights * kept
            _matmul(dropped.mT, g, ctx.rescale, out=dv)
            # What softmax takes off each row, sum(weight * its gradient), is g . o.
            row = torch.linalg.vecdot(g, o).neg_()[..., None]
            scores = _matmul(g, v.mT, ctx.rescale).mul_(dropped).addcmul_(weights, row)
            _matmul(scores, k, root, out=dq)
            _matmul(scores.mT, q, root, out=dk)
        return d_query, d_key_value, None, None


def _matmul(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """``scale * a @ b``, scaled inside the matrix product."""
    if out is None:
        out = a.new_empty(len(a), a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _blocks(keep: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of a ``(H, B, T, S)`` mask and of ``(B, T, H D)``: one head, some bags."""
    bags = max(1, BLOCK_ELEMENTS // keep[0, 0].numel())
    by_head = [x.unflatten(-1, (len(keep), -1)).unbind(2) for x in tensors]
    for mask, *rest in zip(keep, *by_head, strict=True):
        yield from zip(*(x.split(bags) for x in (mask, *rest)), strict=True)
