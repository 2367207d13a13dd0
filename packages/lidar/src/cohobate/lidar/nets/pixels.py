"""Unit features of every pixel of an upsampled map, without the map.

An image network answers on a coarse grid. Its features are upsampled and scaled to norm 1, which at
full size is by far the largest tensor of a step; then they are averaged over regions, or read at a
few pixels. Both follow from the coarse features: upsampling is linear, and the squared norm of a
pixel is a quadratic form in the scalar products of neighbouring coarse features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.core.losses.reduce import compute_dtype

SMALLEST = 1e-12
"""Norms below count as this, as in `torch.nn.functional.normalize`."""
CANCELLED = 1e-2
"""A sum of products that is a smaller share of its terms has lost digits and is taken anew."""


@dataclass(frozen=True)
class UnitPixels:
    """Features of pixels: bilinear between those of a coarse grid, corners on corners, of norm 1.

    Attributes:
        coarse: (I, D, h, w).
        size: Height H and width W in pixels.
    """

    coarse: Tensor
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(I, D, H, W), of `dense`."""
        images, channels = self.coarse.shape[:2]
        return (images, channels, *self.size)

    def dense(self) -> Tensor:
        """All of them (I, D, H, W)."""
        fine = F.interpolate(self.coarse, self.size, mode="bilinear", align_corners=True)
        return F.normalize(fine, dim=1, eps=SMALLEST)

    def at(self, places: Tensor) -> Tensor:
        """Those of some pixels.

        Args:
            places: Image, row and column (P, 3).

        Returns:
            (P, D).
        """
        found = _between(self._rows_last(), self._axes(), places)
        return F.normalize(found, dim=1, eps=SMALLEST).to(self.coarse.dtype)

    def region_means(self, regions: Tensor, number: int, *, eps: float = 0.0) -> Tensor:
        """Mean over the pixels of every region; only numbers, not vectors, are made for each pixel.

        With f the coarse features it is ``V f / count``: V holds, for each region and coarse place,
        the sum over the region's pixels of interpolation weight / norm.

        Args:
            regions: Region of each pixel in its image (I, H, W), below ``number``; negative for
                none.
            number: S, for each image.
            eps: Added to the number of pixels before dividing.

        Returns:
            (I, S, D), zero where a region has no pixel.
        """
        images, _, height, width = self.coarse.shape
        inside = regions >= 0
        first = torch.arange(images, device=regions.device)[:, None, None] * number
        start = (regions.clamp_min(0) + first) * (height * width)
        with torch.autocast(regions.device.type, enabled=False):
            features, axes = self._rows_last(), self._axes()
            scale = _inverse_norms(features, axes, inside).where(inside, 0)
            spread = _Spread.apply(scale, start, axes, images * number)
            sums = spread.view(images, number, -1) @ features.flatten(1, 2)
        return (sums / _sizes(regions, number, sums, eps)).to(self.coarse.dtype)

    def _rows_last(self) -> Tensor:
        rows = self.coarse.permute(0, 2, 3, 1).contiguous()
        return rows.to(compute_dtype(rows))

    def _axes(self) -> Axes:
        (height, width), (rows, columns) = self.coarse.shape[2:], self.size
        return _Axis.of(height, rows, self.coarse), _Axis.of(width, columns, self.coarse)


def region_means(
    pixels: Tensor | UnitPixels, regions: Tensor, number: int, *, eps: float = 0.0
) -> Tensor:
    """Mean feature of every region of every image.

    Args:
        pixels: (I, D, H, W).
        regions: Region of each pixel in its image (I, H, W), below ``number``; negative for none.
        number: S, for each image.
        eps: Added to the number of pixels before dividing.

    Returns:
        (I, S, D), zero where a region has no pixel.
    """
    if isinstance(pixels, UnitPixels):
        return pixels.region_means(regions, number, eps=eps)
    # Channel by channel, as the map lies in memory: to turn it would cost more than the sums.
    index = regions.where(regions >= 0, number).flatten(1)[:, None]
    flat = pixels.flatten(2).to(compute_dtype(pixels))
    sums = flat.new_zeros(*flat.shape[:2], number + 1)
    sums = sums.scatter_add(2, index.expand_as(flat), flat)[..., :number].mT
    return (sums / _sizes(regions, number, sums, eps)).to(pixels.dtype)


def _sizes(regions: Tensor, number: int, like: Tensor, eps: float) -> Tensor:
    """Pixels of every region (I, S, 1), 1 where there is none, plus ``eps``."""
    images = len(regions)
    first = torch.arange(images, device=regions.device)[:, None, None] * number
    bucket = (regions + first).where(regions >= 0, images * number).flatten()
    count = torch.bincount(bucket, minlength=images * number + 1)[:-1]
    return count.clamp_min(1).to(like.dtype).view(images, number, 1) + eps


def pixels_at(pixels: Tensor | UnitPixels, places: Tensor) -> Tensor:
    """Features of some pixels.

    Args:
        pixels: (I, D, H, W).
        places: Image, row and column (P, 3).

    Returns:
        (P, D).
    """
    if isinstance(pixels, UnitPixels):
        return pixels.at(places)
    return pixels.permute(0, 2, 3, 1)[places.unbind(1)]


class _Axis(NamedTuple):
    """Interpolation along an axis of n pixels from m coarse places.

    Attributes:
        first: The lower of the two places around each pixel (n,).
        weights: Weight of this place, and of the next where there is more than one (≤ 2, n).
        coarse: m.
    """

    first: Tensor
    weights: Tensor
    coarse: int

    @classmethod
    def of(cls, coarse: int, pixels: int, like: Tensor) -> _Axis:
        """From ``coarse`` places to ``pixels``, the outermost on each other."""
        step = (coarse - 1) / max(pixels - 1, 1)
        position = torch.arange(pixels, device=like.device, dtype=torch.float64) * step
        first = position.floor().clamp(0, max(coarse - 2, 0))
        share = position - first
        weights = torch.stack((1 - share, share))[:coarse]
        return cls(first.long(), weights.to(compute_dtype(like)), coarse)

    def matrix(self) -> Tensor:
        """From coarse values to those of pixels (n, m)."""
        found = self.weights.new_zeros(len(self.first), self.coarse)
        for shift, weight in enumerate(self.weights):
            found.scatter_(1, (self.first + shift)[:, None], weight[:, None])
        return found

    def squares(self) -> Tensor:
        """From products of a place with itself and with the next to squares (n, 2m − 1).

        ``(a x + b y)² = a² x² + 2ab xy + b² y²``; the m products with itself come first.
        """
        linear = self.matrix()
        return torch.cat((linear.square(), 2 * linear[:, :-1] * linear[:, 1:]), 1)


Axes = tuple[_Axis, _Axis]


def _corners(axes: Axes) -> Iterator[tuple[int, int, Tensor]]:
    """The coarse places around a pixel: rows and columns past the first, weights (H, W)."""
    y, x = axes
    for (i, row), (j, column) in product(enumerate(y.weights), enumerate(x.weights)):
        yield i, j, row[:, None] * column


def _between(features: Tensor, axes: Axes, places: Tensor) -> Tensor:
    """Interpolated features (P, D) of pixels (P, 3), from coarse ones (I, h, w, D)."""
    image, row, column = places.unbind(1)
    y, x = (axis.first[at] for axis, at in zip(axes, (row, column), strict=True))
    parts = [
        features[image, y + i, x + j] * weight[row, column, None] for i, j, weight in _corners(axes)
    ]
    return torch.stack(parts).sum(0)


def _inverse_norms(features: Tensor, axes: Axes, inside: Tensor) -> Tensor:
    """1 / norm of every pixel's interpolated features (I, H, W).

    Args:
        features: Coarse (I, h, w, D).
        axes: Of rows and columns.
        inside: Pixels that matter (I, H, W).
    """
    y, x = axes
    products = _Neighbours.apply(features)
    squares = y.squares() @ products @ x.squares().T
    with torch.no_grad():
        terms = y.matrix() @ products[:, : y.coarse, : x.coarse] @ x.matrix().T
        cancelled = (squares < CANCELLED * terms) & inside
    if bool(cancelled.any()):  # neighbours that point in opposite directions
        places = cancelled.nonzero()
        exact = _between(features, axes, places).square().sum(1)
        squares = squares.index_put(tuple(places.T), exact)
    return squares.clamp_min(SMALLEST**2).rsqrt()


class _Neighbours(torch.autograd.Function):
    """Scalar products of coarse features (I, h, w, D), laid as `_Axis.squares` takes them.

    Of (I, 2h − 1, 2w − 1) the blocks are: squares; products with the right neighbour; with the
    lower one; and the mean of both diagonals of four neighbours. A neighbour is the row so many
    places further in memory, so nothing is copied; pairs across a border are left out.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        images, height, width, _ = features.shape
        rows = features.flatten(0, 2)

        def products(shift: int) -> Tensor:
            found = rows.new_zeros(len(rows))
            size = max(len(rows) - shift, 0)
            found[:size] = torch.einsum("nd,nd->n", rows[:size], rows[shift:])
            return found.view(images, height, width)

        out = features.new_empty(images, 2 * height - 1, 2 * width - 1)
        out[:, :height, :width] = products(0)
        out[:, :height, width:] = products(1)[:, :, :-1]
        out[:, height:, :width] = products(width)[:, :-1]
        falling, rising = products(width + 1)[:, :-1, :-1], products(width - 1)[:, :-1, 1:]
        out[:, height:, width:] = (falling + rising) / 2
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        _, height, width, _ = features.shape
        rows = features.flatten(0, 2)
        out = torch.zeros_like(rows)

        def add(shift: int, block: Tensor, padding: tuple[int, int, int, int]) -> None:
            size = max(len(rows) - shift, 0)
            by = F.pad(block, padding).flatten()[:size, None]
            out[:size].addcmul_(by, rows[shift:])
            out[shift:].addcmul_(by, rows[:size])

        half = grad[:, height:, width:] / 2
        add(0, grad[:, :height, :width], (0, 0, 0, 0))
        add(1, grad[:, :height, width:], (0, 1, 0, 0))
        add(width, grad[:, height:, :width], (0, 0, 0, 1))
        add(width + 1, half, (0, 1, 0, 1))
        add(width - 1, half, (1, 0, 0, 1))
        return out.view_as(features)


class _Spread(torch.autograd.Function):
    """V (regions, h · w): numbers of pixels, spread onto the coarse places of their region.

    The numbers are (I, H, W), ``start`` (I, H, W) is where the row of each pixel's region begins.
    """

    @staticmethod
    def forward(ctx: Any, scale: Tensor, start: Tensor, axes: Axes, regions: int) -> Tensor:
        y, x = axes
        # The four places around a pixel are one index into V and into V shifted.
        index = (start + (y.first[:, None] * x.coarse + x.first)).flatten()
        ctx.save_for_backward(index)
        ctx.axes, ctx.shape = axes, start.shape
        out = scale.new_zeros(regions * y.coarse * x.coarse)
        for i, j, weight in _corners(axes):
            out[i * x.coarse + j :].index_add_(0, index, (scale * weight).flatten())
        return out.view(regions, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        width = ctx.axes[1].coarse
        flat = grad.flatten()
        out = grad.new_zeros(ctx.shape)
        for i, j, weight in _corners(ctx.axes):
            out.addcmul_(flat[i * width + j :].index_select(0, index).view_as(out), weight)
        return out, None, None, None
