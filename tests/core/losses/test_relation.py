"""Relation losses against the whole matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.core.losses import (
    KINDS,
    attention_relation,
    divergence,
    gram_relation,
    value_relation,
)


def tensor(seed, *shape, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def gram_oracle(s, t, normalize):
    losses = []
    for x, y in zip(np.float64(s), np.float64(t), strict=True):
        x, y = x.reshape(len(x), -1).T, y.reshape(len(y), -1).T
        if normalize:
            x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
        losses.append(np.mean((x @ x.T - y @ y.T) ** 2))
    return np.array(losses)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("widths", [(4, 4), (3, 6), (6, 3)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 1e-2)]
)
def test_gram_identity(normalize, widths, dtype, tolerance):
    s, t = (tensor(i, 3, c, 4, 5, dtype=dtype) for i, c in enumerate(widths))
    losses = gram_oracle(s.double(), t.double(), normalize)
    loss = gram_relation(s, t, normalize=normalize, weight=torch.tensor([1.0, 0.0, 3.0]))
    assert loss.dtype == dtype
    expected = (losses[0] + 3 * losses[2]) / 2
    assert loss.item() == pytest.approx(expected, rel=tolerance)


def test_gram_keeps_digits_when_the_two_agree():
    t = tensor(0, 1, 8, 200)
    s = t + 1e-4 * tensor(1, 1, 8, 200)
    exact = gram_oracle(s, t, normalize=False).item()
    loss = gram_relation(s.float(), t.float(), normalize=False)
    assert loss.item() == pytest.approx(exact, rel=5e-3)  # float32 inputs differ by 1e-3 of s - t


def test_gram_gradients():
    inputs = [tensor(0, 2, 3, 4).requires_grad_(), tensor(1, 2, 5, 4).requires_grad_()]
    assert torch.autograd.gradcheck(gram_relation, inputs)


def heads(seed, width, dtype=torch.float64):
    return tuple(tensor(seed + i, 2, 3, 7, width, dtype=dtype) for i in range(2))


def attention_oracle(student, teacher, kind, temperature, weight):
    """Whole attention matrices; rows and columns of left-out tokens removed sample by sample."""
    total, count = 0.0, 0
    for b in range(2):
        keep = torch.ones(7) if weight is None else weight[b].double()
        on = keep != 0
        logits = [
            (q[b][:, on].double() @ k[b][:, on].double().mT) / q.shape[-1] ** 0.5
            for q, k in (student, teacher)
        ]
        items = divergence(
            *logits, kind, beta=0.3, temperature=temperature, t_squared=False, class_dim=-1,
            reduction="none",
        )  # fmt: skip
        total += (items * keep[on]).sum().item()
        count += 3 * int(on.sum())
    return total / count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 1e-2)]
)
def test_attention_relation(kind, masked, dtype, tolerance, monkeypatch):
    monkeypatch.setattr("cohobate.core.losses.relation._CPU_BLOCK", 2 * 6 * 7)  # 2 queries a block
    student, teacher = heads(0, 4, dtype), heads(2, 6, dtype)
    weight = torch.tensor([[1.0] * 7, [1, 2, 1, 0, 1, 0, 0]]) if masked else None
    loss = attention_relation(student, teacher, kind=kind, beta=0.3, temperature=2.0, weight=weight)
    assert loss.dtype == dtype
    expected = attention_oracle(student, teacher, kind, 2.0, weight)
    assert loss.item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_gradients(kind, masked, monkeypatch):
    monkeypatch.setattr("cohobate.core.losses.relation._CPU_BLOCK", 1)
    inputs = [tensor(i, 2, 1, 3, w).requires_grad_() for i, w in enumerate((2, 2, 3, 3))]
    weight = torch.tensor([[1, 1, 1], [1, 2, 0]]) if masked else None
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: attention_relation((a, b), (c, d), kind=kind, beta=0.3, weight=weight),
        inputs,
        fast_mode=True,
    )


def test_value_relation_is_attention_of_values_with_themselves():
    v_s, v_t = tensor(0, 2, 3, 7, 4).requires_grad_(), tensor(1, 2, 3, 7, 6)
    loss = value_relation(v_s, v_t)
    expected = attention_oracle((v_s, v_s), (v_t, v_t), "forward_kl", 1.0, None)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert torch.autograd.gradcheck(value_relation, (v_s, v_t), fast_mode=True)


def test_all_masked_is_zero_with_a_graph():
    v = tensor(0, 2, 3, 7, 4).requires_grad_()
    loss = value_relation(v, tensor(1, 2, 3, 7, 4), weight=torch.zeros(7))
    loss.backward()
    assert loss.item() == 0
    assert v.grad.count_nonzero() == 0
    s = tensor(0, 2, 3, 4).requires_grad_()
    loss = gram_relation(s, tensor(1, 2, 3, 4), weight=torch.zeros(2))
    loss.backward()
    assert loss.item() == 0
    assert s.grad.count_nonzero() == 0


def test_bad_shapes_are_named():
    with pytest.raises(InputError, match="teacher: queries and keys"):
        value_relation(torch.ones(2, 3, 4, 5), torch.ones(2, 2, 4, 5))
    with pytest.raises(InputError, match=r"teacher: .* other positions"):
        gram_relation(torch.ones(2, 3, 4), torch.ones(2, 3, 5))
