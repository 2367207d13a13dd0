"""The streaming evaluation: tiles over classes, for a class axis too wide for the budget.

A first sweep over the tiles finds the normalisers by an online log-sum-exp, a second the row sums
that the gradient needs (the forward KL needs none), the last forms losses and gradients. Each sweep
projects again: six or eight matrix products instead of four, but memory no longer grows with the
number of classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cohobate.core.fused.chunked import Problem, Result, grad_dtype
from cohobate.core.fused.matmul import add_weight_grad, input_grad, project
from cohobate.core.fused.rows import bucket_terms
from cohobate.core.losses.divergences import f_terms, pull

_TOKENS = 256  # in a tile: fewer make the products slow, more make the tile narrow
_ALIVE = 8  # arrays of the size of a tile alive at a time


class LogSumExp:
    """Log-sum-exp over the columns of rows that are seen in pieces."""

    def __init__(self, like: Tensor, rows: int) -> None:
        self.top = like.new_full((rows, 1), -torch.inf)
        self.sum = like.new_zeros(rows, 1)

    def add(self, z: Tensor) -> None:
        """Take in more columns (n, v)."""
        top = torch.maximum(self.top, z.amax(1, keepdim=True))
        finite = top.nan_to_num(neginf=0.0)  # where every column so far is left out
        self.sum.mul_((self.top - finite).exp_()).add_((z - finite).exp_().sum(1, keepdim=True))
        self.top = top

    def value(self) -> Tensor:
        """The log-sum-exp so far (n, 1); -inf when there was nothing."""
        return self.top.nan_to_num(neginf=0.0) + self.sum.log()


def evaluate_tiles(problem: Problem, elements: int) -> Result:
    """Losses and gradients in the memory of ``2 · elements`` numbers, beyond the gradients."""
    elements = max(1, 2 * elements // _ALIVE)
    n, classes = problem.tokens, problem.classes
    result = Result.empty(problem, zero=True)
    result.w.zero_()
    tokens = max(1, min(n, _TOKENS, elements))
    width = max(1, min(classes, elements // tokens))
    z_s = problem.x.new_empty(tokens * width, dtype=problem.dtype)
    z_t = torch.empty_like(z_s) if problem.spec.source == "hidden" else z_s
    for start in range(0, n, tokens):
        stop = min(start + tokens, n)
        rows = _Rows(problem, start, stop, width, (z_s, z_t))
        rows.find_normalisers()
        rows.find_sums()
        d_x = rows.form_gradients(result)
        problem.put(result.divergence, start, stop, rows.divergence[:, 0] * problem.spec.factor)
        problem.put(result.cross_entropy, start, stop, rows.cross_entropy[:, 0])
        if d_x is not None:
            problem.put(result.x, start, stop, d_x)
    result.w = result.w.to(grad_dtype(problem.w.dtype))
    result.bias = result.bias.to(grad_dtype(problem.w.dtype))
    return result


class _Rows:
    """Some tokens, and what the sweeps over their tiles find out."""

    def __init__(
        self, problem: Problem, start: int, stop: int, width: int, buffers: tuple[Tensor, Tensor]
    ) -> None:
        self.problem, self.spec = problem, problem.spec
        self.width, self.buffers, self.first = width, buffers, start == 0
        self.x = problem.take(problem.x, start, stop)
        self.coef = problem.take(problem.coef, start, stop)[:, None]
        self.labels = (
            None if problem.labels is None else problem.take(problem.labels, start, stop)[:, None]
        )
        x_t, *rest = problem.teacher or (problem.x,)
        # only the rows of a head's weight are not tokens
        self.teacher = (problem.take(x_t, start, stop), *rest)
        if self.spec.source == "topk":
            self.teacher = tuple(problem.take(t, start, stop) for t in problem.teacher)
        zeros = self.coef.new_zeros(stop - start, 1, dtype=problem.dtype)
        self.lse_s = self.lse_t = self.lse_ce = zeros
        self.divergence, self.cross_entropy = zeros.clone(), zeros.clone()
        self.pulled: Tensor | None = None
        self.buckets: Tensor | None = None

    def tiles(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Classes, student logits at temperature 1, and the slope of their cap."""
        n, problem = len(self.x), self.problem
        for i in range(0, problem.classes, self.width):
            classes = slice(i, min(i + self.width, problem.classes))
            v = classes.stop - i
            bias = None if problem.bias is None else problem.bias[classes]
            out = self.buffers[0][: n * v].view(n, v)
            raw = project(self.x, problem.w[classes], bias, out)
            yield classes, *self.spec.activate(raw, 0)

    def teacher_tile(self, classes: slice) -> Tensor:
        """The teacher's logits over the temperature, or its log-probabilities."""
        if self.spec.source == "probabilities":
            p = self.teacher[0][:, classes].to(self.problem.dtype)
            return p.clamp_min(torch.finfo(p.dtype).tiny).log_()
        raw = self.teacher[0]
        if self.spec.source == "hidden":
            x, w, *bias = self.teacher
            v = classes.stop - classes.start
            out = self.buffers[1][: len(x) * v].view(len(x), v)
            raw = project(x, w[classes], bias[0][classes] if bias else None, out)
        else:
            raw = raw[:, classes].to(self.problem.dtype)
        return self.spec.activate(raw, 1)[0] / self.spec.tau

    def inside(self, classes: slice, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of ``ids`` in the tile, and which of them are in it at all."""
        column = ids - classes.start
        there = (column >= 0) & (column < classes.stop - classes.start)
        return column.clamp(0, classes.stop - classes.start - 1), there

    def find_normalisers(self) -> None:
        """First sweep: log-sum-exps, the label's logit, the logits of the teacher's top classes."""
        spec, n = self.spec, len(self.x)
        student, teacher, plain = (LogSumExp(self.divergence, n) for _ in range(3))
        label = torch.zeros_like(self.cross_entropy)
        top = None
        if spec.source == "topk":
            top = self.divergence.new_zeros(self.teacher[0].shape)
        for classes, z, _ in self.tiles():
            if self.labels is not None:
                plain.add(z)
                column, there = self.inside(classes, self.labels)
                label.add_(z.gather(1, column) * there)
            if spec.source == "none":
                continue
            s = z / spec.tau
            if top is not None:
                column, there = self.inside(classes, self.teacher[0])
                top.add_(s.gather(1, column) * there)
                s = _leave_out(s, column, there)
            student.add(s)
            if spec.source in ("hidden", "logits"):
                teacher.add(self.teacher_tile(classes))
        self.lse_s, self.lse_ce = student.value(), plain.value()
        if spec.source in ("hidden", "logits"):
            self.lse_t = teacher.value()
        if self.labels is not None:
            self.cross_entropy = self.lse_ce - label
        if top is not None:
            _, log_probs, log_tail = self.teacher
            values, self.buckets = bucket_terms(top, self.lse_s, log_probs, log_tail, spec)
            self.divergence = values[:, None]

    def find_sums(self) -> None:
        """Second sweep: divergence and Σ q ∂f/∂q, where the gradient needs that sum first."""
        spec = self.spec
        if spec.source in ("none", "topk") or (spec.kind == "forward_kl" and self.wanted):
            return
        self.pulled = torch.zeros_like(self.divergence)
        for classes, z, _ in self.tiles():
            a, b = self.teacher_tile(classes) - self.lse_t, z / spec.tau - self.lse_s
            p, q = a.exp(), b.exp()
            values = f_terms(spec.kind, p, q, a, b, spec.beta)
            self.divergence.add_(values.sum(1, keepdim=True))
            self.pulled.add_(pull(spec.kind, p, q, a, b, spec.beta).sum(1, keepdim=True))

    @property
    def wanted(self) -> bool:
        """Whether any gradient is."""
        return any(self.problem.wants)

    def form_gradients(self, result: Result) -> Tensor | None:
        """Last sweep: gradients, added to ``result`` for weight and bias; returns that of x."""
        if not self.wanted:
            return None
        problem = self.problem
        want_x, want_w, want_bias = problem.wants
        d_x = None
        for classes, z, slope in self.tiles():
            dz = self.logit_grad(classes, z)
            if slope is not None:
                dz.mul_(slope)
            dz.mul_(self.spec.scales[0])
            if want_bias:
                result.bias[classes].add_(dz.sum(0))
            dz = dz.to(problem.x.dtype) if problem.x.is_cuda else dz
            if want_x:
                part = input_grad(dz, problem.w[classes])
                d_x = part if d_x is None else d_x.add_(part)
            if want_w:
                add_weight_grad(result.w[classes], dz, self.x, first=self.first)
        return d_x

    def logit_grad(self, classes: slice, z: Tensor) -> Tensor:
        """Gradient of the tokens' total loss with respect to a tile of logits."""
        spec = self.spec
        grad = torch.zeros_like(z)
        if self.buckets is not None:
            column, there = self.inside(classes, self.teacher[0])
            others = _leave_out(z / spec.tau, column, there)
            grad = (others - self.lse_s).exp_().nan_to_num_(0).mul_(self.buckets[:, -1:])
            grad.scatter_add_(1, column, self.buckets[:, :-1] * there)
        elif spec.source != "none":
            a, b = self.teacher_tile(classes) - self.lse_t, z / spec.tau - self.lse_s
            p, q = a.exp(), b.exp()
            if self.pulled is None:  # the forward KL, whose sum is -1
                self.divergence.add_((p * (a - b)).sum(1, keepdim=True))
                grad = q - p
            else:
                grad = pull(spec.kind, p, q, a, b, spec.beta).addcmul_(q, self.pulled, value=-1)
        grad.mul_(self.coef * (spec.factor / spec.tau))
        if self.labels is not None:
            weight = self.coef * spec.ce_weight
            grad.addcmul_((z - self.lse_ce).exp_(), weight)
            column, there = self.inside(classes, self.labels)
            grad.scatter_add_(1, column, -weight * there)
        return grad


def _leave_out(s: Tensor, column: Tensor, there: Tensor) -> Tensor:
    """A copy of ``s`` with -inf at the columns that are there."""
    cut = torch.zeros_like(s).scatter_add_(1, column, there.to(s.dtype))
    return s.masked_fill(cut > 0, -torch.inf)
