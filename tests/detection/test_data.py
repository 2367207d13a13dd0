from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cohobate.core.errors import InputError
from cohobate.core.testing import golden
from cohobate.core.training.data import Draw
from cohobate.detection.boxes import to_xyxy
from cohobate.detection.data import Augment, DetectionData, multiscale_sizes, synthetic
from cohobate.detection.data.annotations import read_picture
from cohobate.detection.data.coco import COCO_CATEGORIES


def data(root, **options):
    return DetectionData(root, size=64, batch_size=2, **options)


def test_any_ids_are_numbered_from_0(coco):
    made = data(coco)
    assert [(c.id, c.name) for c in made.categories] == [(1, "disc"), (7, "box"), (90, "triangle")]
    first, second, third, _ = made.parts["train"].pictures
    assert first.labels.tolist() == [0, 2]
    assert first.boxes.tolist() == [[10, 10, 30, 30], [30, 20, 70, 60]]  # the empty box is left out
    assert second.boxes.tolist() == [[0, 0, 20, 20]]  # clipped; the one outside is left out
    assert second.crowd.tolist() == [[0, 0, 80, 64]]
    assert third.boxes.shape == (0, 4)
    assert made.parts["val"].pictures is made.parts["test"].pictures
    assert "4 train, 2 held out images, classes disc, box, triangle" in made.describe()


def test_voc_files(voc):
    made = data(voc)
    assert [c.name for c in made.categories] == ["cell"]
    assert [len(made.parts[p].pictures) for p in ("train", "val")] == [3, 2]
    assert made.parts["train"].pictures[0].boxes.tolist() == [[10, 5, 40, 50]]


def test_yolo_folders_and_a_part_of_training_for_validation(yolo):
    made = data(yolo)
    assert [c.name for c in made.categories] == ["cat", "dog"]
    assert [len(made.parts[p].pictures) for p in ("train", "val")] == [2, 1]
    all_pictures = [*made.parts["train"].pictures, *made.parts["val"].pictures]
    first = next(p for p in all_pictures if p.name == "0.png")
    np.testing.assert_allclose(first.boxes, [[30, 16, 50, 48], [0, 0, 24, 19.2]], rtol=1e-6)
    assert first.labels.tolist() == [1, 0]


def test_validation_kept_from_training_leaves_the_sets_own_part_for_the_test(voc):
    made = data(voc, held_out=0.34)
    names = {part: {p.name for p in made.parts[part].pictures} for part in made.parts}
    assert names["test"] == {"a3.jpg", "a4.jpg"}
    assert len(names["train"]) == 2
    assert len(names["val"]) == 1
    assert not names["train"] & names["val"]


def test_a_batch_is_a_function_of_the_seed(coco):
    made = [data(coco, seed=3).train_dataloader() for _ in range(2)]
    for loader in made:
        loader.sampler if hasattr(loader, "sampler") else None
    one, other = (next(iter(loader)) for loader in made)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.targets.boxes, other.targets.boxes)
    assert one.images.shape == (2, 3, 64, 64)
    assert one.images.min() >= 0
    assert one.images.max() <= 1
    corners = to_xyxy(one.targets.boxes[one.targets.valid])
    assert (corners >= -1e-6).all()
    assert (corners <= 1 + 1e-6).all()


def test_evaluation_keeps_all_boxes_at_their_place(coco):
    batch = next(iter(data(coco).val_dataloader()))
    assert batch.sizes.tolist() == [[80, 64], [80, 64]]
    corners = to_xyxy(batch.targets.boxes[0]) * torch.tensor([80.0, 64.0, 80.0, 64.0])
    np.testing.assert_allclose(corners, batch.pictures[0].boxes, atol=1e-4)


def test_strong_augmentation_and_sizes_stop(coco):
    made = DetectionData(coco, size=96, batch_size=4, multiscale=1, stop_epoch=2)
    loader = made.train_dataloader()
    images = loader.dataset
    draw = Draw(0, seed=5)
    images.sampler.set_epoch(1)
    strong = images[draw].image
    sizes = {next(iter(_epoch(made, n))).images.shape[-1] for n in range(2)}
    images.sampler.set_epoch(2)
    assert not images.first_stage
    assert not torch.equal(strong, images[draw].image)
    late = {next(iter(_epoch(made, n))).images.shape[-1] for n in range(2, 6)}
    assert late == {96}
    assert sizes <= {64, 96, 128} or sizes <= set(multiscale_sizes(96, 1))


def _epoch(made, number):
    loader = made.train_dataloader()
    loader.dataset.sampler.set_epoch(number)
    return loader


def test_flips_mirror_the_boxes():
    from cohobate.detection.data.transforms import ToInput

    pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
    pixels[:, 4:12, 2:10] = 255
    boxes, labels = torch.tensor([[2.0, 4.0, 10.0, 12.0]]), torch.tensor([0])
    flipped = ToInput(32, Augment(0, 0, 1, 0, flip=1.0))(pixels, boxes, labels, 0, strong=False)
    assert flipped[0][0, 5, 25] == 1.0
    torch.testing.assert_close(
        to_xyxy(flipped[1]) * 32, torch.tensor([[22.0, 4.0, 30.0, 12.0]]), atol=1e-4, rtol=0
    )


def test_sizes_of_the_official_code():
    from pathlib import Path

    record = golden(Path(__file__).parent / "d_fine" / "golden" / "multiscale.json")
    for name, sizes in record.items():
        base, repeat = (int(n) for n in name.split(","))
        assert multiscale_sizes(base, repeat) == sizes


def test_images_are_shrunk_when_read(coco):
    made = data(coco, longest=40)
    sample = made.val_dataloader().dataset._read(0)
    assert sample[0].shape == (3, 32, 40)
    assert sample[1].tolist() == [[5, 5, 15, 15], [15, 10, 35, 30]]


def test_the_embedded_set_says_what_it_is():
    made = DetectionData(size=96)
    assert made.describe().startswith("SYNTHETIC")
    again = synthetic.shapes(3, 1)
    for one, other in zip(again.pictures, made.parts["train"].pictures, strict=False):
        assert np.array_equal(one.pixels, other.pixels)
        assert (one.boxes[:, 2:] > one.boxes[:, :2]).all()


def test_cocos_own_classes():
    assert len(COCO_CATEGORIES) == 80
    assert (COCO_CATEGORIES[0].name, COCO_CATEGORIES[-1]) == ("person", COCO_CATEGORIES[79])
    assert COCO_CATEGORIES[79].id == 90
    assert COCO_CATEGORIES[11].id == 13


def broken(coco, change):
    file = coco / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return coco


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("categories"), "'categories' is missing"),
        (lambda c: c["annotations"][0].pop("bbox"), "'bbox' is missing"),
        (lambda c: c["images"][0].pop("file_name"), "'file_name' is missing"),
        (lambda c: c["annotations"][0].update(category_id=5), "category_id 5 is not among"),
        (lambda c: c["annotations"][0].update(image_id=99), "image 99, not listed"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), "is not [x, y, width, height]"),
        (lambda c: c["annotations"][0].update(bbox=[0, 0, float("nan"), 4]), "no number"),
        (lambda c: c["categories"][0].update(id=1), "the same id"),
    ],
)
def test_a_faulty_json_is_named(coco, change, words):
    with pytest.raises(InputError) as error:
        data(broken(coco, change))
    assert "instances_train2017.json" in str(error.value)
    assert words in str(error.value)


def test_a_json_cut_off_is_named(coco):
    file = coco / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(InputError, match="not JSON"):
        data(coco)


def test_a_damaged_picture_is_named(coco):
    path = coco / "train2017" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    loader = data(coco).train_dataloader()
    with pytest.raises(InputError, match=r"1\.png: not a picture"):
        loader.dataset[0]


def test_a_jpeg_cut_off_is_named(voc):
    path = voc / "images" / "a1.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"a1\.jpg: not a picture that can be read: .*truncated"):
        data(voc).train_dataloader().dataset[1]


def test_a_pixel_that_is_no_number_is_named(tmp_path):
    pixels = np.full((4, 4), 7.0, np.float32)
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    assert (read_picture(tmp_path / "x.tif") == 7).all()
    pixels[1, 2] = np.nan
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif: not a picture that can be read: a pixel is no"):
        read_picture(tmp_path / "x.tif")


def test_a_picture_of_another_size_is_named(coco, picture):
    picture(coco / "train2017" / "1.png", size=(40, 40))
    with pytest.raises(InputError, match="40 × 40 pixels, its annotation says 80 × 64"):
        data(coco).train_dataloader().dataset[0]


@pytest.mark.parametrize(
    ("line", "words"), [("0 0.5 0.5 0.1", "not 'class cx"), ("5 0.5 0.5 0.1 0.1", "class 5")]
)
def test_a_faulty_yolo_line_is_named(yolo, line, words):
    (yolo / "labels" / "train" / "1.txt").write_text(line)
    with pytest.raises(InputError, match=rf"1\.txt:1: .*{words}"):
        data(yolo)


def test_a_faulty_xml_is_named(voc):
    (voc / "annotations" / "a1.xml").write_text("<annotation><size>")
    with pytest.raises(InputError, match=r"a1\.xml: not a VOC annotation"):
        data(voc)


def test_a_folder_with_nothing_is_named(tmp_path):
    with pytest.raises(InputError, match="no COCO JSON, VOC XML or a YOLO YAML"):
        data(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        data(tmp_path / "none")
    with pytest.raises(InputError, match="multiple of 32"):
        DetectionData(size=50)
