from __future__ import annotations

import numpy as np
import pytest
import torch

from cohobate.ctr.suan.losses import click_loss, soft_click_loss


def oracle(z: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Binary cross-entropy with logits in float64, term by term as the equation has it."""
    s = 1 / (1 + np.exp(-z.astype(np.float64)))
    return -q * np.log(s) - (1 - q) * np.log(1 - s)


def logits(seed: int, n: int = 50) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_click_loss_is_the_equation(dtype: torch.dtype) -> None:
    z, y = logits(0).to(dtype), (logits(1) > 0).to(dtype)
    expected = oracle(z.double().numpy(), y.double().numpy()).mean()
    loss = click_loss(z, y)
    assert loss.dtype == dtype
    rel = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert loss.item() == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_soft_loss_and_its_gradient_are_the_equations(
    temperature: float, masked: bool, dtype: torch.dtype
) -> None:
    student, teacher = logits(0).to(dtype).requires_grad_(), logits(1).to(dtype)
    kept = torch.arange(50) % 3 > 0 if masked else torch.ones(50, dtype=torch.bool)
    loss = soft_click_loss(
        student, teacher, temperature=temperature, weight=kept if masked else None
    )
    z, t, w = student.detach().double().numpy(), teacher.double().numpy(), kept.numpy()
    soft = 1 / (1 + np.exp(-t / temperature))
    expected = temperature**2 * (oracle(z / temperature, soft) * w).sum() / w.sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    gradient = temperature * (1 / (1 + np.exp(-z / temperature)) - soft) * w / w.sum()
    np.testing.assert_allclose(student.grad.numpy(), gradient, atol=1e-6)


def test_the_factor_can_be_left_out() -> None:
    z = logits(0), logits(1)
    assert (soft_click_loss(*z, temperature=3.0) / 9).item() == pytest.approx(
        soft_click_loss(*z, temperature=3.0, t_squared=False).item()
    )


def test_num_items_is_the_count_of_the_global_batch() -> None:
    z, y = logits(0), (logits(1) > 0).double()
    halves = [click_loss(z[s], y[s], num_items=50) for s in (slice(0, 20), slice(20, None))]
    assert sum(halves).item() == pytest.approx(click_loss(z, y).item())


def test_gradcheck() -> None:
    student, teacher = logits(0, 4).requires_grad_(), logits(1, 4).requires_grad_()
    assert torch.autograd.gradcheck(soft_click_loss, (student, teacher))


def test_extreme_logits_stay_finite() -> None:
    z = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = soft_click_loss(z, torch.tensor([1e4, -1e4]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()
