"""Losses between relations: how positions, tokens or samples resemble each other.

None of them holds a matrix of positions × positions: the Gram loss uses an identity, the softmax
relations walk over blocks of queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.core.errors import InputError
from cohobate.core.losses.divergences import Kind, check_kind, gradients, terms
from cohobate.core.losses.reduce import compute_dtype, expand_weight, reduce_items

_CPU_BLOCK, _GPU_BLOCK = 1 << 18, 1 << 25  # relation entries alive at a time
_LEFT_OUT = -1e9  # logit of a key that does not take part


def gram_relation(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = True,
    channel_dim: int = 1,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Mean squared difference of all pairwise inner products, (1/n²) ‖S Sᵀ − T Tᵀ‖²_F per sample.

    With D = S − T and M = S + T (the narrower padded with zero channels), the squared norm is
    ½ [⟨DᵀD, MᵀM⟩ + tr(DᵀM DᵀM)]: only channel-sized matrices and, unlike the expanded square, no
    digits lost when the two agree.

    Args:
        student: Features (B, C_s, *spatial) with n positions.
        teacher: Features (B, C_t, *spatial) with the same positions.
        normalize: Scale each position's vector to norm 1, so that the relations are cosines.
        channel_dim: Axis of the channels.
        weight: Mask or weights of the samples (B,).
        num_items: Count of samples to divide by.

    Raises:
        InputError: The positions differ.

    References:
        Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv:1907.09682,
        equation 4.

    Differences:
        Vectors are normalised instead of rows of the Gram matrix.

    Example:
        >>> import torch
        >>> s = torch.tensor([[[1.0, 0.0]]])  # one channel, two positions
        >>> t = torch.tensor([[[1.0, 1.0]]])
        >>> gram_relation(s, t, normalize=False).item()
        0.75
    """
    dtype = compute_dtype(student, teacher)
    s = student.to(dtype).movedim(channel_dim, -1).flatten(1, -2)
    t = teacher.to(dtype).movedim(channel_dim, -1).flatten(1, -2)
    if s.shape[:2] != t.shape[:2]:
        raise InputError(
            f"teacher: {tuple(teacher.shape)} has other positions than the student's "
            f"{tuple(student.shape)}"
        )
    if normalize:
        s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    width = max(s.shape[-1], t.shape[-1])
    s, t = F.pad(s, (0, width - s.shape[-1])), F.pad(t, (0, width - t.shape[-1]))
    difference, total = s - t, s + t
    with torch.autocast(student.device.type, enabled=False):
        dd = difference.mT @ difference
        mm = total.mT @ total
        dm = difference.mT @ total
    losses = 0.5 * ((dd * mm).sum((1, 2)) + (dm * dm.mT).sum((1, 2))) / s.shape[1] ** 2
    return reduce_items(losses, weight, num_items, dtype=student.dtype)


class _Relation(torch.autograd.Function):
    """Divergence of softmax(Q Kᵀ·scale) between two models for every query, block by block.

    Inputs are (G, L, d) with G = batch × heads; ``keep`` is (G, L_k) or ``None``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_s: Tensor,
        k_s: Tensor,
        q_t: Tensor,
        k_t: Tensor,
        keep: Tensor | None,
        kind: Kind,
        beta: float,
        scales: tuple[float, float],
    ) -> Tensor:
        values = q_s.new_empty(q_s.shape[:2])
        for rows in _query_blocks(q_s, k_s):
            z_s = _scores(q_s[:, rows], k_s, keep, scales[0])
            z_t = _scores(q_t[:, rows], k_t, keep, scales[1])
            values[:, rows] = terms(kind, z_s, z_t, -1, beta).sum(-1)
        ctx.save_for_backward(q_s, k_s, q_t, k_t, keep)
        ctx.options = (kind, beta, scales)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_s, k_s, q_t, k_t, keep = ctx.saved_tensors
        kind, beta, scales = ctx.options
        student, teacher = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:4])
        grads = [torch.zeros_like(x) for x in (q_s, k_s, q_t, k_t)]
        sides = ((q_s, k_s, scales[0]), (q_t, k_t, scales[1]))
        for rows in _query_blocks(q_s, k_s):
            z_s, z_t = (_scores(q[:, rows], k, keep, scale) for q, k, scale in sides)
            shape = z_s.shape
            pair = gradients(kind, z_s.flatten(0, 1), z_t.flatten(0, 1), beta, student, teacher)
            factor = grad[:, rows].unsqueeze(-1)
            for i, (d, (q, k, scale)) in enumerate(zip(pair, sides, strict=True)):
                if d is None:
                    continue
                d = d.view(shape).mul_(factor * scale).masked_fill_(factor == 0, 0)
                grads[2 * i][:, rows] = d @ k
                grads[2 * i + 1].baddbmm_(d.mT, q[:, rows])
        return *grads, None, None, None, None


def _query_blocks(queries: Tensor, keys: Tensor) -> Iterator[slice]:
    """Slices of the query axis that keep a block of relations small."""
    budget = _CPU_BLOCK if queries.device.type == "cpu" else _GPU_BLOCK
    step = max(1, budget // max(1, queries.shape[0] * keys.shape[1]))
    for i in range(0, queries.shape[1], step):
        yield slice(i, i + step)


def _scores(queries: Tensor, keys: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """Scaled inner products (G, l, L); keys left out get a logit that vanishes in the softmax."""
    scores = (queries @ keys.mT).mul_(scale)
    return scores if keep is None else scores.masked_fill_(~keep.unsqueeze(1), _LEFT_OUT)


def attention_relation(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Divergence between the attention distributions softmax(Q Kᵀ/(√d T)) of two models.

    Summed over keys, averaged over the valid queries of all heads. The widths d of the two models
    may differ, the number of heads may not (split both into the same number of relation heads).

    Args:
        student: Queries and keys, each (B, H, L, d_s).
        teacher: Queries and keys, each (B, H, L, d_t).
        kind: Which divergence.
        beta: Mixing weight of Jensen–Shannon and of the skewed divergences.
        temperature: T > 0.
        weight: Mask or weights of the tokens, broadcasting to (B, L). A token of zero weight is
            left out as a query and as a key.
        num_items: Count of (head, token) pairs to divide by.

    Raises:
        InputError: Shapes do not fit.

    References:
        Wang et al., "MiniLM: Deep Self-Attention Distillation", NeurIPS 2020, arXiv:2002.10957,
        equations 6 and 7; MiniLMv2, arXiv:2012.15828, equation 3 (relation heads).

    Example:
        >>> import torch
        >>> s = torch.tensor([0.0, 0.0]).view(1, 1, 2, 1)
        >>> t = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
        >>> round(attention_relation((s, s), (t, t)).item(), 4)
        0.0555
    """
    check_kind(kind, beta)
    q_s, k_s = student
    q_t, k_t = teacher
    if not (
        q_s.dim() == 4
        and q_s.shape == k_s.shape
        and q_t.shape == k_t.shape
        and q_s.shape[:3] == q_t.shape[:3]
    ):
        raise InputError(
            "teacher: queries and keys must be (B, H, L, d) with one B, H and L, got "
            f"{[tuple(x.shape) for x in (q_s, k_s, q_t, k_t)]}"
        )
    dtype = compute_dtype(q_s, k_s, q_t, k_t)
    items = q_s.shape[:3]
    keep = None
    if weight is not None:
        weight = expand_weight(weight, torch.Size((items[0], items[2]))).unsqueeze(1).expand(items)
        keep = (weight != 0).flatten(0, 1)
    with torch.autocast(q_s.device.type, enabled=False):
        losses = _Relation.apply(
            *(x.to(dtype).flatten(0, 1) for x in (q_s, k_s, q_t, k_t)),
            keep,
            kind,
            beta,
            tuple(x.shape[-1] ** -0.5 / temperature for x in (q_s, q_t)),
        )
    return reduce_items(losses.view(items), weight, num_items, dtype=q_s.dtype)


def value_relation(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Divergence between the value relations softmax(V Vᵀ/(√d T)) of two models.

    Args:
        student: Values (B, H, L, d_s).
        teacher: Values (B, H, L, d_t).
        kind: Which divergence.
        beta: Mixing weight of Jensen–Shannon and of the skewed divergences.
        temperature: T > 0.
        weight: Mask or weights of the tokens, broadcasting to (B, L).
        num_items: Count of (head, token) pairs to divide by.

    Raises:
        InputError: Shapes do not fit.

    References:
        Wang et al., "MiniLM: Deep Self-Attention Distillation", NeurIPS 2020, arXiv:2002.10957,
        equations 8 to 10.

    Example:
        >>> import torch
        >>> s = torch.tensor([0.0, 0.0]).view(1, 1, 2, 1)
        >>> t = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
        >>> round(value_relation(s, t).item(), 4)
        0.0555
    """
    return attention_relation(
        (student, student),
        (teacher, teacher),
        kind=kind,
        beta=beta,
        temperature=temperature,
        weight=weight,
        num_items=num_items,
    )
