"""InfoNCE against a loop written from its definition."""

from __future__ import annotations

import math

import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.core.losses import info_nce, region_info_nce, segment_mean

N, D, M = 5, 4, 6


def vectors(seed, *shape, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def loop(query, positive, negatives, temperature, normalize, weight):
    """One query at a time, in Python floats."""
    unit = (lambda v: v / v.norm()) if normalize else (lambda v: v)
    query, positive = query.detach().double(), positive.detach().double()
    total, count = 0.0, 0
    for i in range(len(query)):
        w = 1.0 if weight is None else float(weight[i])
        if not w:
            continue
        q = unit(query[i])
        if negatives is None:
            others = [
                positive[j]
                for j in range(len(query))
                if j != i and (weight is None or weight[j] != 0)
            ]
        else:
            others = list((negatives if negatives.dim() == 2 else negatives[i]).double())
        top = math.exp(float(q @ unit(positive[i])) / temperature)
        rest = sum(math.exp(float(q @ unit(k)) / temperature) for k in others)
        total += -w * math.log(top / (top + rest))
        count += 1
    return total / count


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["batch", "shared", "own"])
@pytest.mark.parametrize("mask", ["none", "bool", "weights"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_value(kind, normalize, mask, dtype, tolerance):
    query, positive = vectors(0, N, D, dtype=dtype), vectors(1, N, D, dtype=dtype)
    negatives = {
        "batch": None,
        "shared": vectors(2, M, D, dtype=dtype),
        "own": vectors(2, N, M, D, dtype=dtype),
    }[kind]
    weight = {
        "none": None,
        "bool": torch.tensor([1, 1, 0, 1, 0], dtype=torch.bool),
        "weights": torch.tensor([1.0, 0.5, 0.0, 2.0, 0.0]),
    }[mask]
    loss = info_nce(query, positive, negatives, temperature=0.5, normalize=normalize, weight=weight)
    expected = loop(query, positive, negatives, 0.5, normalize, weight)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("kind", ["batch", "shared", "own"])
def test_gradients(kind):
    inputs = [vectors(0, 3, 2), vectors(1, 3, 2)]
    if kind != "batch":
        inputs.append(vectors(2, *((4, 2) if kind == "shared" else (3, 4, 2))))
    weight = torch.tensor([1.0, 0.0, 2.0])
    assert torch.autograd.gradcheck(
        lambda *x: info_nce(*x, temperature=0.7, weight=weight),
        [x.requires_grad_() for x in inputs],
    )


@pytest.mark.parametrize("kind", ["batch", "shared"])
def test_all_masked_is_zero_with_a_graph(kind):
    query = vectors(0, N, D).requires_grad_()
    negatives = None if kind == "batch" else vectors(2, M, D)
    loss = info_nce(query, vectors(1, N, D), negatives, weight=torch.zeros(N))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(query.grad, torch.zeros(N, D, dtype=torch.float64))


def test_scores_are_float32_under_autocast():
    query, positive = vectors(0, N, D, dtype=torch.float32), vectors(1, N, D, dtype=torch.float32)
    exact = info_nce(query, positive, temperature=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(query, positive, temperature=0.01), exact)


@pytest.mark.parametrize("kind", ["batch", "shared"])
def test_many_keys_are_taken_in_chunks(kind, monkeypatch):
    """The scores are 40 × 300 numbers; with room for far fewer the result is the same."""
    query, positive = vectors(0, 40, D).requires_grad_(), vectors(1, 40, D).requires_grad_()
    negatives = None if kind == "batch" else vectors(2, 300, D).requires_grad_()
    inputs = [x for x in (query, positive, negatives) if x is not None]
    results = []
    for budget in (1 << 25, 5000):
        monkeypatch.setattr("cohobate.core.fused.api.CPU_BUDGET", budget)
        loss = info_nce(query, positive, negatives)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("normalize", [True, False])
def test_regions_find_each_other(normalize):
    """Points in regions 0 to 4, pixels in 1 to 5: the loss is over the four that both have."""
    points, pixels = vectors(0, 20, D).requires_grad_(), vectors(1, 30, D).requires_grad_()
    point_regions = torch.arange(20) % 6 - 1
    pixel_regions = torch.arange(30) % 6
    pixel_regions[pixel_regions == 0] = -1
    options = {"temperature": 0.5, "normalize": normalize}
    loss = region_info_nce(points, point_regions, pixels, pixel_regions, 7, **options)
    means = [
        segment_mean(rows, regions, 7)[0][1:5]
        for rows, regions in ((points, point_regions), (pixels, pixel_regions))
    ]
    assert loss.item() == pytest.approx(loop(*means, None, 0.5, normalize, None), rel=1e-10)
    assert torch.autograd.gradcheck(
        lambda a, b: region_info_nce(a, point_regions, b, pixel_regions, 7, **options),
        (points, pixels),
        fast_mode=True,
    )


@pytest.mark.parametrize("shared", [0, 1])
def test_no_region_to_tell_apart_is_zero_with_a_graph(shared):
    points = vectors(0, 3, D).requires_grad_()
    regions = torch.tensor([0, 0, 1])
    loss = region_info_nce(points, regions, vectors(1, 3, D), regions + 2 - shared, 5)
    loss.backward()
    assert loss.item() == 0
    assert points.grad.isfinite().all()


def test_bad_shapes_are_named():
    with pytest.raises(InputError, match="teacher: positives"):
        info_nce(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(InputError, match="negatives: shape"):
        info_nce(torch.ones(3, 2), torch.ones(3, 2), torch.ones(2, 4, 2))
    with pytest.raises(InputError, match="temperature: 0"):
        info_nce(torch.ones(3, 2), torch.ones(3, 2), temperature=0)
