"""A random street: what stands where, of which class and colour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cohobate.lidar.data.raycast import Hits, Primitive

BARRIER, CAR, BUS, TRUCK, PEDESTRIAN, CONE = 9, 17, 16, 23, 2, 12
ROAD, SIDEWALK, TERRAIN, MANMADE, VEGETATION = 24, 26, 27, 28, 30
"""Raw nuScenes label ids."""

# Class → base colour, lidar reflectivity, texture frequency (1/m) and amplitude.
LOOK: dict[int, tuple[tuple[float, float, float], float, float, float]] = {
    BARRIER: ((0.85, 0.40, 0.20), 0.60, 2.0, 0.08),
    CAR: ((0.35, 0.38, 0.55), 0.45, 0.7, 0.05),
    BUS: ((0.75, 0.62, 0.15), 0.50, 0.5, 0.05),
    TRUCK: ((0.60, 0.60, 0.62), 0.40, 0.6, 0.06),
    PEDESTRIAN: ((0.45, 0.25, 0.28), 0.30, 4.0, 0.15),
    CONE: ((0.95, 0.45, 0.10), 0.70, 3.0, 0.06),
    ROAD: ((0.30, 0.30, 0.31), 0.15, 5.0, 0.06),
    SIDEWALK: ((0.55, 0.53, 0.50), 0.28, 1.5, 0.10),
    TERRAIN: ((0.35, 0.42, 0.22), 0.35, 3.0, 0.15),
    MANMADE: ((0.58, 0.48, 0.42), 0.35, 0.8, 0.12),
    VEGETATION: ((0.20, 0.38, 0.14), 0.40, 6.0, 0.25),
}


@dataclass(frozen=True)
class Town:
    """A street and what stands along it.

    Attributes:
        solids: Everything but the ground.
        bend: b of the road's middle ``y = b x²``.
        road: Half width of the road, metres.
        walk: Width of the sidewalks, metres.
    """

    solids: list[Primitive]
    bend: float
    road: float
    walk: float

    def ground_label(self, places: np.ndarray) -> np.ndarray:
        """Class of the ground at x, y (R, ≥ 2)."""
        side = np.abs(places[:, 1] - self.bend * places[:, 0] ** 2)
        return np.where(
            side < self.road, ROAD, np.where(side < self.road + self.walk, SIDEWALK, TERRAIN)
        )

    def labels(self, hits: Hits) -> np.ndarray:
        """Class of every hit (R,); 0 for the sky."""
        of_solids = np.array([solid.label for solid in self.solids] + [0])
        found = np.where(
            hits.primitive >= 0, of_solids[hits.primitive], self.ground_label(hits.local)
        )
        return np.where(np.isfinite(hits.distance), found, 0)

    def albedo(self, hits: Hits, labels: np.ndarray) -> np.ndarray:
        """Colour of every hit without light (R, 3)."""
        colours = np.array([solid.colour for solid in self.solids] + [(0.0, 0.0, 0.0)])
        own = colours[hits.primitive]
        base, frequency, strength = np.zeros((32, 3)), np.ones(32), np.zeros(32)
        for label, (colour, _, f, a) in LOOK.items():
            base[label], frequency[label], strength[label] = colour, f, a
        own = np.where((hits.primitive < 0)[:, None], base[labels], own)
        noise = _lattice(np.where(np.isfinite(hits.local), hits.local, 0), frequency[labels])
        own = own * (1 + strength[labels] * (2 * noise - 1))[:, None]
        x, y, z = hits.local.T
        upright = np.abs(hits.normal[:, 2]) < 0.5
        window = (labels == MANMADE) & upright & ((x + y) % 2.2 < 1.2) & (z % 2.8 < 1.5)
        own[window] *= 0.45
        own[(labels == BARRIER) & (x % 0.6 < 0.3)] = (0.9, 0.9, 0.88)
        middle = (labels == ROAD) & (np.abs(y - self.bend * x**2) < 0.12) & (x % 6 < 3)
        own[middle] = (0.85, 0.85, 0.8)
        return own


def build(rng: np.random.Generator) -> Town:
    """Draw a street.

    Args:
        rng: Where every draw comes from.
    """
    bend, road, walk = rng.uniform(-0.002, 0.002), rng.uniform(4.5, 8), rng.uniform(2, 3.5)
    maker = _Maker(rng, bend)
    for side in (-1, 1):
        maker.buildings(side, road + walk)
        maker.plants(side, road, walk)
        maker.street_furniture(side, road, walk)
    maker.cones(road)
    maker.vehicles(road)
    return Town(maker.solids, bend, road, walk)


class _Maker:
    """Collects solids; places are along the bent road."""

    def __init__(self, rng: np.random.Generator, bend: float) -> None:
        self.rng, self.bend = rng, bend
        self.solids: list[Primitive] = []

    def add(
        self, kind: str, label: int, x: float, side: float, low: float, half: tuple[float, ...],
        colour: np.ndarray | None = None, yaw: float | None = None,
    ) -> None:  # fmt: skip
        """Put a solid at x along the road and ``side`` across it, its foot at height ``low``."""
        if colour is None:
            colour = self.colour(label)
        turn = np.arctan(2 * self.bend * x) if yaw is None else yaw
        centre = np.array([x, side + self.bend * x * x, low + half[2]])
        self.solids.append(Primitive(kind, label, centre, np.array(half), turn, colour))  # type: ignore[arg-type]

    def colour(self, label: int) -> np.ndarray:
        return np.clip(np.array(LOOK[label][0]) + self.rng.normal(0, 0.04, 3), 0.02, 1)

    def buildings(self, side: int, edge: float) -> None:
        rng, x = self.rng, -55.0
        while x < 55:
            length, depth, height = rng.uniform(6, 18), rng.uniform(4, 8), rng.uniform(3, 12)
            back, gap, there = rng.uniform(1.5, 8), rng.uniform(1, 10), rng.random() < 0.75
            if there:
                half = (length / 2, depth / 2, height / 2)
                self.add("box", MANMADE, x + length / 2, side * (edge + back + depth / 2), 0, half)
            x += length + gap

    def plants(self, side: int, road: float, walk: float) -> None:
        rng = self.rng
        for _ in range(rng.integers(3, 9)):
            x, out = rng.uniform(-45, 45), road + walk + rng.uniform(0.2, 3)
            radius, height, crown = (
                rng.uniform(0.1, 0.25),
                rng.uniform(1.6, 3.2),
                rng.uniform(0.8, 2.2),
            )
            self.add("cylinder", VEGETATION, x, side * out, 0, (radius, radius, height / 2))
            half = (crown, crown, crown * rng.uniform(0.7, 1.2))
            self.add("ellipsoid", VEGETATION, x, side * out, height - 0.3, half)
        for _ in range(rng.integers(1, 5)):
            x, out = rng.uniform(-45, 45), road + walk + rng.uniform(0.3, 4)
            half = (rng.uniform(0.5, 1.3), rng.uniform(0.4, 0.9), rng.uniform(0.4, 0.8))
            self.add("ellipsoid", VEGETATION, x, side * out, -0.1, half)

    def street_furniture(self, side: int, road: float, walk: float) -> None:
        rng = self.rng
        for _ in range(rng.integers(1, 4)):
            radius, height = rng.uniform(0.07, 0.15), rng.uniform(3, 7)
            x, out = rng.uniform(-45, 45), road + rng.uniform(0.2, 0.6)
            self.add("cylinder", MANMADE, x, side * out, 0, (radius, radius, height / 2))
        for _ in range(rng.integers(1, 6)):
            radius, height = rng.uniform(0.22, 0.35), rng.uniform(1.5, 1.9)
            x, out = rng.uniform(-30, 30), road + rng.uniform(0.4, walk)
            self.add("cylinder", PEDESTRIAN, x, side * out, 0, (radius, radius, height / 2))
        if rng.random() < 0.5:
            x = rng.uniform(-30, 20)
            for k in range(rng.integers(2, 6)):
                self.add("box", BARRIER, x + 2.1 * k, side * (road - 0.3), 0, (1.0, 0.15, 0.5))

    def cones(self, road: float) -> None:
        for _ in range(self.rng.integers(0, 6)):
            x, side = self.rng.uniform(-25, 25), self.rng.uniform(-road, road)
            if abs(x) > 4 or abs(side) > 2:
                self.add("cylinder", CONE, x, side, 0, (0.2, 0.2, 0.375))

    def vehicles(self, road: float) -> None:
        rng = self.rng
        taken = [(0.0, 0.0, 4.0)]  # the ego
        for _ in range(rng.integers(6, 14)):
            half = rng.uniform(1.9, 2.4) if (car := rng.random() < 0.75) else rng.uniform(3.2, 5)
            for _ in range(20):
                x, lane = rng.uniform(-40, 40), rng.choice([-0.76, -0.31, 0.31, 0.76]) * road
                if all(abs(x - a) > half + r + 0.5 or abs(lane - b) > 2.2 for a, b, r in taken):
                    taken.append((x, lane, half))
                    self.vehicle(car, x, lane, half)
                    break

    def vehicle(self, car: bool, x: float, lane: float, half: float) -> None:
        rng = self.rng
        yaw = np.arctan(2 * self.bend * x) + rng.normal(0, 0.02)
        if car:
            colour = np.clip(self.colour(CAR) + rng.normal(0, 0.15, 3), 0.02, 1)
            self.add("box", CAR, x, lane, 0.25, (half, 0.9, 0.35), colour, yaw)
            self.add("box", CAR, x - 0.2, lane, 0.95, (half * 0.55, 0.8, 0.28), colour * 0.8, yaw)
        elif rng.random() < 0.5:
            tall = rng.uniform(2.6, 3.4) / 2
            self.add("box", TRUCK, x - 0.9, lane, 0.4, (half - 0.9, 1.2, tall), None, yaw)
            self.add("box", TRUCK, x + half - 0.8, lane, 0.4, (0.8, 1.1, tall * 0.75), None, yaw)
        else:
            self.add("box", BUS, x, lane, 0.3, (half, 1.25, rng.uniform(2.6, 3.4) / 2), None, yaw)


def _lattice(places: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """A fixed random number in [0, 1) for every cell of a lattice (R,)."""
    cell = np.floor(places * frequency[:, None])
    wave = np.sin(cell @ np.array([12.9898, 78.233, 37.719])) * 43758.5453
    return wave - np.floor(wave)
