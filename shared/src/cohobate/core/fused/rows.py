"""The row stage: from raw logits of some tokens to their losses and the gradient of those logits.

It is the reference of the Triton kernel, and on the CPU it walks over blocks of rows that stay in
the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cohobate.core.fused.spec import Spec
from cohobate.core.losses.divergences import f_terms, project_, pull

_CPU_BLOCK = 1 << 16  # logits; about eight float32 blocks of it are alive at a time


def row_stage(
    raw: Tensor,
    teacher: tuple[Tensor, ...],
    coef: Tensor,
    labels: Tensor | None,
    spec: Spec,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Losses of the rows, and their gradient.

    Args:
        raw: Raw student logits (n, V) in the working type; may share memory with ``out``.
        teacher: By source: raw logits (n, V); probabilities (n, V); ids, log-probabilities (n, k)
            and the log of the tail (n,); or nothing.
        coef: Factor of each token in the total loss (n,).
        labels: Class of each token (n,), for the cross-entropy.
        spec: What to compute.
        out: Where the gradient of the total loss with respect to ``raw`` goes (n, V).

    Returns:
        Divergence times its factor, and cross-entropy, both (n,); zeros for what is not asked.
    """
    n, classes = raw.shape
    step = max(1, _CPU_BLOCK // classes) if raw.device.type == "cpu" else max(1, n)
    divergence, cross_entropy = raw.new_zeros(n), raw.new_zeros(n)
    for i in range(0, n, step):
        rows = slice(i, i + step)
        z, slope = spec.activate(raw[rows], 0)
        grad = None
        sides = tuple(t[rows] for t in teacher)
        weight = coef[rows, None]
        if spec.source == "topk":
            values, grad = _topk(z, sides, spec, out is not None)
        elif spec.source != "none":
            values, grad = _dense(z, sides[0], spec, out is not None)
        if spec.source != "none":
            torch.mul(values, spec.factor, out=divergence[rows])
        if grad is not None:
            grad.mul_(weight * (spec.factor / spec.tau))
        if labels is not None:
            cross_entropy[rows], grad = _cross_entropy(z, labels[rows], weight, spec, grad)
        if out is None or grad is None:
            continue
        if slope is not None:
            grad.mul_(slope)
        out[rows] = grad if spec.scales[0] == 1 else grad.mul_(spec.scales[0])
    return divergence, cross_entropy


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over axis 1 and the logarithm of its normaliser (n, 1), by one exponential each."""
    q = z.softmax(1)
    return q, z.amax(1, keepdim=True) - q.amax(1, keepdim=True).log_()


def _dense(z: Tensor, side: Tensor, spec: Spec, want: bool) -> tuple[Tensor, Tensor | None]:
    """Divergence (n,) from a teacher with all classes, and ∂D/∂(z/τ)."""
    b = z if spec.tau == 1 else z / spec.tau
    q, lse_s = _softmax(b)
    if spec.source == "probabilities":
        p = side.to(z.dtype)
        a = p.clamp_min(torch.finfo(p.dtype).tiny).log_()
        lse_t = torch.zeros_like(lse_s)
    else:
        a, _ = spec.activate(side.to(z.dtype), 1)
        a = a if spec.tau == 1 else a / spec.tau
        p, lse_t = _softmax(a)
    if spec.kind == "forward_kl":
        values = torch.linalg.vecdot(p, a - b) - (lse_t - lse_s)[:, 0]
        return values, q.sub_(p) if want else None
    a, b = a - lse_t, b - lse_s
    values = f_terms(spec.kind, p, q, a, b, spec.beta).sum(1)
    return values, project_(pull(spec.kind, p, q, a, b, spec.beta), q) if want else None


def _topk(
    z: Tensor, teacher: tuple[Tensor, ...], spec: Spec, want: bool
) -> tuple[Tensor, Tensor | None]:
    """Divergence (n,) over the teacher's k classes and the bucket of all others, and ∂D/∂(z/τ).

    The gradient of the bucket is shared out by the softmax among its members.
    """
    ids, log_probs, log_tail = teacher
    s = z if spec.tau == 1 else z / spec.tau
    top = s.gather(1, ids)
    others = s.scatter(1, ids, -torch.inf)
    lse = others.logsumexp(1, keepdim=True)
    values, buckets = bucket_terms(top, lse, log_probs, log_tail, spec)
    if not want:
        return values, None
    share = others.sub_(lse).exp_().nan_to_num_(0)  # nan when there is no other class at all
    return values, share.mul_(buckets[:, -1:]).scatter_(1, ids, buckets[:, :-1])


def bucket_terms(
    top: Tensor, lse_others: Tensor, log_probs: Tensor, log_tail: Tensor, spec: Spec
) -> tuple[Tensor, Tensor]:
    """Divergence between two distributions over k classes and the bucket of all others.

    Args:
        top: Student logits over τ of the k classes (n, k).
        lse_others: Log-sum-exp of those of the other classes (n, 1).
        log_probs: The teacher's (n, k).
        log_tail: The teacher's (n,).
        spec: Which divergence.

    Returns:
        Divergence (n,) and its gradient with respect to the k + 1 log-masses (n, k + 1).
    """
    floor = torch.finfo(top.dtype).tiny
    q = torch.cat([top, lse_others], 1).softmax(1).clamp_min_(floor)
    p = torch.cat([log_probs, log_tail[:, None]], 1).to(top.dtype).exp_().clamp_min_(floor)
    a, b = p.log(), q.log()
    values = f_terms(spec.kind, p, q, a, b, spec.beta).sum(1)
    return values, project_(pull(spec.kind, p, q, a, b, spec.beta), q)


def _cross_entropy(
    z: Tensor, labels: Tensor, weight: Tensor, spec: Spec, grad: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy (n,) at temperature 1; its weighted gradient is added to ``grad``."""
    q, lse = _softmax(z)
    column = labels[:, None]
    values = (lse - z.gather(1, column))[:, 0]
    weight = weight * spec.ce_weight
    q.mul_(weight).scatter_add_(1, column, -weight)
    return values, q if grad is None else grad.add_(q)
