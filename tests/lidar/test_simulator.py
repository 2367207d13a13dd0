"""The simulated scenes: bytes from seeds, and pairs whose point and pixel have one class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cohobate.lidar.data import simulator
from cohobate.lidar.data.nuscenes import Frame, NuScenes
from cohobate.lidar.data.projection import Camera, inverse, pair, transform
from cohobate.lidar.data.simulator import Simulator, write_frame


def agreement(root: Path, frames: list[Frame], change: Callable[[Camera], Camera]) -> float:
    """Share of pairs whose point and pixel have the same class."""
    right = []
    for frame in frames:
        points = np.fromfile(frame.sweep, np.float32).reshape(-1, 5)
        assert frame.labels is not None
        labels = np.fromfile(frame.labels, np.uint8)
        pixels = [
            np.asarray(Image.open(root / "pixel_classes" / f"{c.token}.png")) for c in frame.cameras
        ]
        found = pair(points, [change(camera) for camera in frame.cameras])
        right.append(labels[found.points] == np.stack(pixels)[tuple(found.pixels.T)])
    found_any = np.concatenate(right)
    return float(found_any.mean()) if len(found_any) else 0.0


def test_point_and_pixel_of_a_pair_have_one_class(root: Path, frames: list[Frame]) -> None:
    assert agreement(root, frames, lambda camera: camera) >= 0.93


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NuScenes]:
    """A car at 15 m/s whose cameras fire up to 0.2 s early or late."""

    class Steady(simulator._Drive):
        def __init__(self, rng: np.random.Generator, sim: Simulator) -> None:
            super().__init__(rng, sim)
            self.speed = sim.speed

    root = tmp_path_factory.mktemp("fast")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulator, "_Drive", Steady)
        Simulator(train=8, val=1, speed=15, offset=0.2).write(root)
    return root, NuScenes(root)


def without(reader: NuScenes, camera: Camera, part: str) -> Camera:
    """A camera whose chain leaves one motion out."""
    sensors = next(
        s for s in reader._sample_data.values() if camera.token in [r["token"] for r in s.values()]
    )
    lidar, own = sensors["LIDAR_TOP"], sensors[camera.name]
    motions = {
        "lidar to car": reader._pose("calibrated_sensor", lidar),
        "car to world": reader._pose("ego_pose", lidar),
        "world to car": inverse(reader._pose("ego_pose", own)),
        "car to camera": inverse(reader._pose("calibrated_sensor", own)),
    }
    if part == "own time":  # the lidar's ego pose for the cameras too
        motions["world to car"] = inverse(motions["car to world"])
    elif part == "camera translation":
        mount = reader._row("calibrated_sensor", own["calibrated_sensor_token"])
        motions["car to camera"] = inverse(transform(mount["rotation"], [0, 0, 0]))
    elif part:
        motions[part] = np.eye(4)
    chain = np.eye(4)
    for motion in motions.values():
        chain = motion @ chain
    return replace(camera, from_lidar=chain)


def test_every_motion_of_the_chain_is_needed(fast: tuple[Path, NuScenes]) -> None:
    root, reader = fast
    frames = reader.frames(reader.scenes("all"))
    full = agreement(root, frames, lambda camera: without(reader, camera, ""))
    assert full >= 0.93
    assert full == agreement(root, frames, lambda camera: camera)
    for part in ("lidar to car", "car to world", "world to car", "car to camera"):
        assert agreement(root, frames, lambda c, p=part: without(reader, c, p)) < 0.5, part  # type: ignore[misc]
    for part in ("lidar to car", "camera translation"):
        assert agreement(root, frames, lambda c, p=part: without(reader, c, p)) < 0.3, part  # type: ignore[misc]
    assert agreement(root, frames, lambda c: without(reader, c, "own time")) < full - 0.1


def test_a_seed_fixes_every_byte(tmp_path: Path, root: Path, sim: Simulator) -> None:
    write_frame(sim, tmp_path, 1)
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 1 + 6 + 6 + 1 + 1
    for path in made:
        assert path.read_bytes() == (root / path.relative_to(tmp_path)).read_bytes(), path


def test_what_is_simulated_is_kept_and_goes_on(tmp_path: Path) -> None:
    small = Simulator(train=1, val=1, azimuths=90, height=24, width=40)
    small.write(tmp_path)
    sweep = next(tmp_path.rglob("sim-0000*.pcd.bin"))
    before = sweep.stat().st_mtime_ns
    (tmp_path / "scenes" / "0001.json").unlink()
    (tmp_path / "v1.0-sim" / "splits.json").unlink()
    small.write(tmp_path)
    assert sweep.stat().st_mtime_ns == before
    assert (tmp_path / "v1.0-sim" / "splits.json").exists()
    assert small.folder_name() != Simulator().folder_name()


def test_a_sweep_looks_like_one(frames: list[Frame]) -> None:
    counts = [len(np.fromfile(f.sweep, np.float32)) // 5 for f in frames]
    assert 8000 < np.mean(counts) < 11000
    points = np.fromfile(frames[0].sweep, np.float32).reshape(-1, 5)
    distance = np.linalg.norm(points[:, :3], axis=1)
    assert distance.min() > 1.3
    assert distance.max() < 50.2
    assert points[:, 3].min() >= 0
    assert points[:, 3].max() <= 255
    assert set(np.unique(points[:, 4])) <= set(range(32))
