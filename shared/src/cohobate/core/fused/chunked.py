"""The fused evaluation: chunks of tokens, gradients formed in the forward pass.

A chunk of tokens is projected on all classes, its rows become losses and, in place, the gradient of
their logits, and two more products turn that into the gradients of hidden states and weight. Each
of the four products is done once, and one chunk of student and teacher logits exists at a time:

    memory beyond the gradients = 2 · chunk · V · 4 bytes   (float32)

On CUDA with 16-bit operands the gradient of the logits is kept in their type for a group of
chunks, because the group is the inner dimension of the weight gradient's product and a product with
a short inner dimension is bound by memory: ``group · V · 2`` bytes more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cohobate.core.fused.matmul import add_weight_grad, input_grad, project
from cohobate.core.fused.rows import row_stage
from cohobate.core.fused.spec import Spec, low_precision, working_dtype

_GROUP = 2048  # tokens in the weight gradient's product when its operands have 16 bits
_SMALLEST_CHUNK = 64  # below it the products are slower than projecting twice (see tiles.py)

RowStage = Callable[
    [Tensor, tuple[Tensor, ...], Tensor, Tensor | None, Spec, Tensor | None],
    tuple[Tensor, Tensor],
]


@dataclass
class Problem:
    """The operands of one call, tokens flattened.

    Attributes:
        x: Student's hidden states (N, H_s).
        w: Student's weight (V, H_s).
        bias: Student's bias (V,) or ``None``.
        teacher: By source: x_t (N, H_t), w_t (V, H_t) and perhaps its bias (V,); logits (N, V);
            probabilities (N, V); ids, log-probabilities (N, k) and log tail (N,); or nothing.
        coef: Factor of each token in the total loss (N,).
        labels: Classes (N,) or ``None``.
        spec: The constants.
        index: Tokens that count, or ``None`` for all.
        wants: Which gradients to form: hidden states, weight, bias.
    """

    x: Tensor
    w: Tensor
    bias: Tensor | None
    teacher: tuple[Tensor, ...]
    coef: Tensor
    labels: Tensor | None
    spec: Spec
    index: Tensor | None
    wants: tuple[bool, bool, bool]

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return len(self.x if self.index is None else self.index)

    @property
    def classes(self) -> int:
        """V."""
        return self.w.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Type of logits and sums."""
        return working_dtype(self.x.dtype)

    def take(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """The rows of ``tensor`` that belong to counting tokens ``start`` to ``stop``."""
        if self.index is None:
            return tensor[start:stop]
        return tensor.index_select(0, self.index[start:stop])

    def put(self, tensor: Tensor, start: int, stop: int, rows: Tensor) -> None:
        """Write such rows."""
        if self.index is None:
            tensor[start:stop] = rows
        else:
            tensor.index_copy_(0, self.index[start:stop], rows.to(tensor.dtype))


@dataclass
class Result:
    """Losses of all tokens and the gradients of their weighted sum; unwanted ones are empty.

    Gradients have the operands' type, except float32 for float16, whose range is too small before
    the loss scale is applied.
    """

    divergence: Tensor
    cross_entropy: Tensor
    x: Tensor
    w: Tensor
    bias: Tensor

    @classmethod
    def empty(cls, problem: Problem, *, zero: bool) -> Result:
        """Allocate; what not every token or chunk writes starts as zero."""
        n, dtype = len(problem.x), problem.dtype
        new = problem.x.new_zeros if zero else problem.x.new_empty
        want_x, want_w, want_bias = problem.wants
        return cls(
            divergence=new(n, dtype=dtype),
            cross_entropy=new(n, dtype=dtype),
            x=new(problem.x.shape if want_x else 0, dtype=grad_dtype(problem.x.dtype)),
            w=problem.w.new_empty(problem.w.shape if want_w else 0, dtype=dtype),
            bias=problem.w.new_zeros(problem.classes if want_bias else 0, dtype=dtype),
        )


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which a gradient waits for the backward pass."""
    return torch.float32 if dtype == torch.float16 else dtype


def chunk_size(tokens: int, classes: int, budget: int, itemsize: int = 4) -> int:
    """Tokens whose logits of one model fit the budget, split evenly; 0 when that is too few."""
    fitting = budget // max(1, classes * itemsize)
    if fitting < min(_SMALLEST_CHUNK, tokens):
        return 0
    if fitting > _SMALLEST_CHUNK:
        fitting -= fitting % _SMALLEST_CHUNK
    chunks = max(1, -(-tokens // fitting))
    return max(1, -(-tokens // chunks))


def evaluate(problem: Problem, chunk: int, stage: RowStage = row_stage) -> Result:
    """Losses and gradients, ``chunk`` tokens at a time."""
    n, classes = problem.tokens, problem.classes
    result = Result.empty(problem, zero=problem.index is not None)
    wants = any(problem.wants)
    sixteen = low_precision(problem.x.dtype) and problem.x.is_cuda
    group = min(n, max(chunk, _GROUP // chunk * chunk)) if sixteen and wants else chunk
    z_s = problem.x.new_empty(min(chunk, n), classes, dtype=problem.dtype)
    hidden = problem.spec.source == "hidden"
    z_t = torch.empty_like(z_s) if hidden else z_s
    dz = problem.x.new_empty(group, classes) if sixteen and wants else z_s
    unit = _unit(problem)
    for start in range(0, n, group):
        stop = min(start + group, n)
        x = problem.take(problem.x, start, stop)
        for i in range(start, stop, chunk):
            j = min(i + chunk, stop)
            raw = project(x[i - start : j - start], problem.w, problem.bias, z_s[: j - i])
            out = None
            if wants:
                out = dz[i - start : j - start] if sixteen else raw
            losses = stage(
                raw,
                _teacher_rows(problem, i, j, z_t),
                problem.take(problem.coef, i, j) / unit,
                None if problem.labels is None else problem.take(problem.labels, i, j),
                problem.spec,
                out,
            )
            problem.put(result.divergence, i, j, losses[0])
            problem.put(result.cross_entropy, i, j, losses[1])
        if wants:
            _add_gradients(problem, result, dz[: stop - start], x, start, stop)
    return _finish(problem, result, unit)


def _unit(problem: Problem) -> Tensor | float:
    """What the tokens' factors are measured in: float16 cannot hold the likes of 1/tokens²."""
    if problem.x.dtype != torch.float16 or not problem.tokens:
        return 1.0
    largest = problem.coef.abs().amax()
    return torch.where(largest == 0, 1, largest)


def _teacher_rows(problem: Problem, i: int, j: int, buffer: Tensor) -> tuple[Tensor, ...]:
    """What the row stage needs of the teacher for tokens ``i`` to ``j``."""
    if problem.spec.source != "hidden":
        return tuple(problem.take(t, i, j) for t in problem.teacher)
    x, w, *bias = problem.teacher
    return (project(problem.take(x, i, j), w, bias[0] if bias else None, buffer[: j - i]),)


def _add_gradients(
    problem: Problem, result: Result, dz: Tensor, x: Tensor, start: int, stop: int
) -> None:
    """Turn the gradient of some tokens' logits into those of their operands."""
    want_x, want_w, want_bias = problem.wants
    if want_x:
        problem.put(result.x, start, stop, input_grad(dz, problem.w))
    if want_w:
        add_weight_grad(result.w, dz, x, first=start == 0)
    if want_bias:
        result.bias.add_(dz.sum(0, dtype=result.bias.dtype))


def _finish(problem: Problem, result: Result, unit: Tensor | float) -> Result:
    """Bring the sums into the type in which gradients wait."""
    if problem.tokens == 0:
        result.w.zero_()
    if isinstance(unit, Tensor):
        for gradient in (result.x, result.w, result.bias):
            gradient.mul_(unit)
    dtype = grad_dtype(problem.w.dtype)
    result.w, result.bias = result.w.to(dtype), result.bias.to(dtype)
    return result
