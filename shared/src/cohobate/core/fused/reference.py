"""The definition: whole logits and autograd. Slow and large; what the other backends must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.core.fused.spec import Spec, working_dtype
from cohobate.core.losses.divergences import f_terms


def reference_items(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    teacher: tuple[Tensor, ...],
    labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """Divergence times its factor and cross-entropy of every token, both (N,), differentiable.

    Arguments are those of `cohobate.core.fused.chunked.Problem`.
    """
    dtype = working_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        raw = F.linear(x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype))
        z, _ = spec.activate(raw, 0)
        zero = z.new_zeros(len(z))
        divergence = zero if spec.source == "none" else _divergence(z / spec.tau, teacher, spec)
        cross_entropy = zero if labels is None else F.cross_entropy(z, labels, reduction="none")
    return divergence * spec.factor, cross_entropy


def _divergence(z: Tensor, teacher: tuple[Tensor, ...], spec: Spec) -> Tensor:
    b = z.log_softmax(1)
    if spec.source == "topk":
        ids, log_probs, log_tail = teacher
        others = b.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        b = torch.cat([b.gather(1, ids), others], 1)
        a = torch.cat([log_probs, log_tail[:, None]], 1).to(z.dtype)
    elif spec.source == "probabilities":
        a = teacher[0].to(z.dtype).log()
    else:
        raw = teacher[0].to(z.dtype)
        if spec.source == "hidden":
            raw = F.linear(raw, *(t.to(z.dtype) for t in teacher[1:]))
        a = (spec.activate(raw, 1)[0] / spec.tau).log_softmax(1)
    floor = torch.finfo(z.dtype).tiny
    p, q = a.exp().clamp_min(floor), b.exp().clamp_min(floor)
    return f_terms(spec.kind, p, q, p.log(), q.log(), spec.beta).sum(1)
