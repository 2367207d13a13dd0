"""From points to voxels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cohobate.core.errors import InputError
from cohobate.lidar.nets.voxelnet import CELL, HIGHEST, LOWEST, RADIUS


@dataclass(frozen=True)
class Voxels:
    """How points become voxels.

    Args:
        size: Edge in metres; in cylindrical coordinates that of radius and height.
        cylindrical: Radius, angle, height instead of x, y, z.
        angle: Width of a cylindrical voxel in degrees.
    """

    size: float = 0.1
    cylindrical: bool = True
    angle: float = 1.0


class Voxelized(NamedTuple):
    """Voxels of a cloud, in the order of their first points.

    Attributes:
        coordinates: (V, 3), integers.
        kept: Index of the first point of each voxel (V,), which represents it.
        inverse: Voxel of each point (N,).
    """

    coordinates: np.ndarray
    kept: np.ndarray
    inverse: np.ndarray


def voxelize(points: np.ndarray, voxels: Voxels) -> Voxelized:
    """Sort points into voxels.

    Args:
        points: x, y, z in metres (N, ≥ 3).
        voxels: Their shape.

    Raises:
        InputError: No point at all, or one that is not finite.

    Example:
        >>> found = voxelize(np.array([[0.3, 0, 0], [0.1, 0, 0], [0.32, 0, 0]]), Voxels(0.2, False))
        >>> found.coordinates[:, 0].tolist(), found.inverse.tolist()
        ([1, 0], [0, 1, 0])
    """
    if not len(points):
        raise InputError("points: the cloud is empty")
    places = points[:, :3]
    if not np.isfinite(places).all():
        raise InputError("points: a coordinate is not finite")
    if voxels.cylindrical:
        x, y, z = places.T
        angle = np.degrees(np.arctan2(y, x)) / places.dtype.type(voxels.angle)
        size = places.dtype.type(voxels.size)
        places = np.stack([np.sqrt(x * x + y * y) / size, angle, z / size], 1)
    else:
        places = places / places.dtype.type(voxels.size)
    return _group(np.floor(places).astype(np.int64))


def _group(cells: np.ndarray) -> Voxelized:
    low = cells.min(0)
    extent = cells.max(0) - low + 1
    keys = np.ravel_multi_index(tuple((cells - low).T), tuple(extent))
    _, kept, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = kept.argsort()
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    kept = kept[order]
    return Voxelized(cells[kept], kept, rank[inverse])


class Pillars(NamedTuple):
    """Voxels for `cohobate.lidar.nets.VoxelNet`.

    Attributes:
        coordinates: z, y, x (V, 3).
        features: Mean x, y, z, intensity (V, 4).
        inside: Index of the points inside the grid (M,); all others are left out.
    """

    coordinates: np.ndarray
    features: np.ndarray
    inside: np.ndarray


def voxelize_box(
    points: np.ndarray, *, points_per_voxel: int = 10, max_voxels: int = 60000
) -> Pillars:
    """Sort points into VoxelNet's grid: 0.1 × 0.1 × 0.2 m within 51.2 m, −5 to 3 m high.

    Args:
        points: x, y, z, intensity (N, 4).
        points_per_voxel: Only the first so many points of a voxel count.
        max_voxels: Only the first so many voxels count.

    Raises:
        InputError: No point is inside.
    """
    x, y, z = points[:, :3].T
    near = (x * x + y * y <= RADIUS**2) & (np.abs(x) < RADIUS) & (np.abs(y) < RADIUS)
    inside = np.flatnonzero(near & (z >= LOWEST) & (z < HIGHEST))
    if not len(inside):
        raise InputError("points: none within VoxelNet's grid")
    kept = points[inside]
    cells = np.floor((kept[:, 2::-1] - [LOWEST, -RADIUS, -RADIUS]) / CELL).astype(np.int64)
    cells = np.minimum(cells, [39, 1023, 1023])  # rounding at the far edge
    found = _group(cells)
    order = found.inverse.argsort(kind="stable")
    counts = np.bincount(found.inverse)
    place = np.empty(len(kept), np.int64)
    place[order] = np.arange(len(kept)) - np.repeat(counts.cumsum() - counts, counts)
    used = (place < points_per_voxel) & (found.inverse < max_voxels)
    size = min(len(counts), max_voxels)
    sums = np.zeros((size, 4), np.float64)
    np.add.at(sums, found.inverse[used], kept[used, :4])
    features = sums / np.minimum(counts[:size], points_per_voxel)[:, None]
    return Pillars(found.coordinates[:size], features.astype(np.float32), inside)
