"""Readers, superpixels and data modules; what is wrong is said in one line that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cohobate.core.errors import InputError
from cohobate.lidar.data import (
    Augment,
    Frame,
    ImageCloudData,
    LabelledCloudData,
    NuScenes,
    Precomputed,
    Simulator,
    Slic,
    Voxels,
    kitti,
    nuscenes,
    pair,
)
from cohobate.lidar.data.files import read_image, read_labels, read_sweep
from cohobate.lidar.data.module import label_lookup
from cohobate.lidar.data.nuscenes import read_rows
from cohobate.lidar.data.sets import read_scene
from cohobate.lidar.data.superpixels import compute, read_label_image, write_label_image

TINY: dict[str, Any] = {
    "crop": (64, 112),
    "superpixels": Slic(60, 6, 1),
    "augment": Augment(cuboid=0, scale=(0, 0), crop_pairs=0),
    "voxels": Voxels(0.2, True, 1.5),
}


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A copy of the scenes that may be damaged."""
    return Path(shutil.copytree(root, tmp_path / "copy"))


# --- nuScenes ---------------------------------------------------------------------------------


def test_published_splits() -> None:
    names = [f"scene-{n:04d}" for n in range(1, 1111)]
    count = {
        split: sum(nuscenes._in_split(name, split, Path(), {}) for name in names)
        for split in ("val", "verify", "mini_val")
    }
    assert count == {"val": 150, "verify": 100, "mini_val": 2}
    both = [
        n for n in names if all(nuscenes._in_split(n, s, Path(), {}) for s in ("val", "verify"))
    ]
    assert both == []


def test_label_shares_are_taken_by_scene(root: Path) -> None:
    reader = NuScenes(root)
    assert reader.scenes("train", 2) == ["sim-0001", "sim-0003", "sim-0005"]
    assert reader.scenes("val") == ["sim-0006", "sim-0007"]
    with pytest.raises(InputError, match="every 60"):
        reader.scenes("train", 60)
    with pytest.raises(InputError, match="unknown split 'tarin'"):
        reader.scenes("tarin")


def test_classes_of_raw_labels() -> None:
    lookup = label_lookup("nuscenes")
    assert lookup[[9, 14, 15, 16, 17, 2, 6, 24, 30]].tolist() == [1, 2, 3, 3, 4, 7, 7, 11, 16]
    assert (lookup[[0, 1, 5, 7, 8, 10, 11, 13, 19, 20, 29, 31]] == 0).all()
    assert [lookup[raw] for raw in nuscenes.TO_RAW] == list(range(17))
    lookup = label_lookup("semantic-kitti")
    assert lookup[[10, 252, 60, 256, 99, 81]].tolist() == [1, 1, 9, 5, 0, 19]
    assert lookup[[2, 100]].tolist() == [-1, -1]
    assert [lookup[raw] for raw in kitti.TO_RAW] == list(range(20))


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_table_is_read_row_by_row(tmp_path: Path, block: int) -> None:
    rows = [{"a": i, "b": "x]},[{" * (i % 3), "c": [1.5, -2]} for i in range(20)]
    path = tmp_path / "t.json"
    path.write_text("\n " + json.dumps(rows, indent=1) + "\n")
    assert list(read_rows(path, block)) == rows
    path.write_text("[]")
    assert list(read_rows(path, block)) == []


@pytest.mark.parametrize("text", ["", "[{", '[{"a": 1}, ', '{"a": 1}', "[1]", "x"])
def test_a_damaged_table_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sample.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"sample\.json"):
        list(read_rows(path))


def test_a_missing_table_or_row_is_named(copy: Path) -> None:
    poses = copy / "v1.0-sim" / "ego_pose.json"
    content = poses.read_text()
    poses.unlink()
    reader = NuScenes(copy)
    with pytest.raises(InputError, match=r"ego_pose\.json: no such table"):
        reader.frames(["sim-0000"])
    table = copy / "v1.0-sim" / "sample_data.json"
    poses.write_text(content)
    rows = [r for r in json.loads(table.read_text()) if not r["filename"].endswith("CAM_BACK.jpg")]
    table.write_text(json.dumps(rows))
    with pytest.raises(InputError, match="no CAM_BACK key frame"):
        NuScenes(copy).frames(["sim-0000"])
    with pytest.raises(InputError, match="no folder v1"):
        NuScenes(copy / "samples")
    with pytest.raises(InputError, match="no such folder of tables"):
        NuScenes(copy, "v1.0-trainval")


# --- files ------------------------------------------------------------------------------------


def test_bad_sweeps_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pcd.bin"
    for content, words in (
        (b"", "no points"),
        (b"1234567", "cut off"),
        (np.zeros(6, np.float32).tobytes(), "cut off"),
        (np.array([1, 2, np.nan, 4, 5], np.float32).tobytes(), "not finite"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"a\.pcd\.bin: .*{words}"):
            read_sweep(path)
    with pytest.raises(InputError, match=r"gone\.bin"):
        read_sweep(tmp_path / "gone.bin")


def test_bad_labels_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a_lidarseg.bin"
    path.write_bytes(bytes([1, 24, 32]))
    with pytest.raises(InputError, match=r"a_lidarseg\.bin: 3 labels for 4 points"):
        read_labels(path, 4, label_lookup("nuscenes"))
    with pytest.raises(InputError, match="label id 32 is not in the map"):
        read_labels(path, 3, label_lookup("nuscenes"))
    wide = tmp_path / "a.label"
    wide.write_bytes(np.array([(7 << 16) | 10, 2], np.uint32).tobytes())
    with pytest.raises(InputError, match=r"a\.label: label id 2 "):
        read_labels(wide, 2, label_lookup("semantic-kitti"))
    wide.write_bytes(np.array([(7 << 16) | 10, 252], np.uint32).tobytes())
    assert read_labels(wide, 2, label_lookup("semantic-kitti")).tolist() == [1, 1]


def test_bad_images_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    with pytest.raises(InputError, match=r"a\.jpg: no such image"):
        read_image(path)
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a\.jpg: damaged"):
        read_image(path)
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(path)
    with pytest.raises(InputError, match=r"a\.jpg: \(4, 6\) pixels"):
        read_image(path, (6, 4))


# --- superpixels ------------------------------------------------------------------------------


def test_superpixels_are_made_once_and_differ_by_their_settings(
    tmp_path: Path, frames: list[Frame]
) -> None:
    cameras, source = frames[0].cameras[:2], Slic(60, 6, 1)
    assert compute(cameras, source, tmp_path) == 2
    assert compute(cameras, source, tmp_path) == 0
    source.file(tmp_path, cameras[0]).unlink()  # as if a call had been stopped
    assert compute(cameras, source, tmp_path) == 1
    assert Slic(30, 6, 1).folder != source.folder
    assert Slic().folder == "superpixels_slic_150_6_3"
    labels = source.read(tmp_path, cameras[0])
    assert labels.shape == cameras[0].size
    assert 20 < labels.max() < 90
    assert labels.min() == 0


def test_many_labels_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "s.png"
    for count in (200, 300, 5000):
        labels = np.arange(count).reshape(-1, 100)
        write_label_image(path, labels)
        assert np.array_equal(read_label_image(path), labels)
    with pytest.raises(InputError, match=r"s\.png"):
        write_label_image(path, np.array([[70000]]))


def test_bad_superpixels_are_named(tmp_path: Path, frames: list[Frame]) -> None:
    camera, source = frames[0].cameras[0], Precomputed("masks")
    with pytest.raises(InputError, match="cohobate-lidar superpixels"):
        source.read(tmp_path, camera)
    with pytest.raises(InputError, match="no superpixels"):
        compute([camera], source, tmp_path)
    folder = tmp_path / "masks"
    folder.mkdir()
    for labels, words in (
        (np.zeros((4, 4), np.int32), r"\(4, 4\) pixels"),
        (np.full(camera.size, -1), "negative"),
        (np.full(camera.size, 10**6), "label 1000000"),
        (np.zeros(camera.size), "whole number"),
    ):
        np.save(folder / f"{camera.token}.npy", labels)
        with pytest.raises(InputError, match=words):
            source.read(tmp_path, camera)
    np.save(folder / f"{camera.token}.npy", np.zeros(camera.size, np.int16))
    assert source.read(tmp_path, camera).max() == 0


# --- KITTI ------------------------------------------------------------------------------------


@pytest.fixture
def kitti_root(tmp_path: Path) -> Path:
    base = tmp_path / "my_bin_velodyne" / "dataset"  # words that must not be replaced in a path
    rng = np.random.default_rng(0)
    for sequence, count in ((0, 3), (3, 2), (8, 1)):
        folder = base / "sequences" / f"{sequence:02d}"
        for name in ("velodyne", "labels"):
            (folder / name).mkdir(parents=True)
        for i in range(count):
            points = rng.standard_normal((50, 4)).astype(np.float32)
            (folder / "velodyne" / f"{i:06d}.bin").write_bytes(points.tobytes())
            labels = rng.choice([0, 10, 40, 252], 50).astype(np.uint32)
            (folder / "labels" / f"{i:06d}.label").write_bytes(labels.tobytes())
    return base.parent


def test_semantic_kitti_is_read(kitti_root: Path) -> None:
    frames = kitti.semantic_frames(kitti_root, "train")
    assert [f.token for f in frames] == [
        "00-000000",
        "00-000001",
        "00-000002",
        "03-000000",
        "03-000001",
    ]
    assert all(f.labels is not None and f.labels.exists() for f in frames)
    shares = kitti.semantic_frames(kitti_root, "train", 2)
    assert [f.token for f in shares] == ["00-000000", "00-000002", "03-000001"]
    assert [f.token for f in kitti.semantic_frames(kitti_root, "all")][5:] == ["08-000000"]
    with pytest.raises(InputError, match="test"):
        kitti.semantic_frames(kitti_root, "test")
    with pytest.raises(InputError, match=r"000000\.bin: no image belongs to this sweep"):
        read_scene(frames[0], Slic(), kitti_root)
    data = LabelledCloudData(kitti_root, "semantic-kitti", batch_size=2)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert data.intensity.shift == 1.0  # remission + 1
    assert len(data.class_names) == 20
    assert set(batch["labels"].tolist()) <= {0, 1, 9}


def test_a_kitti_image_is_paired(tmp_path: Path) -> None:
    folder = tmp_path / "training"
    for name in ("velodyne", "image_2", "calib"):
        (folder / name).mkdir(parents=True)
    points = np.array([[10, 0, 0, 0.5], [-10, 0, 0, 0.5], [10, 1, 1, 0.5]], np.float32)
    (folder / "velodyne" / "000000.bin").write_bytes(points.tobytes())
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / "image_2" / "000000.png")
    lines = {
        "P2": [100, 0, 30, 0, 0, 100, 20, 0, 0, 0, 1, 0],
        "R0_rect": [1, 0, 0, 0, 1, 0, 0, 0, 1],
        "Tr_velo_to_cam": [0, -1, 0, 0, 0, 0, -1, 0, 1, 0, 0, 0],
    }
    text = "".join(f"{name}: {' '.join(map(str, v))}\n" for name, v in lines.items())
    calibration = folder / "calib" / "000000.txt"
    calibration.write_text(text)
    (frame,) = kitti.object_frames(tmp_path)
    found = pair(points, frame.cameras)
    assert found.points.tolist() == [0, 2]
    assert found.pixels.tolist() == [[0, 20, 30], [0, 10, 20]]
    calibration.write_text(text.replace("R0_rect", "R1"))
    with pytest.raises(InputError, match=r"000000\.txt: no matrix 'R0_rect'"):
        kitti.object_frames(tmp_path)


# --- data modules -----------------------------------------------------------------------------


def images(root: Path, **more: Any) -> ImageCloudData:
    data = ImageCloudData(root, **{"batch_size": 2, **TINY, **more})
    data.prepare_data()
    data.setup("fit")
    return data


def test_pairs_of_a_batch_point_at_their_voxels_and_images(root: Path) -> None:
    data = images(root)
    whole = next(iter(data.val_dataloader()))
    coordinates = whole["inputs"][0]
    cloud = coordinates[whole["pairing_points"], 0]
    assert torch.equal(cloud, whole["pairing_pixels"][:, 0] // 6)
    assert coordinates[:, 0].unique().tolist() == [0, 1]
    assert whole["images"].shape == (12, 3, 64, 112)
    assert whole["superpixels"].shape == (12, 64, 112)
    assert whole["pairing_pixels"][:, 1].max() < 64
    one, again = (next(iter(data.train_dataloader())) for _ in range(2))
    assert torch.equal(one["images"], again["images"])
    assert torch.equal(one["inputs"][0], again["inputs"][0])


def test_pillars_pair_points(root: Path) -> None:
    batch = next(iter(images(root, form="pillars").val_dataloader()))
    coordinates, features, points = batch["inputs"]
    assert coordinates.shape[1] == points.shape[1] == features.shape[1] == 4
    cloud = points[batch["pairing_points"], 0]
    assert torch.equal(cloud.long(), batch["pairing_pixels"][:, 0] // 6)


def test_labels_of_a_batch_come_back_to_points(root: Path) -> None:
    data = LabelledCloudData(root, batch_size=2, voxels=Voxels(0.2, True, 1.5))
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    back = batch["labels"][batch["rows"]]
    assert len(back) == len(batch["point_labels"]) == sum(len(c) for c in batch["clouds"])
    assert (back == batch["point_labels"]).float().mean() > 0.9


def test_an_image_folder_that_fits_nothing_is_refused(copy: Path) -> None:
    table = copy / "v1.0-sim" / "calibrated_sensor.json"
    rows = json.loads(table.read_text())
    for row in rows:
        if row["sensor_token"] != "LIDAR_TOP":
            row["translation"] = [0, 0, 9000]
    table.write_text(json.dumps(rows))
    reader = NuScenes(copy)
    frame = reader.frames(["sim-0000"])[0]
    source = Slic(60, 6, 1)
    compute(frame.cameras, source, copy)
    with pytest.raises(InputError, match=r"LIDAR_TOP\.pcd\.bin: no point falls into any image"):
        read_scene(frame, source, copy)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="layout"):
        ImageCloudData(None, "kitti-object")
    with pytest.raises(InputError, match="no point labels"):
        LabelledCloudData(Path("."), "kitti-object")
    assert "SYNTHETIC" in LabelledCloudData().describe()
    assert "SYNTHETIC" in ImageCloudData(simulator=Simulator(train=3)).describe()
