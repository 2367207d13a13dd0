"""Divergences between the softmax of two sets of logits: formulas and their evaluation in blocks.

With a = log softmax(z_t/T) and b = log softmax(z_s/T), p = exp(a), q = exp(b), every divergence is
a sum over classes of f(p, q). Its gradients follow from g_q = q ∂f/∂q and g_p = p ∂f/∂p:

    ∂D/∂z_s = (g_q − q Σ g_q) / T,        ∂D/∂z_t = (g_p − p Σ g_p) / T.

The evaluation walks over blocks that fit the processor's cache and keeps nothing but its inputs
for the backward pass, so that a map of millions of voxels costs no full-size temporary besides the
gradients themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.core.errors import InputError
from cohobate.core.losses.reduce import Reduction, compute_dtype, expand_weight, reduce_items

Kind = Literal[
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jensen_shannon",
    "skewed_kl",
    "skewed_reverse_kl",
    "total_variation",
]
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]

_CPU_BLOCK = 1 << 17  # elements; the few float32 blocks alive at a time stay in the cache
_NARROW = 32  # classes; reductions over a shorter innermost axis do not vectorise


def check_kind(kind: str, beta: float) -> None:
    """Refuse an unknown divergence or a mixing weight outside its range.

    Raises:
        InputError: Unknown ``kind``; ``beta`` outside (0, 1), or [0, 1) for a skewed divergence.
    """
    if kind not in KINDS:
        raise InputError(f"kind: unknown divergence {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "jensen_shannon" and not 0 < beta < 1:
        raise InputError(
            f"beta: {beta} is outside (0, 1); the limits are forward_kl (0) and reverse_kl (1)"
        )
    if kind.startswith("skewed") and not 0 <= beta < 1:
        raise InputError(f"alpha: {beta} is outside [0, 1)")


def _mix(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """βp + (1−β)q, kept positive where both underflow (every use has p or q as a factor)."""
    return (p * beta).add_(q, alpha=1 - beta).clamp_min_(torch.finfo(p.dtype).tiny)


def f_terms(kind: Kind, p: Tensor, q: Tensor, a: Tensor, b: Tensor, beta: float) -> Tensor:
    """f(p, q) of every class, from the probabilities and their logarithms."""
    if kind == "forward_kl":
        return p * (a - b)
    if kind == "reverse_kl":
        return q * (b - a)
    if kind == "jeffreys":
        return (p - q) * (a - b)
    if kind == "total_variation":
        return 0.5 * (p - q).abs()
    if kind == "skewed_kl":
        return p * (a - _mix(p, q, beta).log())
    if kind == "skewed_reverse_kl":
        return q * (b - _mix(q, p, beta).log())
    log_m = _mix(p, q, beta).log()
    return beta * p * (a - log_m) + (1 - beta) * q * (b - log_m)


def pull(kind: Kind, p: Tensor, q: Tensor, a: Tensor, b: Tensor, beta: float) -> Tensor:
    """The product q ∂f/∂q up to a multiple of q, which the projection onto the softmax removes.

    For the same reason the Kullback–Leibler kinds accept logits for the logarithms ``a`` and ``b``.
    """
    if kind == "forward_kl":
        return -p
    if kind == "reverse_kl":
        return (b - a).mul_(q)
    if kind == "jeffreys":
        return (b - a).mul_(q).sub_(p)
    if kind == "total_variation":
        return (q - p).sign_().mul_(q).mul_(0.5)
    if kind == "skewed_kl":
        return (p * q).div_(_mix(p, q, beta)).mul_(beta - 1)
    if kind == "skewed_reverse_kl":
        mix = _mix(q, p, beta)
        return (b - mix.log()).addcdiv_(q, mix, value=-beta).mul_(q)
    return (b - _mix(p, q, beta).log_()).mul_(q).mul_(1 - beta)


def terms(kind: Kind, z_s: Tensor, z_t: Tensor, dim: int, beta: float) -> Tensor:
    """f(p, q) of every class; ``z_s`` and ``z_t`` are logits already divided by the temperature."""
    b, a = z_s.log_softmax(dim), z_t.log_softmax(dim)
    q = b if kind == "forward_kl" else z_s.softmax(dim)  # not used there
    p = a if kind == "reverse_kl" else z_t.softmax(dim)
    return f_terms(kind, p, q, a, b, beta)


def project_(pulled: Tensor, q: Tensor) -> Tensor:
    """Turn q ∂f/∂q into ∂D/∂z over axis 1, in place."""
    return pulled.addcmul_(q, pulled.sum(1, keepdim=True), value=-1)


# The same divergence with student and teacher exchanged, and the mixing weight that goes with it.
_SWAPPED: dict[Kind, Kind] = {
    "forward_kl": "reverse_kl",
    "reverse_kl": "forward_kl",
    "jeffreys": "jeffreys",
    "jensen_shannon": "jensen_shannon",
    "skewed_kl": "skewed_reverse_kl",
    "skewed_reverse_kl": "skewed_kl",
    "total_variation": "total_variation",
}


def gradients(
    kind: Kind, z_s: Tensor, z_t: Tensor, beta: float, student: bool, teacher: bool
) -> tuple[Tensor | None, Tensor | None]:
    """∂D/∂z_s and ∂D/∂z_t over axis 1 of logits divided by T; ``None`` where not wanted."""
    q, p = z_s.softmax(1), z_t.softmax(1)
    a, b = z_t, z_s
    if kind not in ("forward_kl", "reverse_kl", "jeffreys", "total_variation"):
        a, b = z_t.log_softmax(1), z_s.log_softmax(1)
    d_s = d_t = None
    if teacher:
        swapped = 1 - beta if kind == "jensen_shannon" else beta
        d_t = project_(pull(_SWAPPED[kind], q, p, b, a, swapped), p)
    if student and kind == "forward_kl":
        d_s = q.sub_(p)
    elif student:
        d_s = project_(pull(kind, p, q, a, b, beta), q)
    return d_s, d_t


def _as_maps(z: Tensor, class_dim: int, rows: bool) -> Tensor:
    """View logits as (outer, C, inner); rows of contiguous classes become (1, C, items)."""
    if rows:
        return z.movedim(class_dim, -1).reshape(1, -1, z.shape[class_dim]).transpose(1, 2)
    outer = z.shape[:class_dim].numel()
    return z.reshape(outer, z.shape[class_dim], -1)


def _from_maps(maps: Tensor, shape: torch.Size, class_dim: int, rows: bool) -> Tensor:
    """Undo ``_as_maps``."""
    if not rows:
        return maps.reshape(shape)
    moved = shape[:class_dim] + shape[class_dim + 1 :] + shape[class_dim : class_dim + 1]
    return maps.transpose(1, 2).reshape(moved).movedim(-1, class_dim)


def _blocks(maps: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the outer and the inner axis whose blocks fit the cache; all at once on a GPU."""
    outer, classes, inner = maps.shape
    items = max(1, (_CPU_BLOCK if maps.device.type == "cpu" else maps.numel()) // max(1, classes))
    step = max(1, items // max(1, inner))
    for i in range(0, outer, step):
        for j in range(0, inner, items):
            yield slice(i, i + step), slice(j, j + items)


def _load(maps: Tensor, where: tuple[slice, slice], scale: float, dtype: torch.dtype) -> Tensor:
    """One block times ``scale`` in the computing type, laid out so that reductions vectorise."""
    block = maps[where[0], :, where[1]].to(dtype)
    if scale != 1:
        block = block * scale
    return block.contiguous() if block.shape[1] < _NARROW else block


class _Divergence(torch.autograd.Function):
    """Divergence of every item; recomputes the softmax block by block in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        kind: Kind,
        beta: float,
        scale: float,
        masked: bool,
        class_dim: int,
    ) -> Tensor:
        rows = student.movedim(class_dim, -1).is_contiguous()
        dtype = compute_dtype(student, teacher)
        s, t = _as_maps(student, class_dim, rows), _as_maps(teacher, class_dim, rows)
        values = torch.empty(s.shape[0], s.shape[2], dtype=dtype, device=s.device)
        for where in _blocks(s):
            z_s, z_t = _load(s, where, scale, dtype), _load(t, where, scale, dtype)
            torch.sum(terms(kind, z_s, z_t, 1, beta), 1, out=values[where])
        ctx.save_for_backward(student, teacher)
        ctx.options = (kind, beta, scale, masked, class_dim, rows, dtype)
        return values.reshape(student.shape[:class_dim] + student.shape[class_dim + 1 :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        kind, beta, scale, masked, class_dim, rows, dtype = ctx.options
        wants = ctx.needs_input_grad[:2]
        s, t = _as_maps(student, class_dim, rows), _as_maps(teacher, class_dim, rows)
        g = grad.reshape(s.shape[0], s.shape[2])
        outs = [
            torch.empty_like(m) if want else None for m, want in zip((s, t), wants, strict=True)
        ]
        for where in _blocks(s):
            z_s, z_t = _load(s, where, scale, dtype), _load(t, where, scale, dtype)
            factor = g[where].unsqueeze(1) * scale
            pair = gradients(kind, z_s, z_t, beta, *wants)
            for out, d in zip(outs, pair, strict=True):
                if out is None or d is None:
                    continue
                d.mul_(factor)
                if masked:  # a logit that is not finite must not leave its item
                    d.masked_fill_(factor == 0, 0)
                out[where[0], :, where[1]] = d
        d_s, d_t = (
            None if out is None else _from_maps(out, student.shape, class_dim, rows) for out in outs
        )
        return d_s, d_t, None, None, None, None, None


def item_divergence(
    student: Tensor,
    teacher: Tensor,
    kind: Kind,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    class_dim: int = 1,
    keep: Tensor | None = None,
) -> Tensor:
    """Divergence of every item, unreduced and without T²; gradients flow to both arguments.

    Args:
        student: Logits with the classes on axis ``class_dim``.
        teacher: Logits of the same shape.
        kind: Which divergence.
        beta: Mixing weight of Jensen–Shannon and of the skewed divergences.
        temperature: T > 0, divides the logits.
        class_dim: Axis of the classes.
        keep: Mask of the items that count; the others may hold values that are not finite.

    Returns:
        A tensor of the student's shape without the class axis, float32 (float64 for float64).

    Raises:
        InputError: Shapes differ, or an option is out of its range.
    """
    check_kind(kind, beta)
    if student.shape != teacher.shape:
        raise InputError(
            f"teacher: logits {tuple(teacher.shape)} do not match the student's "
            f"{tuple(student.shape)}"
        )
    if not -student.dim() <= class_dim < student.dim():
        raise InputError(f"class_dim: {class_dim} is no axis of logits {tuple(student.shape)}")
    if temperature <= 0:
        raise InputError(f"temperature: {temperature} is not positive")
    class_dim %= student.dim()
    if torch.compiler.is_compiling():  # the compiler fuses the formula itself
        dtype = compute_dtype(student, teacher)
        z_s, z_t = student.to(dtype) / temperature, teacher.to(dtype) / temperature
        if keep is not None:
            keep = keep.unsqueeze(class_dim)
            z_s, z_t = torch.where(keep, z_s, 0), torch.where(keep, z_t, 0)
        return terms(kind, z_s, z_t, class_dim, beta).sum(class_dim)
    return _Divergence.apply(
        student, teacher, kind, beta, 1 / temperature, keep is not None, class_dim
    )


def divergence(
    student: Tensor,
    teacher: Tensor,
    kind: Kind,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    t_squared: bool = True,
    class_dim: int = 1,
    weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """A divergence chosen by name; see ``cohobate.core.losses.kl`` for each of them.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(divergence(s, t, "jensen_shannon").item(), 4)
        0.0285
    """
    if weight is not None and -student.dim() <= class_dim < student.dim():
        items = list(student.shape)
        del items[class_dim]
        weight = expand_weight(weight, torch.Size(items))
    losses = item_divergence(
        student,
        teacher,
        kind,
        beta=beta,
        temperature=temperature,
        class_dim=class_dim,
        keep=None if weight is None else weight != 0,
    )
    if t_squared and temperature != 1:
        losses = losses * temperature**2
    return reduce_items(losses, weight, num_items, dtype=student.dtype, reduction=reduction)
