"""`linear_divergence`: a linear layer and a divergence in one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.fused.operator import constants, fused_items, fused_total
from cohobate.core.fused.reference import reference_items
from cohobate.core.fused.spec import Probabilities, Source, Spec, TopK, working_dtype
from cohobate.core.losses.divergences import Kind, check_kind
from cohobate.core.losses.reduce import Reduction, expand_weight, reduce_items
from cohobate.core.losses.soft_targets import labelled

Backend = Literal["auto", "reference", "chunked", "triton"]
Pair = tuple[float, float]

CPU_BUDGET = 32 << 20
CUDA_BUDGET = 256 << 20


def linear_divergence(
    x_s: Tensor,
    w_s: Tensor,
    x_t: Tensor | Probabilities | TopK | None = None,
    w_t: Tensor | None = None,
    *,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    tau: float = 1.0,
    t_squared: bool = True,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    reduction: Reduction = "mean",
    labels: Tensor | None = None,
    ce_weight: float = 1.0,
    ignore_index: int = -100,
    softcap: float | tuple[float | None, float | None] | None = None,
    scale: float | Pair = 1.0,
    bias_s: Tensor | None = None,
    bias_t: Tensor | None = None,
    num_classes: int | None = None,
    budget: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Divergence between the softmax outputs of two linear heads, without their full logits.

    With logits z = softcap(scale · (x wᵀ + bias)), p = softmax(z_t/τ) and q = softmax(z_s/τ), the
    loss of a token is τ² D(p, q) + ce_weight · CE(z_s, label). Gradients flow to ``x_s``, ``w_s``
    and ``bias_s``, and are formed in the forward pass; the teacher is a constant.

    Args:
        x_s: Student's hidden states (..., H_s).
        w_s: Student's head (V, H_s). Its gradient is skipped when it does not require one.
        x_t: The teacher: hidden states (..., H_t) with ``w_t``; without it logits (..., V);
            `Probabilities`; `TopK`; or ``None`` for the cross-entropy alone.
        w_t: Teacher's head (V, H_t).
        kind: Which divergence (see `cohobate.core.losses.kl`).
        beta: Mixing weight of Jensen–Shannon; α of the skewed divergences.
        tau: Temperature τ > 0 of the divergence; the cross-entropy has temperature 1.
        t_squared: Whether the divergence is multiplied by τ².
        weight: Mask or weights that broadcast to the tokens (...). Tokens of weight zero are left
            out before anything is computed.
        num_items: What the weighted sum is divided by; default is the number of non-zero weights.
        reduction: ``"none"`` gives the weighted loss of every token; the backward pass then
            computes the logits again.
        labels: Classes of the tokens (...), for the cross-entropy.
        ce_weight: Weight of the cross-entropy when there are labels.
        ignore_index: Tokens of this label are left out altogether.
        softcap: Logits are bent to cap · tanh(logits / cap); a pair for (student, teacher).
        scale: Logits are multiplied by it; a pair for (student, teacher).
        bias_s: Student's bias (V,).
        bias_t: Teacher's bias (V,).
        num_classes: Cut both vocabularies to their first ``num_classes`` classes before the
            softmax, for heads that differ by padding.
        budget: Bytes for the float32 logits of one model at a time; default 32 MiB on the CPU and
            256 MiB on CUDA. Beyond the gradients, memory is twice that.
        backend: ``"reference"`` holds all logits; ``"chunked"`` is PyTorch; ``"triton"`` needs CUDA
            (or Triton's interpreter) and is what ``"auto"`` takes there; elsewhere ``"auto"`` takes
            ``"chunked"``.

    Returns:
        A scalar, or (...) for ``reduction="none"``, in the type of ``x_s``.

    Raises:
        InputError: Shapes, types or options do not fit; the message names the argument.

    References:
        Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024,
        arXiv:2410.10989, section 3.2 (gradients formed chunk by chunk in the forward pass).

    Example:
        >>> import torch
        >>> x, head = torch.tensor([[1.0]]), torch.tensor([[0.0], [0.0]])
        >>> teacher_head = torch.tensor([[0.0], [1.0]])
        >>> round(linear_divergence(x, head, x, teacher_head).item(), 4)
        0.1109
    """
    check_kind(kind, beta)
    if tau <= 0:
        raise InputError(f"tau: {tau} is not positive")
    tokens = x_s.shape[:-1]
    x, w, bias = _student(x_s, w_s, bias_s, num_classes)
    source, teacher = _teacher(x_t, w_t, bias_t, num_classes, tokens, w.shape[0], x.dtype)
    if labels is not None:
        if labels.shape != tokens:
            raise InputError(f"labels: {tuple(labels.shape)} do not fit tokens {tuple(tokens)}")
        weight = labelled(labels, weight, ignore_index)
        # tokens that are left out need some class that exists
        labels = torch.where(labels == ignore_index, 0, labels).reshape(-1).long()
    elif source == "none":
        raise InputError("x_t: neither a teacher nor labels are given")
    spec = Spec(
        kind=kind,
        source=source,
        beta=beta,
        tau=tau,
        factor=tau**2 if t_squared else 1.0,
        ce_weight=ce_weight,
        scales=scale if isinstance(scale, tuple) else (scale, scale),
        softcaps=_caps(softcap),
    )
    if weight is not None:
        weight = expand_weight(weight, tokens).reshape(-1)
    operands = (x, w, bias, teacher)
    if backend == "reference":
        loss = _reference(operands, weight, num_items, reduction, labels, spec)
    else:
        budget = budget or (CUDA_BUDGET if x.is_cuda else CPU_BUDGET)
        triton = backend == "triton" or (backend == "auto" and x.is_cuda)
        loss = _fused(operands, weight, num_items, reduction, labels, spec, budget, triton)
    loss = loss.to(x_s.dtype)
    return loss.view(tokens) if reduction == "none" else loss


Operands = tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]


def _reference(
    operands: Operands,
    weight: Tensor | None,
    num_items: int | float | Tensor | None,
    reduction: Reduction,
    labels: Tensor | None,
    spec: Spec,
) -> Tensor:
    x, w, bias, teacher = operands
    if weight is not None:
        on = weight != 0
        x = torch.where(on[:, None], x, 0)
        if spec.source != "topk":
            first, *rest = teacher or (x,)
            teacher = (torch.where(on[:, None], first, 0), *rest) if teacher else ()
    divergence, cross_entropy = reference_items(x, w, bias, teacher, labels, spec)
    losses = divergence + spec.ce_weight * cross_entropy
    return reduce_items(losses, weight, num_items, reduction=reduction)


def _fused(
    operands: Operands,
    weight: Tensor | None,
    num_items: int | float | Tensor | None,
    reduction: Reduction,
    labels: Tensor | None,
    spec: Spec,
    budget: int,
    triton: bool,
) -> Tensor:
    x, w, bias, teacher = operands
    grad = torch.is_grad_enabled()
    wants = [grad and t is not None and t.requires_grad for t in (x, w, bias)]
    ones = x.new_ones(len(x), dtype=working_dtype(x.dtype))
    options: tuple[Any, ...] = (labels, spec.kind, spec.source, constants(spec), budget, triton)
    if reduction == "none":
        keep = ones if weight is None else ones * (weight != 0)
        losses = fused_items(x, w, bias, teacher, keep, *options, weight is not None, wants)
        return reduce_items(losses, weight, num_items, reduction=reduction)
    if weight is not None and weight.requires_grad:
        raise InputError("weight: requires a gradient, which only reduction='none' can give")
    # the factor of each token: the reduction of a vector of ones, unsummed
    coef = ones if weight is None else ones * weight
    if num_items is None:
        num_items = len(ones) if weight is None else (weight != 0).sum()
    if isinstance(num_items, Tensor):
        coef = coef / torch.where(num_items == 0, 1, num_items)
    else:
        coef = coef / (num_items or 1)
    return fused_total(x, w, bias, teacher, coef, *options, weight is not None, wants)[0]


def _student(
    x: Tensor, w: Tensor, bias: Tensor | None, num_classes: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Student's operands with tokens flattened, cut and in the type autocast asks for."""
    x, w, bias = _cast(x, w, bias)
    _check_head("s", x, w, bias, num_classes)
    if num_classes is not None:
        w, bias = w[:num_classes], None if bias is None else bias[:num_classes]
    return x.reshape(-1, x.shape[-1]), w, bias


def _teacher(
    x: Tensor | Probabilities | TopK | None,
    w: Tensor | None,
    bias: Tensor | None,
    num_classes: int | None,
    tokens: torch.Size,
    classes: int,
    dtype: torch.dtype,
) -> tuple[Source, tuple[Tensor, ...]]:
    """Kind of teacher and its tensors with tokens flattened."""
    if x is None:
        return "none", ()
    given = tuple(x) if isinstance(x, tuple) else (x,)
    if any(t.requires_grad for t in (*given, *(t for t in (w, bias) if t is not None))):
        raise InputError("x_t, w_t, bias_t: the teacher gets no gradient here, detach it")
    if any(t.shape[: len(tokens)] != tokens for t in given):
        raise InputError(
            f"x_t: tokens {[tuple(t.shape) for t in given]} do not match the student's "
            f"{tuple(tokens)}"
        )
    flat = [t.reshape(-1, *t.shape[len(tokens) :]) for t in given]
    if isinstance(x, TopK):
        ids, log_probs, log_tail = flat
        if ids.dim() != 2 or ids.shape != log_probs.shape or log_tail.dim() != 1:
            raise InputError(
                "x_t: a TopK teacher needs ids (..., k), log_probs (..., k) and log_tail (...), "
                f"got {[tuple(t.shape) for t in given]}"
            )
        return "topk", (ids.long(), log_probs, log_tail)
    values = flat[0]
    if w is not None and not isinstance(x, Probabilities):
        values, w, bias = _cast(values, w, bias)
        _check_head("t", values, w, bias, num_classes)
        if num_classes is not None:
            w, bias = w[:num_classes], None if bias is None else bias[:num_classes]
        if w.shape[0] != classes:
            raise InputError(
                f"w_t: {w.shape[0]} classes, the student has {classes}; "
                "num_classes cuts both to their shared ones"
            )
        return "hidden", (values, w) if bias is None else (values, w, bias)
    if isinstance(x, Probabilities):
        if values.shape[-1] != classes:
            raise InputError(f"x_t: {values.shape[-1]} probabilities, the student has {classes}")
        return "probabilities", (values,)
    values = values if num_classes is None else values[:, :num_classes]
    if values.shape[-1] != classes:
        raise InputError(
            f"x_t: {values.shape[-1]} logits, the student has {classes} classes; "
            "num_classes cuts both to their shared ones"
        )
    return "logits", (values,)


def _cast(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does to the operands of a linear layer."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, w, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)


def _check_head(
    side: str, x: Tensor, w: Tensor, bias: Tensor | None, num_classes: int | None
) -> None:
    """Refuse a head that does not fit its hidden states."""
    if w.dim() != 2 or w.shape[1] != x.shape[-1]:
        raise InputError(
            f"w_{side}: {tuple(w.shape)} does not fit hidden states of width {x.shape[-1]}"
        )
    if x.dtype != w.dtype:
        raise InputError(f"w_{side}: {w.dtype} does not match x_{side} of {x.dtype}")
    if bias is not None and bias.shape != w.shape[:1]:
        raise InputError(f"bias_{side}: {tuple(bias.shape)} does not fit {w.shape[0]} classes")
    if num_classes is not None and not 0 < num_classes <= w.shape[0]:
        raise InputError(f"num_classes: {num_classes}, w_{side} has {w.shape[0]} classes")


def _caps(softcap: float | tuple[float | None, float | None] | None) -> tuple[float, float]:
    """Caps of student and teacher, 0 for none."""
    student, teacher = softcap if isinstance(softcap, tuple) else (softcap, softcap)
    if any(cap is not None and cap <= 0 for cap in (student, teacher)):
        raise InputError(f"softcap: {softcap} is not positive")
    return student or 0.0, teacher or 0.0
