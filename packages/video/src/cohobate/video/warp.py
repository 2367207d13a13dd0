"""Warping by optical flow: backward with and without a mask, forward by splatting, and in between.

Flows are ``(B, 2, H, W)`` in pixels, channel 0 to the right and channel 1 down. Coordinates and
sums are in float32 whatever the images are in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_INSIDE = 0.999  # share of the bilinear weight that must lie inside the image


def backward_warp(image: Tensor, flows: Tensor) -> Tensor:
    """Fetch an image along several flows: ``out_k(p) = image(p + flow_k(p))``, bilinear.

    Positions outside the image are moved to its edge.

    Args:
        image: ``(B, C, H, W)``.
        flows: K flows side by side, ``(B, 2K, H, W)``.

    Returns:
        ``(B, K C, H, W)``.

    Example:
        >>> row = torch.tensor([[[[0.0, 1.0, 2.0]], ]])
        >>> backward_warp(row, torch.tensor([[[[0.5, 0.5, 0.5]], [[0.0, 0.0, 0.0]]]])).tolist()
        [[[[0.5, 1.5, 2.0]]]]
    """
    b, c, h, w = image.shape
    count = flows.shape[1] // 2
    flows = flows.float().view(b, count, 2, h, w)
    # The K flows stand below each other in one grid: the image need not be copied K times.
    x = (_steps(w, image) + flows[:, :, 0] / _half(w)).clamp(-1, 1)
    y = (_steps(h, image)[:, None] + flows[:, :, 1] / _half(h)).clamp(-1, 1)
    grid = torch.stack((x, y), -1).view(b, count * h, w, 2)
    out = F.grid_sample(image.float(), grid, align_corners=True)
    out = out.view(b, c, count, h, w).transpose(1, 2).reshape(b, count * c, h, w)
    return out.to(image.dtype)


def masked_warp(image: Tensor, flow: Tensor, *, official: bool = False) -> tuple[Tensor, Tensor]:
    """Fetch an image along one flow, with 0 where the flow leaves it.

    Args:
        image: ``(B, C, H, W)``.
        flow: ``(B, 2, H, W)``.
        official: Sample as the released code does: positions are scaled for images whose corner
            pixels lie on the border and read as if they did not, so that zero flow shifts by up to
            half a pixel and the outermost pixels are always lost.

    Returns:
        The image, and 1 where it is inside, ``(B, 1, H, W)``.
    """
    h, w = image.shape[-2:]
    flow = flow.float()
    x = torch.arange(w, device=flow.device) + flow[:, 0]
    y = torch.arange(h, device=flow.device)[:, None] + flow[:, 1]
    grid = torch.stack((x / _half(w) - 1, y / _half(h) - 1), -1)
    with torch.no_grad():
        if official:
            x, y = x * (w / max(w - 1, 1)) - 0.5, y * (h / max(h - 1, 1)) - 0.5
        share = _share_inside(x, w) * _share_inside(y, h)
        inside = (share >= _INSIDE)[:, None].to(flow.dtype)
    out = F.grid_sample(image.float(), grid, padding_mode="border", align_corners=not official)
    return (out * inside).to(image.dtype), inside.to(image.dtype)


def splat(values: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Push values along a flow onto the four pixels around where they land.

    The weight of a pixel at distance d from the landing point is ``exp(-d²)``.

    Args:
        values: ``(B, C, H, W)``.
        flow: ``(B, 2, H, W)``.

    Returns:
        The weighted sums ``(B, C, H, W)`` and the sums of weights ``(B, 1, H, W)``, float32.

    Differences:
        Sums run in no fixed order on CUDA; on a CPU they are the same each time.
    """
    b, c, h, w = values.shape
    flow = flow.float()
    x = torch.arange(w, device=flow.device) + flow[:, 0]
    y = torch.arange(h, device=flow.device)[:, None] + flow[:, 1]
    left, top = x.detach().floor(), y.detach().floor()
    near_x, near_y = x - left, y - top
    sources = torch.cat((values.float(), torch.ones_like(x)[:, None]), 1).flatten(2)
    # One cell past the image takes what falls outside.
    out = sources.new_zeros(b, c + 1, h * w + 1)
    for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = left + right, top + below
        inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
        place = torch.where(inside, row * w + column, h * w).long().flatten(1)
        weight = torch.exp(-((near_x - right) ** 2 + (near_y - below) ** 2)).flatten(1)
        out = out.scatter_add(2, place[:, None].expand(-1, c + 1, -1), sources * weight[:, None])
    sums = out[..., :-1].view(b, c + 1, h, w)
    return sums[:, :-1], sums[:, -1:]


class Intermediate(NamedTuple):
    """Flows from a moment between two frames.

    Attributes:
        first: To the first frame, ``(B, 2, H, W)``.
        second: To the second frame.
    """

    first: Tensor
    second: Tensor


def intermediate_flows(forward: Tensor, backward: Tensor, time: Tensor) -> Intermediate:
    """Flows from a time s between two frames A and B to each of them, s different in each pixel.

    Both flows are splatted to where they are at s, and joined::

        a, n0 = S(F_AB; s F_AB)        b, n1 = S(F_BA; (1 - s) F_BA)       n = (1 - s) n0 + s n1
        F_sA = (-(1 - s) s a + s² b) / n         F_sB = ((1 - s)² a - s (1 - s) b) / n

    Args:
        forward: F_AB, ``(B, 2, H, W)``.
        backward: F_BA.
        time: s in [0, 1], ``(B, 1, H, 1)`` or ``(B, 1, H, W)``.

    Returns:
        F_sA and F_sB; where nothing lands they are 0.

    References:
        Complementary flow reversal of Sim, Oh, Kim: XVFI, ICCV 2021, arXiv 2103.16206, eq. 1-2; per
        pixel in Shang et al., arXiv 2305.19862.
    """
    time = time.float()
    rest = 1 - time
    a, n0 = splat(forward, time * forward)
    b, n1 = splat(backward, rest * backward)
    n = rest * n0 + time * n1
    n = torch.where(n > 0, n, torch.ones_like(n))
    first = (time * time * b - rest * time * a) / n
    return Intermediate(first, (rest * rest * a - time * rest * b) / n)


def _steps(size: int, like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, size, device=like.device)


def _half(size: int) -> float:
    return max(size - 1, 1) / 2


def _share_inside(position: Tensor, size: int) -> Tensor:
    """How much of the weight of the two pixels beside a position is inside."""
    return torch.minimum(position + 1, size - position).clamp(0, 1)
