"""Layers on sparse rows, with the parameter names and shapes of MinkowskiEngine."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cohobate.lidar.sparse.geometry import KernelMap
from cohobate.lidar.sparse.ops import Backend, sparse_conv


class SparseConv(nn.Module):
    """A convolution whose pairs are given with each call; without bias.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        volume: K, the elements of the kernel; 27 for 3 × 3 × 3, 8 for 2 × 2 × 2.
        transposed: Only how the weights are drawn at first: by C_out instead of C_in.
        backend: As for `cohobate.lidar.sparse.sparse_conv`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        volume: int,
        *,
        transposed: bool = False,
        backend: Backend = "torch",
    ) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.kernel = nn.Parameter(torch.empty(volume, in_channels, out_channels))
        bound = 1 / math.sqrt((out_channels if transposed else in_channels) * volume)
        nn.init.uniform_(self.kernel, -bound, bound)

    def forward(self, features: Tensor, pairs: KernelMap) -> Tensor:
        """Rows (N, C_in) → (M, C_out)."""
        return sparse_conv(features, self.kernel, pairs, self.backend)


class Pointwise(nn.Module):
    """A 1 × 1 × 1 convolution: a product on every row.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        bias: Whether to add one.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = False) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_channels)
        self.kernel = nn.Parameter(torch.empty(in_channels, out_channels).uniform_(-bound, bound))
        self.bias = (
            nn.Parameter(torch.empty(1, out_channels).uniform_(-bound, bound)) if bias else None
        )

    def forward(self, features: Tensor) -> Tensor:
        """Rows (N, C_in) → (N, C_out)."""
        out = features @ self.kernel
        return out if self.bias is None else out + self.bias


class Norm(nn.Module):
    """Batch normalisation over all rows; the layer inside is called ``bn`` in official weights.

    Args:
        channels: C.
        momentum: Share of the new statistics.
    """

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels, momentum=momentum)

    def forward(self, features: Tensor) -> Tensor:
        """Rows (N, C) → (N, C)."""
        return self.bn(features)


class BasicBlock(nn.Module):
    """Two 3 × 3 × 3 convolutions with a way around them.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        momentum: Of the normalisation on the way around; inside the block it is 0.1 as in the
            official code, which never passes its own value on.
        backend: As for `SparseConv`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, momentum: float, backend: Backend
    ) -> None:
        super().__init__()
        self.conv1 = SparseConv(in_channels, out_channels, 27, backend=backend)
        self.norm1 = Norm(out_channels)
        self.conv2 = SparseConv(out_channels, out_channels, 27, backend=backend)
        self.norm2 = Norm(out_channels)
        self.downsample = (
            nn.Sequential(Pointwise(in_channels, out_channels), Norm(out_channels, momentum))
            if in_channels != out_channels
            else None
        )

    def forward(self, features: Tensor, pairs: KernelMap) -> Tensor:
        """Rows (N, C_in) → (N, C_out)."""
        around = features if self.downsample is None else self.downsample(features)
        out = self.norm1(self.conv1(features, pairs)).relu_()
        return (self.norm2(self.conv2(out, pairs)) + around).relu_()
