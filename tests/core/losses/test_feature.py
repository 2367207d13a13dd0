"""Feature losses against float64 formulas written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.core.losses import attention_map, attention_transfer, cosine, hint, mse, smooth_l1

SHAPE = (3, 4, 2, 5)


def features(seed, dtype=torch.float64, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def position_losses(name, s, t):
    """Loss of every position (3, 2, 5), in float64."""
    s, t = np.float64(s), np.float64(t)
    if name == "mse":
        return ((s - t) ** 2).mean(1)
    if name == "smooth_l1":
        error = np.abs(s - t)
        return np.where(error < 0.7, error**2 / 1.4, error - 0.35).mean(1)
    norms = np.linalg.norm(s, axis=1) * np.linalg.norm(t, axis=1)
    return 1 - (s * t).sum(1) / norms


LOSSES = {
    "mse": mse,
    "smooth_l1": lambda s, t, **options: smooth_l1(s, t, beta=0.7, **options),
    "cosine": cosine,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mask", ["none", "bool", "weights"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_position_losses(name, mask, dtype, tolerance, channel_dim):
    s, t = features(0, dtype), features(1, dtype)
    losses = position_losses(name, s.double(), t.double())
    weight = None
    if mask != "none":
        weight = torch.rand(losses.shape, generator=torch.Generator().manual_seed(2))
        weight = weight > 0.5 if mask == "bool" else weight * (weight > 0.5)
    w = np.ones_like(losses) if weight is None else weight.double().numpy()
    s, t = (x.movedim(1, channel_dim) for x in (s, t))
    loss = LOSSES[name](s, t, channel_dim=channel_dim, weight=weight)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx((w * losses).sum() / (w != 0).sum(), rel=tolerance)
    half = LOSSES[name](s, t, channel_dim=channel_dim, weight=weight, num_items=2 * (w != 0).sum())
    assert half.item() == pytest.approx(loss.item() / 2, rel=tolerance)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_attention_transfer(squared, power):
    s, t = features(0), features(1, shape=(3, 7, 2, 5))
    maps = []
    for x in (s, t):
        energy = (np.abs(x.numpy()) ** power).sum(1).reshape(3, -1)
        maps.append(energy / np.linalg.norm(energy, axis=1, keepdims=True))
    np.testing.assert_allclose(attention_map(s, power=power).numpy(), maps[0], rtol=1e-12)
    distance = np.linalg.norm(maps[0] - maps[1], axis=1)
    keep = np.array([1, 0, 1])
    expected = ((distance**2 if squared else distance) * keep).sum() / 2
    loss = attention_transfer(s, t, power=power, squared=squared, weight=torch.tensor(keep))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_hint_sums_a_sample():
    s, t = features(0), features(1)
    per_sample = 0.5 * ((s - t) ** 2).flatten(1).sum(1)
    assert hint(s, t).item() == pytest.approx(per_sample.mean().item(), rel=1e-12)
    masked = hint(s, t, weight=torch.tensor([0.0, 2.0, 0.0]))
    assert masked.item() == pytest.approx(2 * per_sample[1].item(), rel=1e-12)


EVERY = LOSSES | {"attention_transfer": attention_transfer, "hint": hint}


@pytest.mark.parametrize("name", EVERY)
def test_gradients(name):
    shape = (2, 3, 2)
    inputs = [features(i, shape=shape).requires_grad_() for i in (0, 1)]
    weight = torch.tensor([0.5, 0.0], dtype=torch.float64)
    weight = weight if name in ("attention_transfer", "hint") else weight[:, None]
    assert torch.autograd.gradcheck(lambda s, t: EVERY[name](s, t, weight=weight), inputs)


@pytest.mark.parametrize("name", EVERY)
def test_all_masked_is_zero_with_a_graph(name):
    s = features(0).requires_grad_()
    weight = torch.zeros(3) if name in ("attention_transfer", "hint") else torch.zeros(3, 1, 1)
    loss = EVERY[name](s, features(1), weight=weight)
    loss.backward()
    assert loss.item() == 0
    assert s.grad.count_nonzero() == 0


@pytest.mark.parametrize("name", EVERY)
def test_other_shape_is_refused(name):
    with pytest.raises(InputError, match="teacher: "):
        EVERY[name](features(0), features(1, shape=(3, 4, 2, 4)))
