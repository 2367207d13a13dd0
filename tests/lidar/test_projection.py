"""Pairing, voxels and joint transforms against the recorded official ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.lidar.data.projection import (
    Camera,
    Pairing,
    inverse,
    pair,
    pinhole,
    quaternion,
    rotation_matrix,
    transform,
)
from cohobate.lidar.data.transforms import (
    Augment,
    Scene,
    augment,
    crop,
    drop_cuboid,
    fit_size,
    flip,
)
from cohobate.lidar.data.voxels import Voxels, voxelize, voxelize_box

Recorded = Callable[[str], dict[str, Any]]


def arrays(z: dict[str, Any]) -> dict[str, np.ndarray]:
    return {key: np.asarray(value) for key, value in z.items()}


def cameras(z: dict[str, np.ndarray]) -> list[Camera]:
    to_world = transform(z["ego2global_lidar_q"], z["ego2global_lidar_t"])
    to_world = to_world @ transform(z["lidar2ego_q"], z["lidar2ego_t"])
    found = []
    for i in range(len(z["intrinsics"])):
        from_world = inverse(transform(z["ego2global_cam_q"][i], z["ego2global_cam_t"][i]))
        from_car = inverse(transform(z["cam2ego_q"][i], z["cam2ego_t"][i]))
        chain = from_car @ from_world @ to_world
        size = tuple(z["image_hw"].tolist())
        found.append(Camera(str(i), str(i), Path(), chain, pinhole(z["intrinsics"][i]), size))
    return found


@pytest.mark.parametrize("case", ["a", "b"])
def test_pairs_equal_the_recorded_ones(case: str, recorded: Recorded) -> None:
    z = arrays(recorded(f"projection_{case}"))
    found = pair(z["points"], cameras(z), float(z["min_depth"]))
    assert np.array_equal(found.points, z["pairing_points"])
    differing = (found.pixels != z["pairing_images"]).any(1).mean()
    assert differing < 1e-3  # the recording rounds in float32


def test_a_quaternion_there_and_back() -> None:
    rng = np.random.default_rng(0)
    for q in [*rng.standard_normal((20, 4)), *np.eye(4), *(np.eye(4) + 1e-9)]:
        matrix = rotation_matrix(q)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(rotation_matrix(quaternion(matrix)), matrix, atol=1e-12)


def test_what_is_behind_or_at_the_border_is_no_pair() -> None:
    camera = Camera(
        "c", "c", Path(), np.eye(4), pinhole([[10, 0, 0], [0, 10, 0], [0, 0, 1]]), (21, 21)
    )
    points = np.array([[1, 1, 1.0], [1, 1, -2], [2, 2, 2], [4, 4, 2], [0, 1, 2], [0.5, 0.7, 2]])
    found = pair(points, [camera])
    # too near, behind, inside, at the right border, at the left border, inside; halves to even
    assert found.points.tolist() == [2, 5]
    assert found.pixels.tolist() == [[0, 10, 10], [0, 4, 2]]
    with pytest.raises(InputError, match="not finite"):
        pair(np.array([[np.nan, 0, 0]]), [camera])


@pytest.mark.parametrize("case", ["a", "b"])
def test_voxels_equal_the_recorded_ones(case: str, recorded: Recorded) -> None:
    z = arrays(recorded(f"voxelize_{case}"))
    found = voxelize(z["points"], Voxels(float(z["voxel_size"]), bool(z["cylindrical"])))
    assert np.array_equal(found.coordinates[found.inverse], z["voxel_coords"][z["inverse"]])
    assert set(found.kept.tolist()) == set(z["kept_index"].tolist())
    assert (np.diff(found.kept) > 0).all()


def test_voxels_of_nothing_and_of_nan() -> None:
    with pytest.raises(InputError, match="empty"):
        voxelize(np.zeros((0, 3)), Voxels())
    with pytest.raises(InputError, match="not finite"):
        voxelize(np.array([[0, np.inf, 0]]), Voxels())


def test_the_box_keeps_ten_points_a_voxel_and_what_is_inside() -> None:
    inside = np.tile([[0.01, 0.02, 0.03, 1.0]], (12, 1))
    inside[:, 3] = np.arange(12)
    outside = np.array([[60.0, 0, 0, 1], [40, 40, 0, 1], [0, 0, 4, 1], [0, 0, -6, 1]])
    found = voxelize_box(np.concatenate([outside, inside]).astype(np.float32))
    assert found.inside.tolist() == list(range(4, 16))
    assert found.coordinates.tolist() == [[25, 512, 512]]
    np.testing.assert_allclose(found.features, [[0.01, 0.02, 0.03, 4.5]], rtol=1e-5)
    with pytest.raises(InputError, match="none within"):
        voxelize_box(outside.astype(np.float32))


def scene(z: dict[str, np.ndarray]) -> Scene:
    return Scene(
        np.zeros((1, 4), np.float32),
        torch.from_numpy(z["images"]),
        torch.from_numpy(z["superpixels"].astype(np.int32)),
        Pairing(z["pairing_points"], z["pairing_images"]),
    )


@pytest.mark.parametrize("case", ["a", "b"])
def test_image_transforms_equal_the_recorded_ones(case: str, recorded: Recorded) -> None:
    z = arrays(recorded(f"image_transforms_{case}"))
    size = tuple(z["crop_size"].tolist())
    cropped = crop(scene(z), z["crop_params_ijhw"], size)
    turned = flip(cropped, np.ones(len(z["images"]), bool))
    whole = fit_size(scene(z), size)
    for name, found in (("crop", cropped), ("flip", turned), ("center", whole)):
        points = z.get(f"{name}_pairing_points", z["crop_pairing_points"])
        assert np.array_equal(found.pairing.points, points), name
        assert np.array_equal(found.pairing.pixels, z[f"{name}_pairing_images"]), name
        assert np.array_equal(found.superpixels.numpy(), z[f"{name}_superpixels"]), name
        np.testing.assert_allclose(found.images.numpy(), z[f"{name}_images"], atol=1e-4)


@pytest.mark.parametrize("case", ["a", "b"])
def test_a_dropped_cuboid_equals_the_recorded_one(case: str, recorded: Recorded) -> None:
    z = arrays(recorded(f"drop_cuboid_{case}"))
    before = Scene(
        np.concatenate([z["points"], z["feats"]], 1),
        torch.zeros(int(z["n_images"]), 3, 1, 1),
        torch.zeros(1, 1, 1),
        Pairing(z["pairing_points"], z["pairing_images"]),
    )
    after = drop_cuboid(before, 0.2 * float(z["u"]), int(z["center_index"]))
    assert np.array_equal(after.points, np.concatenate([z["out_points"], z["out_feats"]], 1))
    assert np.array_equal(after.pairing.points, z["out_pairing_points"])
    assert np.array_equal(after.pairing.pixels, z["out_pairing_images"])


def test_augmentation_is_a_function_of_the_draw_and_keeps_pairs_together(
    recorded: Recorded,
) -> None:
    z = arrays(recorded("image_transforms_a"))
    cloud = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32)
    # each pixel knows its place, so a moved pair can be checked against it
    rows, columns = np.mgrid[:24, :40]
    place = (rows * 40 + columns).astype(np.int32)
    base = scene(z)
    marked = Scene(cloud, base.images, torch.from_numpy(np.stack([place] * 2)), base.pairing)
    how = Augment(scale=(0, 0), crop_pairs=0)
    found = [augment(marked, how, (14, 26), np.random.default_rng(s)) for s in (3, 3, 4)]
    assert torch.equal(found[0].images, found[1].images)
    assert not torch.equal(found[0].images, found[2].images)
    before = {
        (p, i, r * 40 + c)
        for p, (i, r, c) in zip(marked.pairing.points, marked.pairing.pixels, strict=True)
    }
    image, row, column = found[0].pairing.pixels.T
    labels = found[0].superpixels.numpy()[image, row, column]
    assert len(found[0].pairing.points) > 20
    assert set(zip(found[0].pairing.points, image, labels, strict=True)) <= before


def test_a_crop_without_pairs_ends() -> None:
    empty = Pairing(np.zeros(0, np.int64), np.zeros((0, 3), np.int64))
    blank = Scene(
        np.ones((4, 4), np.float32), torch.zeros(1, 3, 30, 50), torch.zeros(1, 30, 50), empty
    )
    found = augment(blank, Augment(), (14, 26), np.random.default_rng(0))
    assert found.images.shape == (1, 3, 14, 26)
