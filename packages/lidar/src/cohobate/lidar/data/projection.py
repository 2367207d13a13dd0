"""Which point falls into which pixel of which camera."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cohobate.core.errors import InputError

MIN_DEPTH = 1.0


class Pairing(NamedTuple):
    """Points and the pixels they fall into; a point in two images stands there twice.

    Attributes:
        points: Index of the point (P,).
        pixels: Image, row and column (P, 3).
    """

    points: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class Camera:
    """An image with its way from the lidar's frame to pixels.

    Attributes:
        name: Channel, such as ``CAM_FRONT``.
        token: What the image is called in the data set; superpixels are stored under it.
        file: The image.
        from_lidar: Lidar frame → camera frame, z forward (4, 4), at the times of both sensors.
        projection: Camera frame → homogeneous pixel (3, 4).
        size: Height and width in pixels.
    """

    name: str
    token: str
    file: Path
    from_lidar: np.ndarray
    projection: np.ndarray
    size: tuple[int, int]


def rotation_matrix(quaternion: Sequence[float] | np.ndarray) -> np.ndarray:
    """Rotation (3, 3) of a quaternion w, x, y, z, which is scaled to norm 1 first.

    Example:
        >>> rotation_matrix([0.0, 0.0, 0.0, 2.0]).round(1)[0].tolist()
        [-1.0, 0.0, 0.0]
    """
    q = np.asarray(quaternion, dtype=np.float64)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion(rotation: np.ndarray) -> list[float]:
    """Quaternion w, x, y, z of a rotation (3, 3)."""
    m = np.asarray(rotation, dtype=np.float64)
    trace = np.array([m.trace(), *np.diag(m)])
    largest = int(trace.argmax())
    if largest == 0:
        q = [1 + trace[0], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]]
    else:
        i = largest - 1
        j, k = (i + 1) % 3, (i + 2) % 3
        q = [0.0, 0.0, 0.0, 0.0]
        q[0], q[i + 1] = m[k, j] - m[j, k], 1 + 2 * m[i, i] - m.trace()
        q[j + 1], q[k + 1] = m[j, i] + m[i, j], m[k, i] + m[i, k]
    scaled = np.array(q) / np.linalg.norm(q)
    return [float(value) for value in scaled]


def transform(rotation: np.ndarray, translation: Sequence[float] | np.ndarray) -> np.ndarray:
    """Rigid motion (4, 4) ``x ↦ R x + t``; the rotation is a matrix or a quaternion."""
    matrix = np.eye(4)
    rotation = np.asarray(rotation, dtype=np.float64)
    matrix[:3, :3] = rotation if rotation.shape == (3, 3) else rotation_matrix(rotation)
    matrix[:3, 3] = translation
    return matrix


def inverse(motion: np.ndarray) -> np.ndarray:
    """The motion back."""
    matrix = np.eye(4)
    matrix[:3, :3] = motion[:3, :3].T
    matrix[:3, 3] = -motion[:3, :3].T @ motion[:3, 3]
    return matrix


def pinhole(intrinsics: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Projection (3, 4) of a camera matrix K (3, 3)."""
    return np.hstack([np.asarray(intrinsics, dtype=np.float64), np.zeros((3, 1))])


def pair(points: np.ndarray, cameras: Sequence[Camera], min_depth: float = MIN_DEPTH) -> Pairing:
    """Project a cloud into images.

    A point counts where its depth exceeds ``min_depth`` and ``0 < u < W − 1``, ``0 < v < H − 1``.
    Occlusion is not tested.

    Args:
        points: x, y, z in metres in the lidar's frame (N, ≥ 3).
        cameras: The images; their order is that of the indices.
        min_depth: Metres in front of the camera.

    Returns:
        The pairs, camera by camera, in each in the order of the points. Pixels are rounded to the
        nearest, halves to even.

    Raises:
        InputError: A point is not finite.

    References:
        Sautier et al., arXiv:2203.16258, section 3.1.

    Differences:
        Float64 throughout; the official code computes in float32, which rounds fewer than one pair
        in a thousand to another pixel.
    """
    xyz = np.asarray(points)[:, :3].astype(np.float64)
    if not np.isfinite(xyz).all():
        raise InputError("points: a coordinate is not finite")
    if not cameras:
        return Pairing(np.zeros(0, np.int64), np.zeros((0, 3), np.int64))
    matrices = np.stack([camera.projection @ camera.from_lidar for camera in cameras])
    u, v, depth = np.moveaxis(xyz @ matrices[:, :, :3].mT + matrices[:, None, :, 3], -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        u, v = u / depth, v / depth
    height, width = np.array([camera.size for camera in cameras]).T[:, :, None]
    seen = (depth > min_depth) & (u > 0) & (u < width - 1) & (v > 0) & (v < height - 1)
    image, point = seen.nonzero()
    row, column = np.rint(v[seen]), np.rint(u[seen])
    return Pairing(point, np.stack([image, row, column], 1).astype(np.int64))
