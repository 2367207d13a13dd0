"""The row stage: from raw logits of some tokens to their losses and the gradient of those logits.

It is the reference of the Triton kernel. It walks over blocks of rows, so that its temporaries are
small and, on the CPU, stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cohobate.core.fused.spec import Spec
from cohobate.core.losses.divergences import f_terms, project_, pull

_CPU_BLOCK = 1 << 17  # logits of a block of rows, which stays in the processor's cache
_GPU_BLOCK = 1 << 22  # large enough that launching kernels costs little


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
    divergence, cross_entropy = raw.new_zeros(len(raw)), raw.new_zeros(len(raw))
    for rows in blocks(raw):
        z, slope = spec.activate(raw[rows], 0)
        sides, weight = tuple(t[rows] for t in teacher), coef[rows, None]
        softmax: Softmax | None = None
        grad: Tensor | None = None
        if spec.source != "none":
            s = z if spec.tau == 1 else z / spec.tau
            if spec.source == "topk":
                values, grad = _topk(s, sides, spec)
            else:
                softmax = _softmax(s)
                values, grad = _dense(s, softmax, sides[0], spec)
            torch.mul(values, spec.factor, out=divergence[rows])
            grad.mul_(weight * (spec.factor / spec.tau))
        if labels is not None:
            if softmax is None or spec.tau != 1:
                softmax = _softmax(z)
            column, share = labels[rows, None], weight * spec.ce_weight
            cross_entropy[rows] = (softmax[1] - z.gather(1, column))[:, 0]
            pulled = softmax[0].mul_(share).scatter_add_(1, column, -share)
            grad = pulled if grad is None else grad.add_(pulled)
        if out is not None and grad is not None:
            if slope is not None:
                grad.mul_(slope)
            torch.mul(grad, spec.scales[0], out=out[rows])
    return divergence, cross_entropy


def blocks(logits: Tensor) -> Iterator[slice]:
    """Blocks of rows of ``logits`` (n, V); about eight arrays of a block's size live at a time."""
    n, classes = logits.shape
    step = max(1, (_CPU_BLOCK if logits.device.type == "cpu" else _GPU_BLOCK) // max(1, classes))
    for i in range(0, n, step):
        yield slice(i, min(i + step, n))


Softmax = tuple[Tensor, Tensor]


def _softmax(z: Tensor) -> Softmax:
    """Softmax over axis 1 and the logarithm of its normaliser (n, 1), by one exponential each."""
    q = z.softmax(1)
    return q, z.amax(1, keepdim=True) - q.amax(1, keepdim=True).log_()


def _dense(b: Tensor, softmax: Softmax, side: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Divergence (n,) from a teacher with all classes, and its gradient ∂D/∂b.

    Args:
        b: Student logits over τ (n, V).
        softmax: Their softmax and log-normaliser.
        side: The teacher's raw logits or probabilities (n, V).
        spec: What to compute.
    """
    q, lse_s = softmax
    if spec.source == "probabilities":
        p = side.to(b.dtype)
        a = p.clamp_min(torch.finfo(p.dtype).tiny).log_()
        lse_t = torch.zeros_like(lse_s)
    else:
        a, _ = spec.activate(side.to(b.dtype), 1)
        a = a if spec.tau == 1 else a / spec.tau
        p, lse_t = _softmax(a)
    if spec.kind == "forward_kl":
        return torch.linalg.vecdot(p, a - b) - (lse_t - lse_s)[:, 0], q - p
    a, b = a - lse_t, b - lse_s
    if spec.kind == "jensen_shannon":  # its two parts share the logarithm of the mixture
        log_m = (p * spec.beta).add_(q, alpha=1 - spec.beta)
        log_m = log_m.clamp_min_(torch.finfo(p.dtype).tiny).log_()
        pulled = b.sub_(log_m).mul_(q).mul_(1 - spec.beta)
        values = torch.linalg.vecdot(p, a.sub_(log_m)).mul_(spec.beta).add_(pulled.sum(1))
    else:
        values = f_terms(spec.kind, p, q, a, b, spec.beta).sum(1)
        pulled = pull(spec.kind, p, q, a, b, spec.beta)
    return values, project_(pulled, q)


def _topk(s: Tensor, teacher: tuple[Tensor, ...], spec: Spec) -> tuple[Tensor, Tensor]:
    """Divergence (n,) over the teacher's k classes and the bucket of all others, and ∂D/∂s.

    The gradient of the bucket is shared out by the softmax among its members.
    """
    ids, log_probs, log_tail = teacher
    others = s.scatter(1, ids, -torch.inf)
    lse = others.logsumexp(1, keepdim=True)
    values, buckets = bucket_terms(s.gather(1, ids), lse, log_probs, log_tail, spec)
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
