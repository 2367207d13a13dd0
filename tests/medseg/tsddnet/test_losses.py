"""The self-distillation loss against a float64 oracle written from its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.medseg.tsddnet.losses import branch_ce, branch_hint, branch_kl


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def oracle(branches, fused, target, features, hint, a, c, t):
    """L_cls as the module's docstring writes it, image by image, in float64."""
    total = 0.0
    for n, y in enumerate(target):
        total += -log_softmax(fused)[n, y]
        for z in branches:
            p = np.exp(log_softmax(fused / t)[n])
            kl = (p * (log_softmax(fused / t)[n] - log_softmax(z / t)[n])).sum()
            total += (1 - a) * -log_softmax(z)[n, y] + a * t**2 * kl
        for f in features:
            total += c * ((f[n] - hint[n]) ** 2).sum() / len(hint[n])
    return total / len(target)


def loss(branches, fused, target, features, hint, a, c, t):
    ce = torch.nn.functional.cross_entropy(fused, target)
    return (
        ce
        + (1 - a) * branch_ce(branches, target)
        + a * branch_kl(branches, fused, temperature=t)
        + c * branch_hint(features, hint)
    )


def draw(seed: int, dtype=torch.float64, classes: int = 2):
    g = torch.Generator().manual_seed(seed)
    *branches, fused = (torch.randn(5, classes, generator=g, dtype=dtype) * 3 for _ in range(3))
    *features, hint = (torch.randn(5, 7, generator=g, dtype=dtype) for _ in range(3))
    return branches, fused, torch.randint(0, classes, (5,), generator=g), features, hint


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize(("a", "c", "t"), [(0.3, 0.03, 3.0), (0.9, 1.0, 1.0), (0.0, 0.0, 2.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_the_value_is_the_formulas(a, c, t, dtype, tolerance, classes):
    found = draw(1, classes=classes)
    branches, fused, target, features, hint = found
    want = oracle(
        [z.numpy() for z in branches], fused.numpy(), target.numpy(),
        [f.numpy() for f in features], hint.numpy(), a, c, t,
    )  # fmt: skip
    cast = [[x.to(dtype) for x in branches], fused.to(dtype), target]
    cast += [[x.to(dtype) for x in features], hint.to(dtype)]
    assert loss(*cast, a, c, t).item() == pytest.approx(want, rel=tolerance)


def test_gradients_are_the_formulas():
    branches, fused, _, features, hint = draw(2)
    leaves = [x.requires_grad_() for x in (*branches, *features)]

    def terms(z_a, z_b, f_a, f_b):
        kl = branch_kl([z_a, z_b], fused, temperature=2.0)
        return kl + branch_hint([f_a, f_b], hint)

    assert torch.autograd.gradcheck(terms, leaves)


def test_no_gradient_reaches_the_fused_head():
    branches, fused, _, features, hint = draw(3)
    for x in (fused, hint, *branches, *features):
        x.requires_grad_()
    (branch_kl(branches, fused) + branch_hint(features, hint)).backward()
    assert fused.grad is None
    assert hint.grad is None
    assert all(x.grad.abs().sum() > 0 for x in (*branches, *features))


def test_closed_forms():
    zeros = torch.zeros(3, 2)
    assert branch_ce([zeros], torch.tensor([0, 1, 1])).item() == pytest.approx(math.log(2))
    z = torch.randn(3, 2)
    assert branch_kl([z, z], z).item() == pytest.approx(0.0, abs=1e-6)
    assert branch_hint([z, z], z).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_stay_finite(dtype):
    big = torch.tensor([[80.0, -80.0], [-80.0, 80.0]], dtype=dtype)
    branches = [big.clone().requires_grad_(), (-big).requires_grad_()]
    total = branch_ce(branches, torch.tensor([1, 0])) + branch_kl(branches, -big)
    total.backward()
    assert total.isfinite()
    assert all(b.grad.isfinite().all() for b in branches)


def test_shapes_must_agree():
    with pytest.raises(InputError, match="teacher"):
        branch_hint([torch.zeros(2, 3)], torch.zeros(2, 4))
    with pytest.raises(InputError, match="temperature"):
        branch_kl([torch.zeros(2, 3)], torch.zeros(2, 3), temperature=0.0)
