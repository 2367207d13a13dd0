"""VoxelNet: the sparse backbone of detectors, seen from above."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.lidar.sparse import Backend, Grid, sparse_conv
from cohobate.lidar.sparse.geometry import Triple

SHAPE: Triple = (40, 1024, 1024)
RADIUS, LOWEST, HIGHEST = 51.2, -5.0, 3.0
CELL = (0.2, 0.1, 0.1)
"""Size of a voxel along z, y, x, in metres."""
STRIDE = 8


class VoxelNet(nn.Module):
    """VoxelBackBone8x with features for points: 0.72 million parameters.

    Four stages halve the grid (z 40 → 20 → 10 → 4 → 1), active cells are scaled to norm 1 and laid
    out flat, and every point reads its place bilinearly.

    Args:
        in_channels: Features of a voxel: mean x, y, z and intensity.
        out_channels: D.
        backend: What computes the sparse convolutions.

    References:
        Yan, Mao, Li, "SECOND: Sparsely Embedded Convolutional Detection", 2018; the names are those
        of OpenPCDet's VoxelBackBone8x.
    """

    def __init__(
        self, in_channels: int = 4, out_channels: int = 64, backend: Backend = "torch"
    ) -> None:
        super().__init__()
        three, down = (3, 3, 3), (2, 2, 2)

        def same(a: int, b: int) -> _Unit:
            return _Unit(a, b, three, backend=backend)

        def stage(a: int, b: int, padding: Triple) -> nn.ModuleList:
            first = _Unit(a, b, three, down, padding, backend=backend)
            return nn.ModuleList([first, same(b, b), same(b, b)])

        self.in_channels = in_channels
        self.conv_input = same(in_channels, 16)
        self.conv1 = nn.ModuleList([same(16, 16)])
        self.conv2 = stage(16, 32, (1, 1, 1))
        self.conv3 = stage(32, 64, (1, 1, 1))
        self.conv4 = stage(64, 64, (0, 1, 1))
        self.conv_out = _Unit(64, 128, (3, 1, 1), (2, 1, 1), (0, 0, 0), backend=backend)
        self.final = _Filters(128, out_channels, (1, 1, 1))

    @property
    def out_channels(self) -> int:
        """D."""
        return self.final.weight.shape[0]

    def forward(self, coordinates: Tensor, features: Tensor, points: Tensor) -> Tensor:
        """Compute an output for every point.

        Args:
            coordinates: Batch index, z, y, x of each voxel (V, 4), integers in (40, 1024, 1024).
            features: (V, 4).
            points: Batch index, x, y, z in metres (N, 4).

        Returns:
            (N, D).
        """
        if torch.compiler.is_exporting():
            raise InputError("a sparse network has no ONNX form; export safetensors or hub")
        return self.at(self.bird_eye(coordinates, features, int(points[:, 0].max()) + 1), points)

    def bird_eye(self, coordinates: Tensor, features: Tensor, batch: int) -> Tensor:
        """The map seen from above (B, D, 128, 128), zero in empty cells."""
        high = coordinates.new_tensor(SHAPE)
        inside = (coordinates[:, 1:] >= 0) & (coordinates[:, 1:] < high)
        if not bool(inside.all()):
            raise InputError(f"coordinates: a voxel outside the grid of {SHAPE} cells (z, y, x)")
        grid, order = Grid.of(coordinates)
        x, shape = features.index_select(0, order), SHAPE
        for unit in [
            self.conv_input,
            *self.conv1,
            *self.conv2,
            *self.conv3,
            *self.conv4,
            self.conv_out,
        ]:
            x, grid, shape = unit(x, grid, shape)
        # spconv lays the weights of a product out as (C_in, C_out), whatever their shape says
        x = F.normalize(x @ self.final.weight.reshape(x.shape[1], -1), dim=1)
        cell, _, row, column = grid.coordinates().unbind(1)
        flat = x.new_zeros(batch, shape[1], shape[2], x.shape[1])
        return flat.index_put((cell, row, column), x).permute(0, 3, 1, 2)

    @staticmethod
    def at(bev: Tensor, points: Tensor) -> Tensor:
        """Read the map bilinearly at points (N, 4): batch index, x, y, z."""
        _, channels, rows, columns = bev.shape
        # Cell 0 lies at 0, not at a half: the convention of the detectors' set abstraction.
        x = (points[:, 1] + RADIUS) / (CELL[2] * STRIDE)
        y = (points[:, 2] + RADIUS) / (CELL[1] * STRIDE)
        x0, y0 = x.floor().clamp(0, columns - 1), y.floor().clamp(0, rows - 1)
        x1, y1 = (x0 + 1).clamp(max=columns - 1), (y0 + 1).clamp(max=rows - 1)
        flat = bev.permute(0, 2, 3, 1).reshape(-1, channels)
        start = points[:, 0].long() * rows * columns
        out = flat.new_zeros(len(points), channels)
        fx, fy = x - x0, y - y0
        for row, column, weight in (
            (y0, x0, (1 - fx) * (1 - fy)), (y1, x0, (1 - fx) * fy),
            (y0, x1, fx * (1 - fy)), (y1, x1, fx * fy),
        ):  # fmt: skip
            place = start + row.long() * columns + column.long()
            out = out + flat.index_select(0, place) * weight[:, None]
        return out


class _Filters(nn.Module):
    """Weights (C_out, kz, ky, kx, C_in), as spconv stores them."""

    def __init__(self, in_channels: int, out_channels: int, size: Triple) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, *size, in_channels))
        bound = (in_channels * size[0] * size[1] * size[2]) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)


class _Unit(nn.Sequential):
    """Convolution, normalisation, ReLU; submanifold without a stride."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: Triple,
        stride: Triple | None = None,
        padding: Triple = (1, 1, 1),
        backend: Backend = "torch",
    ) -> None:
        super().__init__(
            _Filters(in_channels, out_channels, size),
            nn.BatchNorm1d(out_channels, eps=1e-3, momentum=0.01),
        )
        self.size, self.stride, self.padding, self.backend = size, stride, padding, backend

    def forward(self, x: Tensor, grid: Grid, shape: Triple) -> tuple[Tensor, Grid, Triple]:  # type: ignore[override]
        """Rows, their grid and the size of its box; the same afterwards."""
        filters, norm = self
        weight: Tensor = filters.weight  # type: ignore[assignment]
        if self.stride is None:
            pairs = grid.neighbours()
            # there the first axis (z) varies fastest, in the weights the last
            kernel = weight.permute(3, 2, 1, 4, 0).flatten(0, 2)
        else:
            shape = _shape(shape, self.size, self.stride, self.padding)
            grid, pairs = grid.strided(self.size, self.stride, self.padding, shape)
            kernel = weight.permute(1, 2, 3, 4, 0).flatten(0, 2)
        return norm(sparse_conv(x, kernel, pairs, self.backend)).relu_(), grid, shape


def _shape(shape: Triple, size: Triple, stride: Triple, padding: Triple) -> Triple:
    """Size of a dense convolution's output."""
    a, b, c = (
        (n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape, size, stride, padding, strict=True)
    )
    return a, b, c
