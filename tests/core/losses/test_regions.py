"""Region means against a loop over segments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.core.losses import segment_mean
from cohobate.core.losses.regions import _SegmentSum

INDEX = torch.tensor([2, 0, -1, 2, 4, 0, 0, -1])


def rows(dtype=torch.float64):
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_mean_of_every_segment(weighted, dtype, tolerance):
    x = rows(dtype)
    w = torch.tensor([1.0, 2.0, 5.0, 0.0, 1.0, 0.5, 1.0, 3.0]) if weighted else torch.ones(8)
    mean, count = segment_mean(x, INDEX, 6, weight=w if weighted else None)
    assert mean.dtype == dtype
    for s in range(6):
        member = s == INDEX
        total = w[member].double().sum().item()
        expected = (w[member, None].double() * x[member].double()).sum(0) / (total or 1)
        assert count[s].item() == total
        np.testing.assert_allclose(mean[s].double(), expected, rtol=tolerance, atol=tolerance)


def test_eps_is_added_to_the_count():
    x = rows()
    mean, count = segment_mean(x, INDEX, 6)
    softened, _ = segment_mean(x, INDEX, 6, eps=0.5)
    full = count > 0
    torch.testing.assert_close(softened[full], mean[full] * (count / (count + 0.5))[full, None])
    assert softened[~full].count_nonzero() == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients(weighted):
    w = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    inputs = [rows().requires_grad_()] + ([w.requires_grad_()] if weighted else [])
    assert torch.autograd.gradcheck(
        lambda x, w=None: segment_mean(x, INDEX, 6, weight=w)[0], inputs
    )


def test_sorted_sum_equals_index_add():
    index = INDEX.clamp_min(0)
    plain, ordered = (
        _SegmentSum.apply(rows().requires_grad_(), index, 6, sort) for sort in (False, True)
    )
    torch.testing.assert_close(plain, ordered)


def test_deterministic_option_gives_the_same_means():
    plain = segment_mean(rows(), INDEX, 6)
    for a, b in zip(plain, segment_mean(rows(), INDEX, 6, deterministic=True), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_index_is_named():
    with pytest.raises(InputError, match="index: shape"):
        segment_mean(rows(), INDEX[:3], 6)
