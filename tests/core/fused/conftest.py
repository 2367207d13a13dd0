"""Problems for the fused divergence, and what they come to in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from cohobate.core.fused import Probabilities, TopK

N, V, H_S, H_T, K = 7, 11, 5, 6, 3


class Case:
    """Operands drawn from a seed; ``student`` are the tensors with a gradient."""

    def __init__(self, source="hidden", dtype=torch.float64, n=N, v=V, bias=True, labels=True):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.x, self.w = draw(n, H_S), draw(v, H_S)
        self.bias = draw(v) if bias else None
        self.labels = torch.randint(0, v, (n,), generator=generator) if labels else None
        self.source = source
        self.x_t, self.w_t, self.bias_t = self.teacher(draw, n, v, bias)
        self.student = [t for t in (self.x, self.w, self.bias) if t is not None]
        for tensor in self.student:
            tensor.requires_grad_()

    def teacher(self, draw, n, v, bias):
        if self.source == "none":
            return None, None, None
        if self.source == "hidden":
            return draw(n, H_T), draw(v, H_T), draw(v) if bias else None
        logits = draw(n, v)
        if self.source == "logits":
            return logits, None, None
        if self.source == "probabilities":
            return Probabilities(logits.softmax(1)), None, None
        log_probs, ids = logits.log_softmax(1).topk(min(K, v))
        return TopK(ids, log_probs, torch.log1p(-log_probs.exp().sum(1))), None, None

    def operands(self):
        return (self.x, self.w, self.x_t, self.w_t)

    def keywords(self):
        return {"bias_s": self.bias, "bias_t": self.bias_t, "labels": self.labels}

    def double(self):
        """The same numbers in float64."""
        twin = Case.__new__(Case)
        twin.source, twin.labels = self.source, self.labels
        for name in ("x", "w", "bias", "w_t", "bias_t"):
            tensor = getattr(self, name)
            setattr(twin, name, None if tensor is None else tensor.detach().double())
        if isinstance(self.x_t, TopK):
            twin.x_t = TopK(self.x_t.ids, self.x_t.log_probs.double(), self.x_t.log_tail.double())
        elif isinstance(self.x_t, Probabilities):
            twin.x_t = Probabilities(self.x_t.values.double())
        else:
            twin.x_t = None if self.x_t is None else self.x_t.double()
        twin.student = [t for t in (twin.x, twin.w, twin.bias) if t is not None]
        for tensor in twin.student:
            tensor.requires_grad_()
        return twin


def oracle_items(case, kind, beta, tau, softcap, scale, ce_weight):
    """Loss of every token in NumPy, from the definitions."""

    def logits(x, w, bias):
        z = np.float64(x.detach()) @ np.float64(w.detach()).T
        z = scale * (z if bias is None else z + np.float64(bias.detach()))
        return softcap * np.tanh(z / softcap) if softcap else z

    z = logits(case.x, case.w, case.bias)
    b = log_softmax(z / tau, 1)
    if case.source == "hidden":
        a = log_softmax(logits(case.x_t, case.w_t, case.bias_t) / tau, 1)
    elif case.source == "logits":
        raw = scale * np.float64(case.x_t)
        a = log_softmax((softcap * np.tanh(raw / softcap) if softcap else raw) / tau, 1)
    elif case.source == "probabilities":
        a = np.log(np.float64(case.x_t.values))
    elif case.source == "topk":
        ids = case.x_t.ids.numpy()
        others = np.array([logsumexp(np.delete(row, i)) for row, i in zip(b, ids, strict=True)])
        b = np.concatenate([np.take_along_axis(b, ids, 1), others[:, None]], 1)
        a = np.concatenate(
            [np.float64(case.x_t.log_probs), np.float64(case.x_t.log_tail)[:, None]], 1
        )
    losses = np.zeros(len(z))
    if case.source != "none":
        losses += tau**2 * divergence_rows(kind, np.exp(a), np.exp(b), beta)
    if case.labels is not None:
        log_q = log_softmax(z, 1)
        losses -= ce_weight * np.take_along_axis(log_q, case.labels.numpy()[:, None], 1)[:, 0]
    return losses


def divergence_rows(kind, p, q, beta):
    def kl(x, y):
        return (x * np.log(x / y)).sum(1)

    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jeffreys": lambda: kl(p, q) + kl(q, p),
        "jensen_shannon": lambda: (
            beta * kl(p, beta * p + (1 - beta) * q) + (1 - beta) * kl(q, beta * p + (1 - beta) * q)
        ),
        "skewed_kl": lambda: kl(p, beta * p + (1 - beta) * q),
        "skewed_reverse_kl": lambda: kl(q, beta * q + (1 - beta) * p),
        "total_variation": lambda: 0.5 * np.abs(p - q).sum(1),
    }[kind]()


@pytest.fixture
def case():
    return Case


@pytest.fixture
def oracle():
    return oracle_items
