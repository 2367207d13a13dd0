"""The readers on real recordings: a key frame of nuScenes and three frames of KITTI.

They may not be passed on with the code, so these tests are skipped where they are absent.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohobate.core.testing import run_command
from cohobate.lidar.data import Frame, NuScenes, Slic, Voxels, kitti, nuscenes, pair
from cohobate.lidar.data.files import read_image, read_sweep
from cohobate.lidar.data.projection import inverse, quaternion
from cohobate.lidar.data.voxels import voxelize

ROOT = Path(__file__).parents[2]
RECORDINGS = Path(os.environ.get("COHOBATE_RECORDINGS", ROOT.parent / "shared/data"))
NUSCENES, KITTI = RECORDINGS / "nuscenes_sample", RECORDINGS / "kitti_object"
needs_nuscenes = pytest.mark.skipif(not NUSCENES.is_dir(), reason="no recording of nuScenes")
needs_kitti = pytest.mark.skipif(not KITTI.is_dir(), reason="no recording of KITTI")

PAIRS = {
    "CAM_FRONT": 3056, "CAM_FRONT_RIGHT": 3076, "CAM_BACK_RIGHT": 3370, "CAM_BACK": 4822,
    "CAM_BACK_LEFT": 4091, "CAM_FRONT_LEFT": 3700,
}  # fmt: skip


@pytest.fixture(scope="module")
def real_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The key frame with the tables that the data set has for it."""
    root = tmp_path_factory.mktemp("recording") / "nuscenes"
    (info,) = json.loads((NUSCENES / "sample.json").read_text())["data_list"]
    lidar, to_world = info["lidar_points"], np.array(info["ego2global"])
    tables: dict[str, list[dict[str, Any]]] = {
        "scene": [{"token": "s", "name": "scene-0061", "first_sample_token": info["token"]}],
        "sample": [{"token": info["token"], "scene_token": "s", "timestamp": 0, "next": ""}],
    }

    def pose(token: str, motion: np.ndarray) -> dict[str, Any]:
        translation = motion[:3, 3].tolist()
        return {"token": token, "rotation": quaternion(motion[:3, :3]), "translation": translation}

    def record(channel: str, file: str, mount: np.ndarray, ego: np.ndarray, more: Any) -> None:
        path = Path("samples") / channel / file
        (root / path.parent).mkdir(parents=True)
        shutil.copy(NUSCENES / file, root / path)
        rows = {
            "sensor": {"token": channel, "channel": channel},
            "calibrated_sensor": pose(channel, mount) | {"sensor_token": channel, **more},
            "ego_pose": pose(channel, ego),
            "sample_data": {
                "token": channel, "sample_token": info["token"], "ego_pose_token": channel,
                "calibrated_sensor_token": channel, "filename": str(path), "is_key_frame": True,
                "height": 900, "width": 1600,
            },
        }  # fmt: skip
        for table, row in rows.items():
            tables.setdefault(table, []).append(row)

    to_car = np.array(lidar["lidar2ego"])
    record("LIDAR_TOP", lidar["lidar_path"], to_car, to_world, {"camera_intrinsic": []})
    for channel, camera in info["images"].items():
        mount = np.array(camera["cam2ego"])
        # the source has the whole chain; the car's pose at the image's time is what remains of it
        ego = to_world @ to_car @ np.linalg.inv(camera["lidar2cam"]) @ np.linalg.inv(mount)
        record(channel, camera["img_path"], mount, ego, {"camera_intrinsic": camera["cam2img"]})
    (root / "v1.0-mini").mkdir()
    for table, rows in tables.items():
        (root / f"v1.0-mini/{table}.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def key_frame(real_root: Path) -> Frame:
    reader = NuScenes(real_root)
    (frame,) = reader.frames(reader.scenes("mini_train"))
    return frame


@needs_nuscenes
def test_a_key_frame_of_nuscenes_is_paired(key_frame: Frame) -> None:
    points = read_sweep(key_frame.sweep)
    assert len(points) == 34_688
    assert tuple(camera.name for camera in key_frame.cameras) == nuscenes.CHANNELS
    found = pair(points, key_frame.cameras)
    counts = dict(zip(PAIRS, np.bincount(found.pixels[:, 0]).tolist(), strict=True))
    assert all(abs(counts[name] - PAIRS[name]) <= 3 for name in PAIRS), counts
    assert abs(len(np.unique(found.points)) - 20_184) <= 6
    for cylindrical, voxels in ((True, 15_947), (False, 17_885)):
        grouped = voxelize(points, Voxels(0.1, cylindrical))
        assert abs(len(grouped.coordinates) - voxels) <= 3


@needs_nuscenes
def test_the_car_moved_between_sweep_and_images(key_frame: Frame) -> None:
    """Without the poses at the images' times, pairs move by pixels: the chain has four motions."""
    points = read_sweep(key_frame.sweep)
    (info,) = json.loads((NUSCENES / "sample.json").read_text())["data_list"]
    moved = []
    for camera in key_frame.cameras:
        mount = inverse(np.array(info["images"][camera.name]["cam2ego"]))
        still = mount @ np.array(info["lidar_points"]["lidar2ego"])
        both = []
        for chain in (camera.from_lidar, still):
            places = points[:, :3] @ (camera.projection @ chain)[:, :3].T
            places += (camera.projection @ chain)[:, 3]
            both.append(places)
        near = (both[0][:, 2] > 1) & (both[1][:, 2] > 1)
        pixels = [p[near, :2] / p[near, 2:] for p in both]
        moved.append(float(np.median(np.abs(pixels[0] - pixels[1]).max(1))))
    assert max(moved) > 1


@needs_nuscenes
def test_superpixels_of_a_real_image(key_frame: Frame) -> None:
    camera = key_frame.cameras[0]
    labels = Slic().segment(read_image(camera.file, camera.size))
    assert 108 <= len(np.unique(labels)) <= 116
    assert labels.shape == camera.size == (900, 1600)


@needs_nuscenes
def test_the_pairs_of_a_real_frame_are_drawn(real_root: Path, tmp_path: Path) -> None:
    done = run_command("pairs", real_root, tmp_path, domain="lidar")
    assert done.code == 0, done.err
    assert "of 34688 points in an image" in done.out
    assert (tmp_path / "LIDAR_TOP_pairs.png").stat().st_size > 500_000


@needs_kitti
def test_points_of_kitti_fall_into_the_boxes_of_their_objects() -> None:
    """Points inside a labelled box in space lie inside the object's rectangle in the image."""
    inside, all_inside = [], 0
    for frame in kitti.object_frames(KITTI):
        points = read_sweep(frame.sweep)
        assert 115_000 <= len(points) <= 127_000
        (camera,) = frame.cameras
        found = pair(points, frame.cameras)
        assert 0.12 < len(found.points) / len(points) < 0.2
        place = points[found.points, :3] @ camera.from_lidar[:3, :3].T + camera.from_lidar[:3, 3]
        text = (KITTI / f"training/label_2/{frame.token}.txt").read_text()
        for line in text.splitlines():
            kind, *numbers = line.split()
            if kind == "DontCare":
                continue
            left, top, right, bottom, h, w, length, *middle, turn = map(float, numbers[3:14])
            near = place - middle
            along = np.cos(turn) * near[:, 0] - np.sin(turn) * near[:, 2]
            across = np.sin(turn) * near[:, 0] + np.cos(turn) * near[:, 2]
            own = (abs(along) < length / 2) & (abs(across) < w / 2)
            own &= (near[:, 1] < 0) & (near[:, 1] > -h)
            row, column = found.pixels[own, 1:].T
            within = (left - 1 <= column) & (column <= right + 1)
            inside.append(within & (top - 1 <= row) & (row <= bottom + 1))
            all_inside += len(row)
    assert all_inside > 100
    assert np.concatenate(inside).mean() > 0.97


@needs_kitti
def test_the_pairs_of_kitti_are_drawn(tmp_path: Path) -> None:
    done = run_command(
        "pairs", KITTI, tmp_path, "--layout=kitti-object", "--frames=3", domain="lidar"
    )
    assert done.code == 0, done.err
    assert len(list(tmp_path.glob("*_pairs.png"))) == 3
