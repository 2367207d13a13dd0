"""The streaming evaluation: tiles over classes, for a class axis too wide for the budget.

A first sweep over the tiles finds the normalisers by an online log-sum-exp, a second the row sums
that the gradient needs (the forward KL needs none), the last forms losses and gradients. Each sweep
projects again: six or eight matrix products instead of four, but memory no longer grows with the
number of classes. As in the chunked evaluation, one tile of student and teacher logits exists at a
time, and the work on it goes through blocks of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cohobate.core.fused.chunked import Problem, Result, grad_dtype
from cohobate.core.fused.matmul import add_weight_grad, input_grad, project
from cohobate.core.fused.rows import blocks, bucket_terms
from cohobate.core.losses.divergences import f_terms, pull

_TOKENS = 256  # in a tile: fewer make the products slow, more make the tile narrow


def evaluate_tiles(problem: Problem, elements: int) -> Result:
    """Losses and gradients with tiles of ``elements`` logits of each model."""
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


class _LogSumExp:
    """Log-sum-exp over the columns of rows that are seen in pieces."""

    def __init__(self, like: Tensor) -> None:
        self.top = torch.full_like(like, -torch.inf)
        self.sum = torch.zeros_like(like)

    def add(self, rows: slice, z: Tensor) -> None:
        """Take in more columns (n, v) of some rows."""
        old, total = self.top[rows], self.sum[rows]
        top = torch.maximum(old, z.amax(1, keepdim=True))
        finite = top.nan_to_num(neginf=0.0)  # where every column so far is left out
        total.mul_((old - finite).exp_()).add_((z - finite).exp_().sum(1, keepdim=True))
        old.copy_(top)

    def value(self) -> Tensor:
        """The log-sum-exp so far (n, 1); -inf when there was nothing."""
        return self.top.nan_to_num(neginf=0.0) + self.sum.log()


@dataclass
class _Block:
    """Some rows of a tile.

    Attributes:
        classes: The tile's place on the class axis.
        rows: The block's place among the tokens.
        raw: Student's raw logits, a view of the tile.
        z: Student's logits at temperature 1; may share memory with ``raw``.
        s: Student's logits over τ; may share memory with ``z``.
        slope: Of the student's soft cap, if there is one.
        a: Teacher's logits over τ or log-probabilities, new; none for a teacher of top classes.
    """

    classes: slice
    rows: slice
    raw: Tensor
    z: Tensor
    s: Tensor
    slope: Tensor | None
    a: Tensor | None

    def inside(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the rows' ``ids`` in the tile, and which of them are in it at all."""
        column = ids[self.rows] - self.classes.start
        width = self.classes.stop - self.classes.start
        return column.clamp(0, width - 1), (column >= 0) & (column < width)


class _Rows:
    """Some tokens, and what the sweeps over their tiles find out."""

    def __init__(
        self, problem: Problem, start: int, stop: int, width: int, buffers: tuple[Tensor, Tensor]
    ) -> None:
        self.problem, self.spec = problem, problem.spec
        self.tokens, self.width, self.buffers = (start, stop), width, buffers
        self.x = problem.take(problem.x, start, stop)
        self.coef = problem.take(problem.coef, start, stop)[:, None]
        self.labels = (
            None if problem.labels is None else problem.take(problem.labels, start, stop)[:, None]
        )
        self.teacher: tuple[Tensor, ...] = ()  # what is small: hidden states, top classes
        if self.spec.source == "hidden":
            self.teacher = (problem.take(problem.teacher[0], start, stop),)
        elif self.spec.source == "topk":
            self.teacher = tuple(problem.take(t, start, stop) for t in problem.teacher)
        zeros = self.coef.new_zeros(stop - start, 1, dtype=problem.dtype)
        self.lse_s = self.lse_t = self.lse_ce = zeros
        self.divergence, self.cross_entropy = zeros.clone(), zeros.clone()
        self.pulled: Tensor | None = None
        self.buckets: Tensor | None = None

    @property
    def wanted(self) -> bool:
        """Whether any gradient is."""
        return any(self.problem.wants)

    def tiles(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Classes, and the raw logits of student and teacher."""
        problem = self.problem
        for i in range(0, problem.classes, self.width):
            classes = slice(i, min(i + self.width, problem.classes))
            bias = None if problem.bias is None else problem.bias[classes]
            raw = project(self.x, problem.w[classes], bias, self.buffer(0, classes))
            yield classes, raw, self.teacher_tile(classes)

    def buffer(self, side: int, classes: slice) -> Tensor:
        """Room for the logits of one model."""
        n, v = len(self.x), classes.stop - classes.start
        return self.buffers[side][: n * v].view(n, v)

    def teacher_tile(self, classes: slice) -> Tensor | None:
        """The teacher's raw logits or probabilities."""
        if self.spec.source == "hidden":
            _, w, *bias = self.problem.teacher
            tile_bias = bias[0][classes] if bias else None
            return project(self.teacher[0], w[classes], tile_bias, self.buffer(1, classes))
        if self.spec.source in ("logits", "probabilities"):
            return self.problem.take(self.problem.teacher[0][:, classes], *self.tokens)
        return None

    def blocks(self, classes: slice, raw: Tensor, teacher: Tensor | None) -> Iterator[_Block]:
        """A tile in blocks of rows."""
        spec = self.spec
        for rows in blocks(raw):
            z, slope = spec.activate(raw[rows], 0)
            a = None
            if teacher is not None and spec.source == "probabilities":
                a = teacher[rows].to(z.dtype)
                a = a.clamp_min(torch.finfo(a.dtype).tiny).log_()
            elif teacher is not None:
                a = spec.activate(teacher[rows].to(z.dtype), 1)[0] / spec.tau
            s = z if spec.tau == 1 else z / spec.tau
            yield _Block(classes, rows, raw[rows], z, s, slope, a)

    def find_normalisers(self) -> None:
        """First sweep: log-sum-exps, the label's logit, the logits of the teacher's top classes."""
        spec = self.spec
        student, teacher, plain = (_LogSumExp(self.divergence) for _ in range(3))
        label = torch.zeros_like(self.cross_entropy)
        top = None
        if spec.source == "topk":
            top = self.divergence.new_zeros(self.teacher[0].shape)
        for tile in self.tiles():
            for block in self.blocks(*tile):
                rows, s = block.rows, block.s
                if self.labels is not None:
                    plain.add(rows, block.z)
                    column, there = block.inside(self.labels)
                    label[rows] += block.z.gather(1, column) * there
                if spec.source == "none":
                    continue
                if top is not None:
                    column, there = block.inside(self.teacher[0])
                    top[rows] += s.gather(1, column) * there
                    s = _leave_out(s, column, there)
                student.add(rows, s)
                if block.a is not None and spec.source != "probabilities":
                    teacher.add(rows, block.a)
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
        for tile in self.tiles():
            for block in self.blocks(*tile):
                p, q, a, b = self.sides(block)
                values = f_terms(spec.kind, p, q, a, b, spec.beta)
                self.divergence[block.rows] += values.sum(1, keepdim=True)
                pulled = pull(spec.kind, p, q, a, b, spec.beta)
                self.pulled[block.rows] += pulled.sum(1, keepdim=True)

    def sides(self, block: _Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Probabilities of teacher and student, and their logarithms."""
        assert block.a is not None
        a, b = block.a.sub_(self.lse_t[block.rows]), block.s - self.lse_s[block.rows]
        return a.exp(), b.exp(), a, b

    def form_gradients(self, result: Result) -> Tensor | None:
        """Last sweep: gradients, added to ``result`` for weight and bias; returns that of x."""
        if not self.wanted:
            return None
        problem = self.problem
        want_x, want_w, want_bias = problem.wants
        d_x = None
        for tile in self.tiles():
            classes, dz, _ = tile
            for block in self.blocks(*tile):
                grad = self.logit_grad(block)
                if block.slope is not None:
                    grad.mul_(block.slope)
                torch.mul(grad, self.spec.scales[0], out=block.raw)
            if want_bias:
                result.bias[classes].add_(dz.sum(0))
            dz = dz.to(problem.x.dtype) if problem.x.is_cuda else dz
            if want_x:
                part = input_grad(dz, problem.w[classes])
                d_x = part if d_x is None else d_x.add_(part)
            if want_w:
                add_weight_grad(result.w[classes], dz, self.x, first=self.tokens[0] == 0)
        return d_x

    def logit_grad(self, block: _Block) -> Tensor:
        """Gradient of the tokens' total loss with respect to a block of logits."""
        spec, rows = self.spec, block.rows
        if spec.source == "none":
            grad = torch.zeros_like(block.z)
        elif self.buckets is not None:
            column, there = block.inside(self.teacher[0])
            grad = _leave_out(block.s, column, there).sub_(self.lse_s[rows]).exp_()
            grad.nan_to_num_(0).mul_(self.buckets[rows, -1:])
            grad.scatter_add_(1, column, self.buckets[rows, :-1] * there)
        else:
            p, q, a, b = self.sides(block)
            if self.pulled is None:  # the forward KL, whose sum is -1
                values = torch.linalg.vecdot(p, a.sub_(b))
                self.divergence[rows] += values[:, None]
                grad = q.sub_(p)
            else:
                grad = pull(spec.kind, p, q, a, b, spec.beta)
                grad.addcmul_(q, self.pulled[rows], value=-1)
        grad.mul_(self.coef[rows] * (spec.factor / spec.tau))
        if self.labels is not None:
            weight = self.coef[rows] * spec.ce_weight
            grad.addcmul_((block.z - self.lse_ce[rows]).exp_(), weight)
            column, there = block.inside(self.labels)
            grad.scatter_add_(1, column, -weight * there)
        return grad


def _leave_out(s: Tensor, column: Tensor, there: Tensor) -> Tensor:
    """A copy of ``s`` with -inf at the columns that are there."""
    cut = torch.zeros_like(s).scatter_add_(1, column, there.to(s.dtype))
    return s.masked_fill(cut > 0, -torch.inf)
