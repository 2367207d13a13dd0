from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cohobate.core.errors import InputError
from cohobate.core.testing import assert_one_line, run_command
from cohobate.core.training.data import Draw
from cohobate.detection.dwpose import BODY, WHOLEBODY, PoseData, encode
from cohobate.detection.dwpose.data import Crops, collate
from cohobate.detection.dwpose.people import read_people
from cohobate.detection.dwpose.synthetic import KINDS, figures
from cohobate.detection.dwpose.transforms import Augment, Crop, crop_of, cut, moved

SIZE = (96, 128)


def entry(n, image=1, box=(10, 10, 40, 50), kind="body", **more):
    """An annotated person; every point at (30, 30)."""
    found = {"id": n, "image_id": image, "category_id": 1, "bbox": list(box), "area": 900.0,
             "keypoints": [30.0, 30.0, 2] * 17, "iscrowd": 0}  # fmt: skip
    if kind == "whole":
        for key, count in (("foot", 6), ("face", 68), ("lefthand", 21), ("righthand", 21)):
            found[f"{key}_kpts"] = [30.0, 30.0, 1] * count
    return found | more


@pytest.fixture
def folder(tmp_path):
    """COCO's layout; ``write(part, annotations)`` makes a part with two pictures of 80 × 64."""
    root = tmp_path / "people"

    def write(part, annotations, name="person_keypoints"):
        for n in (1, 2):
            file = root / f"{part}2017" / f"{n}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(n).integers(0, 255, (64, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
        content = {
            "images": [
                {"id": n, "file_name": f"{n}.png", "width": 80, "height": 64} for n in (1, 2)
            ],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "person", "keypoints": BODY.names, "skeleton": []}],
        }
        file = root / "annotations" / f"{name}_{part}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
        return root, file

    return write


def test_reads_coco_wholebody(mini):
    people, kinds = read_people(mini / "wholebody.json", mini / "images")
    assert kinds is WHOLEBODY
    assert len(people) == 14
    content = json.loads((mini / "wholebody.json").read_text())
    one = content["annotations"][1]
    np.testing.assert_array_equal(people.points[1, :17].ravel(), one["keypoints"])
    np.testing.assert_array_equal(people.points[1, 91:112].ravel(), one["lefthand_kpts"])
    assert people.areas[1] == one["area"]
    assert len(people.trainable()) == 12
    assert people.photos[0].read().shape == (425, 640, 3)


def test_trains_and_predicts_on_coco_wholebody(mini, tmp_path):
    done = run_command(
        "fit", "detection/dwpose/rtmpose", "--data.root", mini, "--out", tmp_path / "run",
        "--data.size=[64,64]", "--data.batch_size=4", "--data.num_workers=0",
        "--model.variant=micro", "--model.hidden=32", "--model.attention=16",
        "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1",
        "--trainer.enable_progress_bar=false", "--trainer.sync_batchnorm=false",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "133 key points" in json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    done = run_command(
        "predict", "detection/dwpose", mini / "images", "--checkpoint", tmp_path / "run",
        "--out", tmp_path / "out", "--openpose=true",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "poses.json").read_text())
    assert found["names"][1] == "neck"
    assert [len(p["keypoints"]) for one in found["people"].values() for p in one] == [134] * 4


def test_17_points_and_133_points(folder):
    root, _ = folder("train", [entry(1), entry(2, 2)])
    folder("val", [entry(1)])
    for other in ("captions", "instances"):
        (root / "annotations" / f"{other}_train2017.json").write_text("{}")
    data = PoseData(root, size=SIZE, batch_size=2)
    assert data.keypoints is BODY
    assert "2 train, 1 held out people, 17 key points" in data.describe()
    folder("train", [entry(1, kind="whole"), entry(2, 2, kind="whole")], "coco_wholebody")
    folder("val", [entry(1, kind="whole")], "coco_wholebody")
    data = PoseData(root, size=SIZE, batch_size=2)
    assert data.keypoints is WHOLEBODY
    batch = next(iter(data.train_dataloader()))
    assert batch.points.shape == (2, 133, 2)


def test_ubody_is_added(folder, tmp_path):
    root, file = folder("train", [entry(1, kind="whole"), entry(2, 2, kind="whole")])
    content = file.read_text()
    for scene in ("Fitness", "Singing"):
        target = tmp_path / "ubody" / "annotations" / scene / "keypoint_annotation.json"
        target.parent.mkdir(parents=True)
        target.write_text(content)
    data = PoseData(root, ubody=tmp_path / "ubody", size=SIZE, held_out=0.5)
    train = data.parts["train"]
    assert len(train) == 1 + 4
    assert train.photos[train.photo[-1]].path.parent.name == "Singing"
    with pytest.raises(InputError, match=r"no annotations/<scene>/keypoint_annotation\.json"):
        PoseData(root, ubody=tmp_path, size=SIZE)


def test_detected_boxes_for_evaluation(folder, tmp_path):
    root, _ = folder("train", [entry(1), entry(2, 2)])
    folder("val", [entry(1)])
    boxes = tmp_path / "boxes.json"
    rows = [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 30, 30], "score": 0.5},
        {"image_id": 1, "category_id": 3, "bbox": [0, 0, 30, 30], "score": 0.5},
        {"image_id": 9, "category_id": 1, "bbox": [0, 0, 30, 30], "score": 0.5},
        {"image_id": 2, "category_id": 1, "bbox": [0, 0, 0, 30], "score": 0.5},
    ]
    boxes.write_text(json.dumps(rows))
    data = PoseData(root, boxes=boxes, size=SIZE)
    assert len(data.boxed["test"]) == 1
    assert data.boxed["test"].scores.tolist() == [0.5]
    assert data.boxed["val"].points[0, 0].tolist() == [30, 30, 2]
    boxes.write_text("{}")
    with pytest.raises(InputError, match=r"boxes.json: not a list"):
        PoseData(root, boxes=boxes, size=SIZE)


def test_who_is_not_trained_on(folder):
    blank = [0.0, 0.0, 0] * 17
    root, _ = folder("train", [
        entry(1), entry(2, 2), entry(3, keypoints=blank), entry(4, box=(5, 5, 0, 10)),
        entry(5, iscrowd=1), entry(6, 2, box=(5, 5, -3, 10)),
    ])  # fmt: skip
    folder("val", [entry(1), entry(2, box=(5, 5, 0, 10)), entry(3, keypoints=blank)])
    data = PoseData(root, size=SIZE)
    assert len(data._train) == 2
    assert len(data.parts["val"]) == 3
    assert len(data.boxed["val"]) == 2
    with pytest.raises(InputError, match="nobody with a key point"):
        PoseData(folder("train", [entry(1, keypoints=blank)])[0], size=SIZE)


FAULTS = {
    "not JSON": "no json",
    "expected an object": "[]",
    "'annotations' is missing": {"images": []},
    "is of image 7, not listed": {"annotations": [entry(1, 7)]},
    "is not [x, y, width, height]": {"annotations": [entry(1, box=(1, 2, 3))]},
    "keypoints needs 51 numbers": {"annotations": [entry(1, keypoints=[1, 2, 3])]},
    "'foot_kpts' is missing": {"annotations": [entry(1, face_kpts=[0] * 204)]},
    "a key point is not a number": {"annotations": [entry(1, keypoints=[float("nan"), 0, 2] * 17)]},
    "a box is not a number": {"annotations": [entry(1, box=(float("inf"), 0, 2, 3))]},
    "0 categories name key points": {"categories": []},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused_in_one_line(folder, fault):
    _, file = folder("train", [entry(1)])
    change = FAULTS[fault]
    if isinstance(change, str):
        file.write_text(change)
    elif "annotations" in change or "categories" in change:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        file.write_text(json.dumps(change))
    done = run_command("fit", "detection/dwpose/rtmpose", "--data.root", file.parents[1])
    assert_one_line(done, file, fault)


def test_a_damaged_picture_is_named(folder):
    root, _ = folder("train", [entry(1)])
    folder("val", [entry(1)])
    bad = root / "train2017" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    crops = PoseData(root, size=SIZE, batch_size=1).train_dataloader().dataset
    with pytest.raises(InputError, match=r"1.png: not a picture"):
        crops[0]


@pytest.mark.parametrize("box", [(0, 0, 104, 136), (20.5, 30.25, 40, 30), (-20, -30, 50, 200)])
def test_points_come_back_from_the_crop(box):
    crop = crop_of(np.array(box, np.float64), SIZE)
    points = np.random.default_rng(0).uniform(0, 100, (5, 2))
    inside = moved(points, crop.matrix(SIZE, 104))
    np.testing.assert_allclose(crop.back(inside, SIZE), points)
    assert crop.extent[0] / crop.extent[1] == pytest.approx(SIZE[0] / SIZE[1])


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("angle", [0.0, 30.0, -75.0])
def test_pixels_and_points_move_together(angle, mirrored):
    pixels = np.zeros((136, 104, 3), np.uint8)
    spots = np.array([[40, 50], [70, 90], [52, 68]])
    for n, (x, y) in enumerate(spots):
        pixels[y - 1 : y + 2, x - 1 : x + 2, n] = 255
    centre = np.array([103 - 52.0 if mirrored else 52.0, 68.0])
    crop = Crop(centre, np.array([78.0, 104.0]), angle, mirrored)
    image = cut(pixels, crop, SIZE).astype(float)
    wanted = moved(spots.astype(float), crop.matrix(SIZE, 104))
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    for n, place in enumerate(wanted):
        weight = image[..., n]
        found = [(x * weight).sum() / weight.sum(), (y * weight).sum() / weight.sum()]
        np.testing.assert_allclose(found, place, atol=0.15)


def test_a_mirror_image_exchanges_left_and_right():
    people = figures(1, 5)
    augment = Augment(flip=1.0, half_body=0.0, shift_chance=0.0, scale=(1, 1), rotate_chance=0.0)
    rng = np.random.default_rng(0)
    crop, points = augment.place(people.boxes[0], people.points[0], KINDS, 104, SIZE, rng)
    assert crop.mirrored
    np.testing.assert_array_equal(points, people.points[0][KINDS.flip])
    # the person's left is at our right, and in the mirror its left is again at our right
    there = moved(points[:, :2], crop.matrix(SIZE, 104))
    left, right = (KINDS.names.index(f"{side}_shoulder") for side in ("left", "right"))
    assert (there[left, 0] > there[right, 0]) == (
        people.points[0, left, 0] > people.points[0, right, 0]
    )


def test_augmentation_is_a_function_of_the_draw():
    crops = Crops(figures(2, 0), KINDS, SIZE, Augment())
    one, other, third = crops[Draw(1, 7)], crops[Draw(1, 7)], crops[Draw(1, 8)]
    np.testing.assert_array_equal(one.image, other.image)
    assert not np.array_equal(one.image, third.image)


def test_every_augmentation_keeps_images_and_labels_sane():
    crops = Crops(figures(4, 0), KINDS, SIZE, Augment(blur=1.0, half_body=1.0))
    for seed in range(12):
        batch = collate([crops[Draw(n, seed)] for n in range(4)])
        assert batch.images.shape == (4, 3, 128, 96)
        assert batch.images.isfinite().all()
        labels, weight = encode(batch.points, batch.visible, SIZE)
        assert (weight <= batch.visible).all()
        assert all(axis.isfinite().all() for axis in labels)
        outside = ((batch.points < -30) | (batch.points > 160)).any(-1)
        assert (weight[outside] == 0).all()


def test_the_milder_augmentation_begins_at_its_epoch():
    data = PoseData(size=SIZE, batch_size=4, late_epoch=1)
    crops = data.train_dataloader().dataset
    first = crops[Draw(0, 3)].image
    crops.sampler.set_epoch(1)
    late = crops[Draw(0, 3)].image
    assert not np.array_equal(first, late)


def test_the_synthetic_people_are_the_same_every_time():
    one, other = figures(2, 3), figures.__wrapped__(2, 3)
    np.testing.assert_array_equal(one.points, other.points)
    np.testing.assert_array_equal(one.photos[1].read(), other.photos[1].read())
    assert set(np.unique(one.points[..., 2])) <= {0, 1, 2}
    assert "SYNTHETIC" in PoseData(size=SIZE).describe()


def test_a_batch_moves_to_a_device():
    batch = collate([Crops(figures(1, 0), KINDS, SIZE)[0]])
    assert batch.to("meta").images.device == torch.device("meta")
