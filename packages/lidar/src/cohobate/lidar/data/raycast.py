"""Rays against boxes, cylinders, ellipsoids and the ground."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Primitive:
    """An upright solid.

    Attributes:
        kind: Its shape.
        label: Its class.
        centre: (3,), metres.
        half: Half sizes along its own axes (3,); of a cylinder radius, radius, half height.
        yaw: Turn about z, radians.
        colour: RGB (3,).
    """

    kind: Literal["box", "cylinder", "ellipsoid"]
    label: int
    centre: np.ndarray
    half: np.ndarray
    yaw: float
    colour: np.ndarray


class Hits(NamedTuple):
    """The nearest hit of each ray.

    Attributes:
        distance: Metres (R,); infinite for none.
        primitive: Index of the primitive (R,), −1 for the ground or none.
        normal: Unit normal (R, 3).
        local: Where, in the primitive's own frame (R, 3); on the ground the place itself.
    """

    distance: np.ndarray
    primitive: np.ndarray
    normal: np.ndarray
    local: np.ndarray


def cast(origin: np.ndarray, rays: np.ndarray, primitives: list[Primitive]) -> Hits:
    """Follow rays to the nearest primitive or to the ground z = 0.

    Args:
        origin: Where all rays start (3,).
        rays: Unit directions (R, 3).
        primitives: The solids; the loop is over them, never over rays.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ground = np.where(rays[:, 2] < 0, -origin[2] / rays[:, 2], np.inf)
    distance = ground
    index = np.full(len(rays), -1)
    normal = np.tile([0.0, 0.0, 1.0], (len(rays), 1))
    local = np.where(np.isfinite(ground), ground, 0.0)[:, None] * rays + origin
    for number, solid in enumerate(primitives):
        near = np.flatnonzero(_near(origin, rays, solid, distance))
        if not len(near):
            continue
        c, s = np.cos(solid.yaw), np.sin(solid.yaw)
        turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        start, way = turn @ (origin - solid.centre), rays[near] @ turn.T
        t, own_normal = _SHAPES[solid.kind](start, way, solid.half)
        closer = t < distance[near]
        hit, t = near[closer], t[closer]
        distance[hit], index[hit] = t, number
        normal[hit] = own_normal[closer] @ turn
        local[hit] = start + t[:, None] * way[closer]
    return Hits(distance, index, normal, local)


def _near(
    origin: np.ndarray, rays: np.ndarray, solid: Primitive, distance: np.ndarray
) -> np.ndarray:
    """Rays that pass the bounding sphere before what they have hit already."""
    towards = solid.centre - origin
    radius = np.linalg.norm(solid.half)
    along = rays @ towards
    return (
        (towards @ towards - along**2 < radius**2) & (along > -radius) & (along - radius < distance)
    )


def _box(start: np.ndarray, way: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(divide="ignore", invalid="ignore"):
        one, two = (-half - start) / way, (half - start) / way
    entry, exit_ = np.fmin(one, two), np.fmax(one, two)
    axis = entry.argmax(1)
    t = entry.max(1)
    t = np.where((t < exit_.min(1)) & (t > 0), t, np.inf)
    normal = np.zeros_like(way)
    rows = np.arange(len(way))
    normal[rows, axis] = -np.sign(way[rows, axis])
    return t, normal


def _cylinder(
    start: np.ndarray, way: np.ndarray, half: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    a = (way[:, :2] ** 2).sum(1)
    b = way[:, :2] @ start[:2]
    c = start[:2] @ start[:2] - half[0] ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        side = (-b - np.sqrt(b * b - a * c)) / a
        height = np.abs(start[2] + side * way[:, 2])
        side = np.where((side > 0) & (height <= half[2]), side, np.inf)
        cap = (half[2] - start[2]) / way[:, 2]
        across = ((start[:2] + cap[:, None] * way[:, :2]) ** 2).sum(1)
    cap = np.where((cap > 0) & (way[:, 2] < 0) & (across <= half[0] ** 2), cap, np.inf)
    t = np.fmin(side, cap)
    where = start + np.where(np.isfinite(t), t, 0)[:, None] * way
    normal = np.where(
        (cap < side)[:, None], [0.0, 0.0, 1.0], where * [1 / half[0], 1 / half[0], 0.0]
    )
    return t, normal


def _ellipsoid(
    start: np.ndarray, way: np.ndarray, half: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    o, d = start / half, way / half
    a, b, c = (d * d).sum(1), d @ o, o @ o - 1
    with np.errstate(invalid="ignore"):
        t = (-b - np.sqrt(b * b - a * c)) / a
        t = np.where(t > 0, t, np.inf)
    normal = (o + np.where(np.isfinite(t), t, 0)[:, None] * d) / half
    return t, normal / np.linalg.norm(normal, axis=1, keepdims=True)


_SHAPES = {"box": _box, "cylinder": _cylinder, "ellipsoid": _ellipsoid}
