"""Contrastive losses between student and teacher embeddings.

The matrix of scores is never held: it is a linear layer whose weight are the keys, followed by a
cross-entropy, which `cohobate.core.fused.linear_divergence` computes in chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.fused import api as fused  # the module: it imports this package's divergences
from cohobate.core.losses.reduce import compute_dtype, expand_weight, reduce_items
from cohobate.core.losses.regions import segment_mean


def info_nce(
    student: Tensor,
    teacher: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float = 0.07,
    normalize: bool = True,
    gather: bool = False,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """InfoNCE −log( e^{s·t⁺/τ} / (e^{s·t⁺/τ} + Σ_k e^{s·k/τ}) ); row i of the teacher is positive.

    Args:
        student: Queries (N, D).
        teacher: Positives (N, D), row by row.
        negatives: ``None``: the other valid rows of the teacher; (M, D): shared by all queries;
            (N, M, D): each query's own.
        temperature: τ > 0.
        normalize: Scale all vectors to norm 1 first.
        gather: Take the keys of all ranks as negatives too: the other teacher rows, or the shared
            negatives. Gradients flow back to the rank a key came from; with `global_items` the
            average over ranks is the gradient of the whole batch's loss.
        weight: Mask or weights of the queries (N,). Without ``negatives``, rows of zero weight
            are no negatives either.
        num_items: Count of queries to divide by.

    Raises:
        InputError: Shapes do not fit.

    References:
        van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding",
        2018, arXiv:1807.03748, equation 4.

    Example:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> round(info_nce(eye, eye, temperature=1.0).item(), 4)
        0.3133
    """
    if student.dim() != 2 or student.shape != teacher.shape:
        raise InputError(
            f"teacher: positives {tuple(teacher.shape)} do not match the queries "
            f"{tuple(student.shape)}, expected (N, D)"
        )
    if temperature <= 0:
        raise InputError(f"temperature: {temperature} is not positive")
    dtype = compute_dtype(student, teacher)
    s, t = student.to(dtype), teacher.to(dtype)
    if normalize:
        s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    if weight is not None:
        weight = expand_weight(weight, student.shape[:1])
    with torch.autocast(student.device.type, enabled=False):
        if negatives is not None and negatives.dim() == 3:
            return _own_negatives(s, t, negatives, temperature, normalize, weight, num_items).to(
                student.dtype
            )
        if negatives is None:
            keys, labels = _batch_keys(t, weight, gather)
        else:
            s, keys = _shared_keys(s, t, negatives.to(dtype), normalize, gather)
            labels = torch.full_like(s[:, 0], len(keys) - 1, dtype=torch.long)
        loss = fused.linear_divergence(
            s, keys, labels=labels, scale=1 / temperature, weight=weight, num_items=num_items
        )
    return loss.to(student.dtype)


def _batch_keys(teacher: Tensor, weight: Tensor | None, gather: bool) -> tuple[Tensor, Tensor]:
    """Keys (K, D) from the valid rows of the batch, and each row's place among them."""
    if weight is None:
        labels = torch.arange(len(teacher), device=teacher.device)
        keys = teacher
    else:
        keep = weight != 0
        labels = (keep.cumsum(0) - 1).clamp_min(0)
        keys = teacher[keep]
    if not gather:
        return keys, labels
    keys, start = gather_rows(keys)
    return keys, labels + start


def _shared_keys(
    queries: Tensor, positives: Tensor, negatives: Tensor, normalize: bool, gather: bool
) -> tuple[Tensor, Tensor]:
    """Queries and keys with one more axis, on which the last key reads each query's own positive.

    A query's positive is no key of the others. Its score stands in the query's new last number, and
    the last key is the unit vector of that axis.
    """
    if negatives.dim() != 2 or negatives.shape[1] != queries.shape[1]:
        raise InputError(
            f"negatives: shape {tuple(negatives.shape)} fits neither (M, {queries.shape[1]}) nor "
            f"({len(queries)}, M, {queries.shape[1]})"
        )
    if normalize:
        negatives = F.normalize(negatives, dim=-1)
    if gather:
        negatives, _ = gather_rows(negatives)
    score = torch.linalg.vecdot(queries, positives)[:, None]
    last = F.one_hot(torch.tensor([queries.shape[1]], device=queries.device)).to(queries.dtype)
    return torch.cat([queries, score], 1), torch.cat([F.pad(negatives, (0, 1)), last])


def _own_negatives(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float,
    normalize: bool,
    weight: Tensor | None,
    num_items: int | float | Tensor | None,
) -> Tensor:
    """InfoNCE with negatives (N, M, D) that belong to one query each."""
    n, d = queries.shape
    if negatives.shape[0] != n or negatives.shape[2] != d:
        raise InputError(
            f"negatives: shape {tuple(negatives.shape)} fits neither (M, {d}) nor ({n}, M, {d})"
        )
    negatives = negatives.to(queries.dtype)
    if normalize:
        negatives = F.normalize(negatives, dim=-1)
    positive = torch.linalg.vecdot(queries, positives) / temperature
    scores = torch.einsum("nd,nmd->nm", queries, negatives) / temperature
    losses = torch.logaddexp(scores.logsumexp(1), positive) - positive
    return reduce_items(losses, weight, num_items)


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks; the gradient of a rank's rows is the sum of what all ranks give them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts, ctx.rank = counts, dist.get_rank()
        most = max(counts)
        padded = F.pad(rows, (0, 0, 0, most - len(rows)))
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = sum(ctx.counts[: ctx.rank])
        return grad[start : start + ctx.counts[ctx.rank]], None


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all ranks, in the order of the ranks, with gradients back to where they came from.

    Args:
        rows: This rank's rows (n, D); n may differ between ranks.

    Returns:
        All rows, and where this rank's begin. Without ``torch.distributed``, the rows themselves.

    Example:
        >>> import torch
        >>> gather_rows(torch.ones(2, 3))[1]
        0
    """
    if not (dist.is_available() and dist.is_initialized()):
        return rows, 0
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    numbers = [int(count) for count in counts]
    return _GatherRows.apply(rows, numbers), sum(numbers[: dist.get_rank()])


def region_info_nce(
    student: Tensor,
    student_regions: Tensor,
    teacher: Tensor,
    teacher_regions: Tensor,
    num_regions: int,
    *,
    temperature: float = 0.07,
    normalize: bool = False,
    eps: float = 0.0,
    gather: bool = False,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """InfoNCE between the means of matching regions, such as superpixels and superpoints.

    Each region of the student is to find the teacher's mean of the same region among those of all
    regions. Regions that either side lacks are left out; each other counts once, whatever its size.

    Args:
        student: Rows (N, D), such as features of points.
        student_regions: Region of each row (N,); negative for none.
        teacher: Rows (M, D), such as features of pixels.
        teacher_regions: Region of each row (M,); negative for none.
        num_regions: Number of regions.
        temperature: τ > 0.
        normalize: Scale the means to norm 1.
        eps: Added to the row counts before dividing.
        gather: Take the regions of all ranks as negatives too.
        num_items: Count of regions to divide by; default those of both sides.

    Raises:
        InputError: Shapes do not fit.

    References:
        Sautier et al., "Image-to-Lidar Self-Supervised Distillation for Autonomous Driving Data",
        CVPR 2022, arXiv:2203.16258, equation 2.

    Example:
        >>> import torch
        >>> points, pixels = torch.eye(2), torch.eye(2)
        >>> ids = torch.tensor([0, 1])
        >>> round(region_info_nce(points, ids, pixels, ids, 3, temperature=1.0).item(), 4)
        0.3133
    """
    dtype = compute_dtype(student, teacher)
    s, rows_s = segment_mean(student.to(dtype), student_regions, num_regions, eps=eps)
    t, rows_t = segment_mean(teacher.to(dtype), teacher_regions, num_regions, eps=eps)
    loss = info_nce(
        s,
        t,
        temperature=temperature,
        normalize=normalize,
        gather=gather,
        weight=(rows_s > 0) & (rows_t > 0),
        num_items=num_items,
    )
    return loss.to(student.dtype)
