"""SYNTHETIC driving scenes from seeds, written in the layout of nuScenes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cohobate.core.io import save_atomic
from cohobate.lidar.data.projection import quaternion, transform
from cohobate.lidar.data.raycast import cast
from cohobate.lidar.data.town import LOOK, Town, build

VERSION = "v1.0-sim"
AZIMUTHS = {
    "CAM_FRONT": 0, "CAM_FRONT_RIGHT": -55, "CAM_BACK_RIGHT": -110,
    "CAM_BACK": 180, "CAM_BACK_LEFT": 110, "CAM_FRONT_LEFT": 55,
}  # fmt: skip
Table = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Simulator:
    """A lidar with 32 beams and six cameras on a street.

    Args:
        train: Scenes to learn from, one frame each, seeds from 0.
        val: Scenes to evaluate on, the next seeds.
        azimuths: Lidar columns a turn; 1080 is full density.
        height: Of an image in pixels.
        width: Of an image in pixels.
        speed: Highest speed of the car, m/s.
        offset: Largest time between lidar and camera, seconds.
    """

    train: int = 120
    val: int = 30
    azimuths: int = 360
    height: int = 96
    width: int = 160
    speed: float = 10.0
    offset: float = 0.04

    def folder_name(self) -> str:
        """A name that tells these settings from others."""
        settings = json.dumps({"format": 1, **asdict(self)}, sort_keys=True)
        return f"sim-{sha256(settings.encode()).hexdigest()[:12]}"

    def jobs(self) -> int:
        """Processes that are worth starting for so many scenes."""
        return (os.cpu_count() or 1) if self.train + self.val > 40 else 1

    def write(self, root: Path, jobs: int = 1) -> Path:
        """Write all scenes; what is there already is kept.

        Args:
            root: Folder of the data set.
            jobs: Processes.

        Returns:
            ``root``.
        """
        tables = root / VERSION
        if (tables / "splits.json").exists():
            return root
        seeds = range(self.train + self.val)
        waiting = [seed for seed in seeds if not _fragment(root, seed).exists()]
        work = partial(write_frame, self, root)
        for _ in tqdm(_each(work, waiting, jobs), total=len(waiting), desc="simulating scenes"):
            pass
        merged: Table = {}
        for seed in seeds:
            for name, rows in json.loads(_fragment(root, seed).read_text()).items():
                merged.setdefault(name, []).extend(rows)
        merged["sensor"] = [
            {"token": name, "channel": name, "modality": "lidar" if "LIDAR" in name else "camera"}
            for name in ("LIDAR_TOP", *AZIMUTHS)
        ]
        for name, rows in merged.items():
            with save_atomic(tables / f"{name}.json") as temporary:
                temporary.write_text(json.dumps(rows))
        names = [f"sim-{seed:04d}" for seed in seeds]
        splits = {"train": names[: self.train], "val": names[self.train :]}
        with save_atomic(tables / "splits.json") as temporary:
            temporary.write_text(json.dumps(splits))
        return root


def _each(work: Any, items: Iterable[int], jobs: int) -> Iterable[Any]:
    if jobs <= 1:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, items)


def _fragment(root: Path, seed: int) -> Path:
    return root / "scenes" / f"{seed:04d}.json"


def write_frame(sim: Simulator, root: Path, seed: int) -> None:
    """Simulate one scene and write its files and its rows of the tables.

    Args:
        sim: The settings.
        root: Folder of the data set.
        seed: Fixes every byte.
    """
    rng = np.random.default_rng(seed)
    town = build(rng)
    drive = _Drive(rng, sim)
    name, start = f"sim-{seed:04d}", 1_600_000_000_000_000 + seed * 20_000_000
    sample = {"token": f"{name}-0", "scene_token": name, "timestamp": start, "next": "", "prev": ""}
    scene = {"token": name, "name": name, "first_sample_token": f"{name}-0", "nbr_samples": 1}
    rows: Table = {"scene": [scene], "sample": [sample]}

    def record(channel: str, file: str, mount: np.ndarray, time: float, camera: Any) -> str:
        token = f"{name}-{channel.lower().replace('_', '-')}"
        moved = drive.ego(time)
        rows.setdefault("sample_data", []).append({
            "token": token, "sample_token": f"{name}-0", "filename": file, "is_key_frame": True,
            "ego_pose_token": token, "calibrated_sensor_token": token,
            "timestamp": start + round(time * 1e6), "fileformat": Path(file).suffix[1:],
            "height": sim.height if camera else 0, "width": sim.width if camera else 0,
        })  # fmt: skip
        rows.setdefault("ego_pose", []).append(_pose(token, drive.place @ moved))
        sensor = _pose(token, mount) | {"sensor_token": channel, "camera_intrinsic": camera or []}
        rows.setdefault("calibrated_sensor", []).append(sensor)
        return token

    mount = transform(_yaw(-np.pi / 2), [0.94, 0, 1.84])
    points, labels = _sweep(town, sim, drive.ego(0.0) @ mount, rng)
    file = f"samples/LIDAR_TOP/{name}__LIDAR_TOP.pcd.bin"
    token = record("LIDAR_TOP", file, mount, 0.0, None)
    _write(root / file, points.astype(np.float32).tobytes())
    marks = f"lidarseg/{VERSION}/{token}_lidarseg.bin"
    _write(root / marks, labels.astype(np.uint8).tobytes())
    rows["lidarseg"] = [{"token": token, "sample_data_token": token, "filename": marks}]
    light = _Light(rng)
    for channel, azimuth in AZIMUTHS.items():
        time = rng.uniform(-sim.offset, sim.offset)
        mount = _camera_mount(np.radians(azimuth))
        focal = sim.width / 2 / np.tan(np.radians(110 if channel == "CAM_BACK" else 70) / 2)
        k = [[focal, 0.0, sim.width / 2], [0.0, focal, sim.height / 2], [0.0, 0.0, 1.0]]
        image, classes = _photo(town, sim, drive.ego(time) @ mount, focal, light)
        file = f"samples/{channel}/{name}__{channel}.jpg"
        token = record(channel, file, mount, time, k)
        with save_atomic(root / file) as temporary:
            Image.fromarray(image).save(temporary, quality=95)
        with save_atomic(root / "pixel_classes" / f"{token}.png") as temporary:
            Image.fromarray(classes.astype(np.uint8)).save(temporary)
    with save_atomic(_fragment(root, seed)) as temporary:
        temporary.write_text(json.dumps(rows))


class _Drive:
    """How the car moves: along an arc, somewhere in the world."""

    def __init__(self, rng: np.random.Generator, sim: Simulator) -> None:
        self.speed, self.turn = rng.uniform(0, sim.speed), rng.uniform(-0.2, 0.2)
        self.place = transform(_yaw(rng.uniform(-np.pi, np.pi)), [*rng.uniform(200, 2000, 2), 0])

    def ego(self, time: float) -> np.ndarray:
        """Car → street at a time (4, 4)."""
        angle = self.turn * time
        x, y = self.speed * time * np.cos(angle / 2), self.speed * time * np.sin(angle / 2)
        return transform(_yaw(angle), [x, y, 0])


class _Light:
    """Sun, sky and camera of one scene."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.ambient = rng.uniform(0.35, 0.6)
        height, way = rng.uniform(0.5, 1.2), rng.uniform(0, 2 * np.pi)
        self.sun = np.array(
            [np.cos(way) * np.cos(height), np.sin(way) * np.cos(height), np.sin(height)]
        )
        self.gain, self.tint = rng.uniform(0.65, 1.2), rng.normal(1, 0.06, 3)


def _sweep(
    town: Town, sim: Simulator, sensor: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """x, y, z, intensity, ring in the sensor's frame (N, 5), and raw labels (N,)."""
    up = np.radians(np.linspace(-30.67, 10.67, 32))
    around = np.linspace(-np.pi, np.pi, sim.azimuths, endpoint=False)
    ring, turn = (a.ravel() for a in np.meshgrid(np.arange(32), around, indexing="ij"))
    rays = np.stack(
        [np.cos(up[ring]) * np.cos(turn), np.cos(up[ring]) * np.sin(turn), np.sin(up[ring])], 1
    )
    world = rays @ sensor[:3, :3].T
    hits = cast(sensor[:3, 3], world, town.solids)
    labels = town.labels(hits)
    t = hits.distance + rng.normal(0, 0.02, len(rays))
    dropped = rng.random(len(rays)) < 0.05 + 0.25 * np.minimum(hits.distance / 50, 1) ** 2
    keep = (hits.distance < 50) & (hits.distance > 1.5) & ~dropped
    reflectivity = np.zeros(32)
    for label, (_, value, _, _) in LOOK.items():
        reflectivity[label] = value
    cosine = np.abs((world * hits.normal).sum(1))
    speckle = rng.lognormal(0, 0.35, len(rays))
    with np.errstate(under="ignore"):
        intensity = 255 * reflectivity[labels] * (0.3 + 0.7 * cosine) * np.exp(-t / 60) * speckle
    intensity = np.clip(np.rint(intensity), 0, 255)
    t = np.where(keep, t, 0)
    cloud = np.concatenate([rays * t[:, None], intensity[:, None], ring[:, None]], 1)
    return cloud[keep], labels[keep]


def _photo(
    town: Town, sim: Simulator, sensor: np.ndarray, focal: float, light: _Light
) -> tuple[np.ndarray, np.ndarray]:
    """RGB (H, W, 3), uint8, and raw labels of the pixels (H, W)."""
    v, u = np.mgrid[: sim.height, : sim.width]
    flat = [(u.ravel() - sim.width / 2) / focal, (v.ravel() - sim.height / 2) / focal]
    rays = np.stack([*flat, np.ones(u.size)], 1)
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    rays = rays @ sensor[:3, :3].T
    hits = cast(sensor[:3, 3], rays, town.solids)
    labels = town.labels(hits)
    sky = ~np.isfinite(hits.distance)
    shade = light.ambient + (1 - light.ambient) * np.clip(hits.normal @ light.sun, 0, None)
    colour = town.albedo(hits, labels) * shade[:, None]
    haze = 1 - np.exp(-np.where(sky, 0, hits.distance) / 120)
    colour = colour * (1 - haze[:, None]) + haze[:, None] * 0.7
    height = np.clip(rays[sky, 2:], 0, 1)
    colour[sky] = (1 - height) * [0.78, 0.84, 0.9] + height * [0.35, 0.55, 0.85]
    colour = colour * light.gain * light.tint + light.rng.normal(0, 0.015, colour.shape)
    image = np.rint(255 * np.clip(colour, 0, 1)).astype(np.uint8)
    return image.reshape(sim.height, sim.width, 3), labels.reshape(sim.height, sim.width)


def _camera_mount(azimuth: float) -> np.ndarray:
    """Camera (x right, y down, z forward) → car."""
    c, s = np.cos(azimuth), np.sin(azimuth)
    rotation = np.array([[s, 0, c], [-c, 0, s], [0, -1, 0]])
    return transform(rotation, [0.9 + c, s, 1.5])


def _yaw(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _pose(token: str, motion: np.ndarray) -> dict[str, Any]:
    rotation = quaternion(motion[:3, :3])
    return {"token": token, "rotation": rotation, "translation": motion[:3, 3].tolist()}


def _write(path: Path, content: bytes) -> None:
    with save_atomic(path) as temporary:
        temporary.write_bytes(content)
