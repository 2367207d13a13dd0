"""Pixels that are not held: the same features, means and gradients as of the map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.lidar.nets import UnitPixels
from cohobate.lidar.nets.pixels import pixels_at, region_means

SIZES = [(16, 24), (9, 17), (4, 6), (13, 6), (1, 7), (5, 1)]


def coarse(images: int = 2, *, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(images, 5, 4, 6, generator=rng, dtype=dtype).requires_grad_()


def regions(size: tuple[int, int], images: int = 2) -> Tensor:
    """Seven in an image, a few pixels in none, the last empty."""
    rng = torch.Generator().manual_seed(1)
    return torch.randint(-1, 6, (images, *size), generator=rng)


def both(features: Tensor, size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Means of regions and their gradient, without the map and with it."""
    pixels, found = UnitPixels(features, size), []
    for form in (pixels, pixels.dense()):
        means = region_means(form, regions(size, len(features)), 7, eps=1e-6)
        weights = torch.linspace(-1, 2, means.numel(), dtype=means.dtype).view_as(means)
        found.append((means.detach(), *torch.autograd.grad((means * weights).sum(), features)))
    return found


@pytest.mark.parametrize("size", SIZES)
def test_means_equal_those_of_the_map(size: tuple[int, int]) -> None:
    for one, other in zip(*both(coarse(), size), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 1, 6), (2, 3, 4, 1), (1, 3, 1, 1), (1, 3, 2, 2)])
def test_coarse_grids_may_be_a_line_or_a_point(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, dtype=torch.float64).requires_grad_()
    for one, other in zip(*both(features, (5, 9)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    size = (7, 9)
    assert torch.autograd.gradcheck(
        lambda x: UnitPixels(x, size).region_means(regions(size), 7), (coarse(),), fast_mode=True
    )
    places = torch.tensor([[0, 6, 8], [1, 2, 3], [1, 2, 3]])
    assert torch.autograd.gradcheck(lambda x: UnitPixels(x, size).at(places), (coarse(),))


@pytest.mark.parametrize("size", SIZES)
def test_single_pixels_are_those_of_the_map(size: tuple[int, int]) -> None:
    pixels = UnitPixels(coarse(), size)
    places = torch.stack([torch.arange(40) % n for n in (2, *size)], 1)
    dense = pixels.dense()
    assert pixels.shape == dense.shape
    torch.testing.assert_close(pixels_at(pixels, places), pixels_at(dense, places))
    torch.testing.assert_close(pixels_at(dense, places)[3], dense[1, :, 3 % size[0], 3 % size[1]])


def test_neighbours_that_cancel_keep_their_digits() -> None:
    # between opposite vectors the norm is a thousandth of theirs: its square is lost in float32
    single = torch.randn(1, 5, 4, 6, generator=torch.Generator().manual_seed(3))
    single[..., 1::2] = -0.998 * single[..., ::2] + 1e-3 * single[..., 1::2]
    size = (4, 11)  # every second column is a midpoint
    exact, _ = both(single.double().requires_grad_(), size)[1]
    found, _ = both(single.requires_grad_(), size)[0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)


def test_features_of_zero_give_means_of_zero() -> None:
    features = torch.zeros(1, 3, 4, 6, requires_grad=True)
    means = UnitPixels(features, (8, 12)).region_means(torch.zeros(1, 8, 12).long(), 1)
    means.sum().backward()
    assert means.abs().max() == 0
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype: torch.dtype) -> None:
    half = coarse(dtype=torch.float32).detach().to(dtype)
    size = (8, 12)
    means = UnitPixels(half, size).region_means(regions(size), 7)
    assert means.dtype == dtype
    assert UnitPixels(half, size).at(torch.zeros(1, 3).long()).dtype == dtype
    full = UnitPixels(half.float(), size).region_means(regions(size), 7)
    assert torch.equal(means, full.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        inside = UnitPixels(half.float(), size).region_means(regions(size), 7)
    assert torch.equal(inside, full)


def test_no_region_at_all() -> None:
    features = coarse()
    means = UnitPixels(features, (8, 12)).region_means(torch.full((2, 8, 12), -1), 1)
    assert means.shape == (2, 1, 5)
    assert means.abs().max() == 0


def test_nothing_of_the_size_of_the_map_is_kept() -> None:
    images, channels, size = 2, 512, (64, 96)
    features = torch.randn(images, channels, 8, 12, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        UnitPixels(features, size).region_means(regions(size), 7)
    assert max(kept) < images * channels * size[0] * size[1] / 8


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    size, found = (16, 24), []
    for device in ("cpu", "cuda"):
        features = coarse(dtype=torch.float32).detach().to(device).requires_grad_()
        pixels = UnitPixels(features, size)
        means = pixels.region_means(regions(size).to(device), 7)
        some = pixels.at(torch.tensor([[0, 3, 4], [1, 15, 23]], device=device))
        (means.square().sum() + F.relu(some).sum()).backward()
        assert features.grad is not None
        found.append((means.detach().cpu(), some.detach().cpu(), features.grad.cpu()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
