"""The registered operators, so that compiled and exported graphs see one node for each call.

``cohobate::linear_divergence`` returns the total loss and has formed the gradients by then; its
backward pass only scales them. ``cohobate::linear_divergence_items`` returns the loss of every
token; its backward pass calls the first, with the incoming gradients as the tokens' factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cohobate.core.fused.chunked import Problem, Result, chunk_size, evaluate, grad_dtype
from cohobate.core.fused.rows import row_stage
from cohobate.core.fused.spec import Spec, working_dtype
from cohobate.core.fused.tiles import evaluate_tiles

_OPERANDS = (
    "(Tensor x, Tensor w, Tensor? bias, Tensor[] teacher, Tensor coef, Tensor? labels, str kind, "
    "str source, float[] constants, int budget, bool triton, bool compact, bool[] wants)"
)


def constants(spec: Spec) -> list[float]:
    """The numbers of a spec, in the order in which the operators take them."""
    return [spec.beta, spec.tau, spec.factor, spec.ce_weight, *spec.scales, *spec.softcaps]


def _evaluate(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    teacher: Sequence[Tensor],
    coef: Tensor,
    labels: Tensor | None,
    kind: Any,
    source: Any,
    numbers: Sequence[float],
    budget: int,
    triton: bool,
    compact: bool,
    wants: Sequence[bool],
) -> tuple[Result, Tensor]:
    """Run the evaluation that fits the budget; also the total of divergence and cross-entropy."""
    beta, tau, factor, ce_weight, *pairs = numbers
    spec = Spec(kind, source, beta, tau, factor, ce_weight, pairs[:2], pairs[2:])
    index = coef.nonzero().squeeze(1) if compact else None
    want_x, want_w, want_bias = wants
    problem = Problem(
        x, w, bias, tuple(teacher), coef, labels, spec, index, (want_x, want_w, want_bias)
    )
    itemsize = working_dtype(x.dtype).itemsize
    chunk = chunk_size(problem.tokens, problem.classes, budget, itemsize)
    with torch.autocast(x.device.type, enabled=False):
        if not chunk:
            result = evaluate_tiles(problem, budget // itemsize)
        elif triton and source != "topk":
            from cohobate.core.fused.triton_rows import triton_row_stage  # not on every platform

            result = evaluate(problem, chunk, triton_row_stage)
        else:
            result = evaluate(problem, chunk, row_stage)
    return result, torch.add(result.divergence, result.cross_entropy, alpha=spec.ce_weight)


def _total(*operands: Any) -> tuple[Tensor, ...]:
    coef = operands[4]
    result, losses = _evaluate(*operands)
    total = torch.where(coef != 0, coef * losses, 0).sum()
    return total, result.divergence, result.cross_entropy, result.x, result.w, result.bias


def _items(*operands: Any) -> Tensor:
    unwanted = (*operands[:-1], (False, False, False))
    return _evaluate(*unwanted)[1]


fused_total = torch.library.custom_op(
    "cohobate::linear_divergence",
    _total,
    mutates_args=(),
    schema=f"{_OPERANDS} -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
fused_items = torch.library.custom_op(
    "cohobate::linear_divergence_items", _items, mutates_args=(), schema=f"{_OPERANDS} -> Tensor"
)


@fused_total.register_fake
def _(x: Tensor, w: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    want_x, want_w, want_bias = operands[-1]
    n, dtype = x.shape[0], working_dtype(x.dtype)
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty(n, dtype=dtype),
        x.new_empty(n, dtype=dtype),
        x.new_empty(x.shape if want_x else 0, dtype=grad_dtype(x.dtype)),
        w.new_empty(w.shape if want_w else 0, dtype=grad_dtype(w.dtype)),
        w.new_empty(w.shape[0] if want_bias else 0, dtype=grad_dtype(w.dtype)),
    )


@fused_items.register_fake
def _(x: Tensor, *operands: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=working_dtype(x.dtype))


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # zeros for the gradients of gradients would be as large
    x, w, _, teacher, *_, ctx.wants = inputs
    ctx.dtypes, ctx.count = (x.dtype, w.dtype, w.dtype), len(teacher)
    ctx.save_for_backward(*output[3:])


def _scale_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    saved = zip(ctx.saved_tensors, ctx.wants, ctx.dtypes, strict=True)
    scaled = [_scaled(tensor, grad, dtype) if want else None for tensor, want, dtype in saved]
    return _as_inputs(scaled, ctx.count)


def _as_inputs(gradients: list[Tensor | None], teachers: int) -> tuple[Any, ...]:
    """Gradients of x, w and bias in the structure of the operator's inputs."""
    return (*gradients, [None] * teachers, *(None,) * 9)


def _scaled(tensor: Tensor, grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if grad is None:
        return None
    if torch.compiler.is_compiling() or tensor.dtype != dtype or _graph_is_kept():
        return (tensor * grad).to(dtype)
    return tensor.mul_(grad)  # a copy of the weight's gradient would raise the peak of memory


def _graph_is_kept() -> bool:
    """Whether the backward pass that is running may come again (``retain_graph``)."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, bias, teacher, _, labels, *options, wants = inputs
    ctx.count, ctx.options, ctx.wants = len(teacher), options, wants
    ctx.save_for_backward(x, w, bias, labels, *teacher)


def _item_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w, bias, labels, *teacher = ctx.saved_tensors
    gradients = fused_total(x, w, bias, teacher, grad, labels, *ctx.options, ctx.wants)[3:]
    dtypes = (x.dtype, w.dtype, w.dtype)
    kept = [
        tensor.to(dtype) if want else None
        for tensor, want, dtype in zip(gradients, ctx.wants, dtypes, strict=True)
    ]
    return _as_inputs(kept, ctx.count)


fused_total.register_autograd(_scale_gradients, setup_context=_keep_gradients)
fused_items.register_autograd(_item_gradients, setup_context=_keep_operands)
