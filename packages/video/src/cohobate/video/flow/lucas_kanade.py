"""Optical flow without parameters: pyramidal Lucas-Kanade that gradients flow through."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.video.warp import backward_warp

_GREY = (0.299, 0.587, 0.114)


class LucasKanade(nn.Module):
    """Least-squares flow in windows, coarse to fine.

    Args:
        levels: Levels of the pyramid, halved each.
        iterations: Updates on each level.
        window: Side of the window in pixels, odd.
        damping: Added to the diagonal of the normal equations, in squared grey values; keeps flow
            at 0 where there is no texture.

    References:
        Lucas, Kanade: An iterative image registration technique, IJCAI 1981; pyramid by Bouguet.
    """

    def __init__(
        self, levels: int = 3, iterations: int = 2, window: int = 7, damping: float = 1e-4
    ) -> None:
        super().__init__()
        self.levels, self.iterations = levels, iterations
        self.window, self.damping = window, damping

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Flow from the first image to the second.

        Args:
            first: ``(B, 3, H, W)`` in [0, 1].
            second: The same.

        Returns:
            ``(B, 2, H, W)`` in pixels.
        """
        return self.pairs(torch.stack((first, second), 1), ((0, 1),))[:, 0]

    def pairs(self, frames: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
        """Flows of several pairs of frames in one pass.

        Args:
            frames: ``(B, N, 3, H, W)``.
            pairs: Numbers of the frames.

        Returns:
            ``(B, len(pairs), 2, H, W)``.
        """
        grey = (frames.float() * frames.new_tensor(_GREY, dtype=torch.float)[:, None, None]).sum(2)
        sides = [list(side) for side in zip(*pairs, strict=True)]
        one, other = (grey[:, side].flatten(0, 1)[:, None] for side in sides)
        flow = self._pyramid(one, other, self.levels)
        return flow.unflatten(0, (len(frames), -1))

    def _pyramid(self, one: Tensor, other: Tensor, levels: int) -> Tensor:
        height, width = one.shape[-2:]
        if levels == 1 or min(height, width) < 2 * self.window:
            flow = one.new_zeros(len(one), 2, height, width)
        else:
            small = self._pyramid(_halve(one), _halve(other), levels - 1)
            flow = 2 * F.interpolate(small, (height, width), mode="bilinear")
        return self._refine(one, other, flow)

    def _refine(self, one: Tensor, other: Tensor, flow: Tensor) -> Tensor:
        dx, dy = _gradient(one)
        xx, xy, yy = self._sum(torch.cat((dx * dx, dx * dy, dy * dy), 1)).split(1, 1)
        xx, yy = xx + self.damping, yy + self.damping
        determinant = xx * yy - xy * xy
        for _ in range(self.iterations):
            change = backward_warp(other, flow) - one
            x, y = self._sum(torch.cat((dx * change, dy * change), 1)).split(1, 1)
            step = torch.cat((xy * y - yy * x, xy * x - xx * y), 1) / determinant
            flow = flow + step.clamp(-2, 2)  # a linear model holds no further
        return flow

    def _sum(self, x: Tensor) -> Tensor:
        """Mean over the window; pixels past the edge do not count."""
        half = self.window // 2
        return F.avg_pool2d(x, self.window, 1, half, count_include_pad=False)


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate"), 2)


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences."""
    wide = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dx = wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]
    dy = wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]
    return dx / 2, dy / 2
