"""Contrastive losses between student and teacher embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.losses.reduce import compute_dtype, expand_weight, reduce_items


def info_nce(
    student: Tensor,
    teacher: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float = 0.07,
    normalize: bool = True,
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
        positive = torch.linalg.vecdot(s, t) / temperature
        if negatives is None:
            scores = s @ t.mT / temperature
            if weight is not None:
                scores = scores.masked_fill(weight == 0, -torch.inf)
                # a row that does not count keeps a finite score, whatever its gradient is worth
                scores = torch.where((weight != 0)[:, None], scores, 0)
            losses = scores.logsumexp(1) - positive
        else:
            scores = _negative_scores(s, negatives.to(dtype), normalize) / temperature
            losses = torch.logaddexp(scores.logsumexp(1), positive) - positive
    return reduce_items(losses, weight, num_items, dtype=student.dtype)


def _negative_scores(queries: Tensor, negatives: Tensor, normalize: bool) -> Tensor:
    """Inner products (N, M) with shared (M, D) or own (N, M, D) negatives."""
    n, d = queries.shape
    own = negatives.dim() == 3
    if negatives.dim() not in (2, 3) or negatives.shape[-1] != d or (own and len(negatives) != n):
        raise InputError(
            f"negatives: shape {tuple(negatives.shape)} fits neither (M, {d}) nor ({n}, M, {d})"
        )
    if normalize:
        negatives = F.normalize(negatives, dim=-1)
    return torch.einsum("nd,nmd->nm" if own else "nd,md->nm", queries, negatives)
