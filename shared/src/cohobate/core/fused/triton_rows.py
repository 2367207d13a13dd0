"""The row stage as one Triton kernel: a program for each row reads it three times.

First pass: normalisers by an online log-sum-exp. Second: the loss, and the row sum the gradient
needs (left out for the forward KL when gradients are wanted). Third: the gradient, written in the
type of the matrix products that follow.
"""

# Triton gives types to its functions itself.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cohobate.core.fused.rows import row_stage
from cohobate.core.fused.spec import Spec
from cohobate.core.losses.divergences import KINDS

_BLOCK = 4096  # classes a program holds at a time
_NUMBERS = {kind: tl.constexpr(number) for number, kind in enumerate(KINDS)}
_FORWARD = _NUMBERS["forward_kl"]
_REVERSE = _NUMBERS["reverse_kl"]
_JEFFREYS = _NUMBERS["jeffreys"]
_JENSEN_SHANNON = _NUMBERS["jensen_shannon"]
_SKEWED = _NUMBERS["skewed_kl"]
_SKEWED_REVERSE = _NUMBERS["skewed_reverse_kl"]
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _activated(z, scale, cap, CAP: tl.constexpr):
    """Logits and the slope of their soft cap."""
    z = z * scale
    slope = tl.full(z.shape, 1.0, tl.float32)
    if CAP:
        bent = 2 * tl.sigmoid(2 * z / cap) - 1
        z = bent * cap
        slope = 1 - bent * bent
    return z, slope


@triton.jit
def _online(z, top, total):
    """Take a block into a running maximum and sum of exponentials."""
    new = tl.maximum(top, tl.max(z, 0))
    return new, total * tl.exp(top - new) + tl.sum(tl.exp(z - new), 0)


@triton.jit
def _pair(p, q, a, b, beta, KIND: tl.constexpr):
    """f(p, q) and q ∂f/∂q, as in `cohobate.core.losses.divergences`."""
    if KIND == _FORWARD:
        f = p * (a - b)
        g = -p
    elif KIND == _REVERSE:
        f = q * (b - a)
        g = f
    elif KIND == _JEFFREYS:
        f = (p - q) * (a - b)
        g = q * (b - a) - p
    elif KIND == _JENSEN_SHANNON:
        log_m = tl.log(tl.maximum(beta * p + (1 - beta) * q, _TINY))
        g = (1 - beta) * q * (b - log_m)
        f = beta * p * (a - log_m) + g
    elif KIND == _SKEWED:
        m = tl.maximum(beta * p + (1 - beta) * q, _TINY)
        f = p * (a - tl.log(m))
        g = (beta - 1) * p * (q / m)
    elif KIND == _SKEWED_REVERSE:
        m = tl.maximum(beta * q + (1 - beta) * p, _TINY)
        f = q * (b - tl.log(m))
        g = f - q * beta * (q / m)
    else:
        f = 0.5 * tl.abs(p - q)
        g = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))
    return f, g


@triton.jit
def _sides(
    z, t_ptr, columns, inside, lse_s, lse_t, inverse_tau, scale_t, cap_t,
    CAP_T: tl.constexpr, PROBABILITIES: tl.constexpr,
):  # fmt: skip
    """Teacher's and student's probabilities and their logarithms for a block of classes."""
    b = z * inverse_tau - lse_s
    q = tl.exp(b)
    if PROBABILITIES:
        p = tl.load(t_ptr + columns, mask=inside, other=1.0).to(tl.float32)
        a = tl.log(tl.maximum(p, _TINY))
    else:
        t = tl.load(t_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        t, _ = _activated(t, scale_t, cap_t, CAP_T)
        a = t * inverse_tau - lse_t
        p = tl.exp(a)
    return p, q, a, b


@triton.jit
def _normalisers(
    z_ptr, t_ptr, classes, inverse_tau, scale_s, cap_s, scale_t, cap_t,
    TEACHER: tl.constexpr, PROBABILITIES: tl.constexpr, LABELS: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First pass: log-sum-exp of student and teacher over τ, and of the student at τ = 1."""
    top_s, sum_s = -float("inf"), 0.0
    top_t, sum_t = -float("inf"), 0.0
    top_z, sum_z = -float("inf"), 0.0
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < classes
        z, _ = _activated(tl.load(z_ptr + columns, mask=inside, other=0.0), scale_s, cap_s, CAP_S)
        if TEACHER:
            s = tl.where(inside, z * inverse_tau, -float("inf"))
            top_s, sum_s = _online(s, top_s, sum_s)
            if not PROBABILITIES:
                t = tl.load(t_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                t, _ = _activated(t, scale_t, cap_t, CAP_T)
                t = tl.where(inside, t * inverse_tau, -float("inf"))
                top_t, sum_t = _online(t, top_t, sum_t)
        if LABELS:
            top_z, sum_z = _online(tl.where(inside, z, -float("inf")), top_z, sum_z)
    lse_t = 0.0 if PROBABILITIES else top_t + tl.log(sum_t)
    return top_s + tl.log(sum_s), lse_t, top_z + tl.log(sum_z)


@triton.jit
def _sums(
    z_ptr, t_ptr, classes, lse_s, lse_t, inverse_tau, beta, scale_s, cap_s, scale_t, cap_t,
    KIND: tl.constexpr, PROBABILITIES: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second pass: the divergence and Σ q ∂f/∂q."""
    value, pulled = 0.0, 0.0
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < classes
        z, _ = _activated(tl.load(z_ptr + columns, mask=inside, other=0.0), scale_s, cap_s, CAP_S)
        p, q, a, b = _sides(
            z, t_ptr, columns, inside, lse_s, lse_t, inverse_tau, scale_t, cap_t,
            CAP_T, PROBABILITIES,
        )  # fmt: skip
        f, g = _pair(p, q, a, b, beta, KIND)
        value += tl.sum(tl.where(inside, f, 0.0), 0)
        pulled += tl.sum(tl.where(inside, g, 0.0), 0)
    return value, pulled


@triton.jit
def _row_kernel(
    z_ptr, t_ptr, out_ptr, coef_ptr, label_ptr, divergence_ptr, ce_ptr,
    classes, z_stride, t_stride, out_stride,
    inverse_tau, factor, ce_weight, beta, scale_s, cap_s, scale_t, cap_t,
    KIND: tl.constexpr, TEACHER: tl.constexpr, PROBABILITIES: tl.constexpr,
    LABELS: tl.constexpr, WANT: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses of a row and, in the third pass, the gradient of its logits."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    t_ptr += row * t_stride
    out_ptr += row * out_stride
    coef = tl.load(coef_ptr + row).to(tl.float32)
    lse_s, lse_t, lse_z = _normalisers(
        z_ptr, t_ptr, classes, inverse_tau, scale_s, cap_s, scale_t, cap_t,
        TEACHER, PROBABILITIES, LABELS, CAP_S, CAP_T, BLOCK,
    )  # fmt: skip
    value, pulled = 0.0, -1.0  # what the forward KL needs before the third pass
    if TEACHER and (KIND != _FORWARD or not WANT):
        value, pulled = _sums(
            z_ptr, t_ptr, classes, lse_s, lse_t, inverse_tau, beta, scale_s, cap_s, scale_t,
            cap_t, KIND, PROBABILITIES, CAP_S, CAP_T, BLOCK,
        )  # fmt: skip
    label = tl.load(label_ptr + row) if LABELS else 0
    if LABELS:
        own, _ = _activated(tl.load(z_ptr + label + tl.arange(0, 1)), scale_s, cap_s, CAP_S)
        tl.store(ce_ptr + row, lse_z - tl.sum(own, 0))
    if WANT:
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < classes
            raw = tl.load(z_ptr + columns, mask=inside, other=0.0)
            z, slope = _activated(raw, scale_s, cap_s, CAP_S)
            grad = tl.zeros([BLOCK], tl.float32)
            if TEACHER:
                p, q, a, b = _sides(
                    z, t_ptr, columns, inside, lse_s, lse_t, inverse_tau, scale_t, cap_t,
                    CAP_T, PROBABILITIES,
                )  # fmt: skip
                f, g = _pair(p, q, a, b, beta, KIND)
                if KIND == _FORWARD:
                    value += tl.sum(tl.where(inside, f, 0.0), 0)
                grad = (g - q * pulled) * (coef * factor * inverse_tau)
            if LABELS:
                one_hot = tl.where(columns == label, 1.0, 0.0)
                grad += (tl.exp(z - lse_z) - one_hot) * (coef * ce_weight)
            grad *= slope * scale_s
            tl.store(out_ptr + columns, grad.to(out_ptr.dtype.element_ty), mask=inside)
    if TEACHER:
        tl.store(divergence_ptr + row, value * factor)


def triton_row_stage(
    raw: Tensor,
    teacher: tuple[Tensor, ...],
    coef: Tensor,
    labels: Tensor | None,
    spec: Spec,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `cohobate.core.fused.rows.row_stage` computes, in one kernel.

    Float64 and teachers given by their top classes take the PyTorch path.
    """
    if raw.dtype == torch.float64 or spec.source == "topk":
        return row_stage(raw, teacher, coef, labels, spec, out)
    n, classes = raw.shape
    divergence, cross_entropy = raw.new_zeros(n), raw.new_zeros(n)
    side = teacher[0] if teacher else raw
    if side.stride(-1) != 1:
        side = side.contiguous()
    target = raw if out is None else out
    _row_kernel[(n,)](
        raw, side, target, coef, coef if labels is None else labels, divergence, cross_entropy,
        classes, raw.stride(0), side.stride(0), target.stride(0),
        1 / spec.tau, spec.factor, spec.ce_weight, spec.beta,
        spec.scales[0], spec.softcaps[0], spec.scales[1], spec.softcaps[1],
        KIND=_NUMBERS[spec.kind], TEACHER=spec.source != "none",
        PROBABILITIES=spec.source == "probabilities", LABELS=labels is not None,
        WANT=out is not None, CAP_S=spec.softcaps[0] > 0, CAP_T=spec.softcaps[1] > 0,
        BLOCK=min(_BLOCK, triton.next_power_of_2(classes)), num_warps=8,
    )  # fmt: skip
    return divergence, cross_entropy
