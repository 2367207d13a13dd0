"""Soft-target losses against torch's own cross-entropy and closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cohobate.core.errors import InputError
from cohobate.core.losses import (
    cross_entropy,
    forward_kl,
    kd_loss,
    smooth_labels,
    soft_cross_entropy,
)


def batch(shape=(4, 5, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.randint(0, 5, (shape[0], *shape[2:]), generator=generator)
    return s.to(dtype), t.to(dtype), y


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_dim", [1, -1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_cross_entropy(smoothing, class_dim, dtype, tolerance):
    s, _, y = batch(dtype=dtype)
    y[0, 1] = -100
    expected = F.cross_entropy(s.double(), y, label_smoothing=smoothing)
    loss = cross_entropy(s.movedim(1, class_dim), y, label_smoothing=smoothing, class_dim=class_dim)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)


def test_smoothed_labels_make_the_same_loss():
    s, _, y = batch()
    probabilities = smooth_labels(y, 5, 0.1).double()
    assert torch.allclose(probabilities.sum(1), torch.ones(4, 3).double())
    soft = soft_cross_entropy(s, probabilities)
    hard = cross_entropy(s, y, label_smoothing=0.1)
    assert soft.item() == pytest.approx(hard.item(), rel=1e-6)  # the labels are float32


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_cross_entropy_is_kl_plus_entropy(temperature):
    s, t, _ = batch()
    log_p = (t / temperature).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1).mean() * temperature**2
    loss = soft_cross_entropy(s, log_p.exp(), temperature=temperature)
    kl = forward_kl(s, t, temperature=temperature)
    assert loss.item() == pytest.approx((kl + entropy).item(), rel=1e-12)


@pytest.mark.parametrize("mask", ["none", "bool", "weights"])
def test_kd_loss_is_the_weighted_sum(mask):
    s, t, y = batch()
    y[1, 2] = -100
    w = torch.rand(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = {"none": None, "bool": w > 0.3, "weights": w}[mask]
    loss = kd_loss(s, t, y, temperature=2.0, alpha=0.7, weight=weight)
    keep = torch.ones(4, 3, dtype=torch.float64) if weight is None else weight.double()
    keep = keep * (y != -100)
    ce = F.cross_entropy(s, y, reduction="none")
    p, q = (t / 2).softmax(1), (s / 2).softmax(1)
    kl = 4 * (p * (p / q).log()).sum(1)
    expected = ((0.3 * ce + 0.7 * kl) * keep).sum() / (keep != 0).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_gradients():
    s, t, y = batch((2, 5, 2))
    inputs = (s.requires_grad_(), t.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: kd_loss(s, t, y, label_smoothing=0.1), inputs)
    probabilities = t.detach().softmax(1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, p: soft_cross_entropy(s, p, temperature=2.0), (s, probabilities)
    )


def test_all_ignored_is_zero_with_a_graph():
    s, t, y = batch()
    s.requires_grad_()
    loss = kd_loss(s, t, torch.full_like(y, -100))
    loss.backward()
    assert loss.item() == 0
    assert s.grad.count_nonzero() == 0


def test_bad_shapes_are_named():
    s, t, y = batch()
    with pytest.raises(InputError, match="target: shape"):
        cross_entropy(s, y[:, :2])
    with pytest.raises(InputError, match="target: shape"):
        soft_cross_entropy(s, t[:2])
