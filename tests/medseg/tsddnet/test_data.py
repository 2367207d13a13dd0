"""Readers, folds, hiding and perturbing; every bad file ends in one line that names it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cohobate.core.errors import InputError
from cohobate.core.training.data import Draw
from cohobate.medseg.tsddnet import UltrasoundData, synthetic
from cohobate.medseg.tsddnet.data import Augment, Lesions, Split, balanced, perturb, place
from cohobate.medseg.tsddnet.readers import (
    Samples,
    duplicates,
    groups,
    parse_box,
    read,
    read_busi,
)

HEADER = ["image", "class", "x1", "y1", "x2", "y2", "patient"]


def manifest(root: Path, rows: list[list], header: list[str] = HEADER) -> Path:
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for row in rows:
        path = root / str(row[0])
        if not path.exists():
            Image.fromarray(rng.integers(0, 255, (48, 64)).astype(np.uint8)).save(path)
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return root / "manifest.csv"


# --- readers --------------------------------------------------------------------------------------


def test_busi_gives_classes_and_mask_boxes(busi):
    (busi / "normal").mkdir()
    found = read(busi)
    assert len(found) == 24
    assert found.class_names == ["benign", "malignant"]
    assert found.names[:3] == ["benign (1)", "benign (2)", "benign (3)"], "by number, not by text"
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    np.testing.assert_array_equal(sides[found.labels == 0], [[24, 16]] * 12)
    np.testing.assert_array_equal(sides[found.labels == 1], [[16, 24]] * 12)


def test_several_masks_make_one_box_or_the_largest(tmp_path):
    folder = tmp_path / "benign"
    folder.mkdir()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(folder / "benign (1).png")
    for name, box in (("_mask", (5, 5, 15, 15)), ("_mask_1", (40, 30, 60, 50))):
        mask = np.zeros((64, 64), np.uint8)
        mask[box[1] : box[3], box[0] : box[2]] = 255
        Image.fromarray(mask).save(folder / f"benign (1){name}.png")
    assert read_busi(tmp_path, ["benign"]).boxes.tolist() == [[5, 5, 60, 50]]
    assert read_busi(tmp_path, ["benign"], "largest").boxes.tolist() == [[40, 30, 60, 50]]


def test_a_manifest_with_and_without_boxes(tmp_path):
    path = manifest(
        tmp_path,
        [["a.png", "m", 1, 2, 30, 40, "p1"], ["b.png", "b", "", "", "", "", "p1"]],
    )
    found = read(path)
    assert found.class_names == ["b", "m"]
    assert found.labels.tolist() == [1, 0]
    assert found.boxes[0].tolist() == [1, 2, 30, 40]
    assert np.isnan(found.boxes[1]).all()
    assert found.patients == ["p1", "p1"]
    assert read(tmp_path, ["m", "b"]).labels.tolist() == [0, 1]


BAD = [
    (["a.png", "m", 5, 5, 5, 9, ""], "box 5, 5, 5, 9: has no area"),
    (["a.png", "m", 0, 0, 90, 9, ""], r"box 0, 0, 90, 9: outside the image \(64 × 48\)"),
    (["a.png", "m", -1, 0, 9, 9, ""], "outside the image"),
    (["a.png", "m", "nan", 0, 9, 9, ""], "not four numbers"),
    (["a.png", "m", "x", 0, 9, 9, ""], "not four numbers"),
    (["a.png", "m", "", 0, 9, 9, ""], "not four numbers"),
    (["a.png", "z", 0, 0, 9, 9, ""], r"class 'z' is not in \['b', 'm'\]"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[m for _, m in BAD])
def test_a_bad_line_is_named(tmp_path, row, message):
    path = manifest(tmp_path, [["b.png", "b", "", "", "", "", ""], row])
    with pytest.raises(InputError, match=f"manifest.csv line 3: {message}|line 3: .*{message}"):
        read(path, ["b", "m"])


def test_other_bad_manifests(tmp_path):
    with pytest.raises(InputError, match="no column 'x2'"):
        read(manifest(tmp_path / "a", [["a.png", "m"]], ["image", "class", "x1", "y1"]))
    one = manifest(tmp_path / "b", [["a.png", "m", "", "", "", "", ""]])
    with pytest.raises(InputError, match=r"1 classes \(m\), two are needed"):
        read(one)
    twice = [["a.png", "m", "", "", "", "", ""], ["a.png", "b", "", "", "", "", ""]]
    with pytest.raises(InputError, match=r"a\.png stands on two lines"):
        read(manifest(tmp_path / "c", twice))
    gone = manifest(tmp_path / "d", [["a.png", "m", "", "", "", "", ""], twice[1]])
    (tmp_path / "d" / "a.png").unlink()
    with pytest.raises(InputError, match=r"line 2: no image a\.png"):
        read(gone)
    (tmp_path / "e.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"e\.csv: cannot be read"):
        read(tmp_path / "e.csv")


def test_bad_images_and_masks(busi):
    with pytest.raises(InputError, match="no such file or folder"):
        read(busi / "nowhere")
    (busi / "benign" / "benign (3).png").write_bytes(b"text")
    with pytest.raises(InputError, match=r"benign \(3\)\.png: not a readable image"):
        read(busi)
    Image.new("L", (31, 64)).save(busi / "benign" / "benign (3).png")
    with pytest.raises(InputError, match=r"benign \(3\)\.png: 31 × 64 pixels, at least 32"):
        read(busi)
    Image.new("L", (64, 64)).save(busi / "benign" / "benign (3).png")
    with pytest.raises(InputError, match=r"benign \(3\)_mask\.png: .* pixels, its image has"):
        read(busi)
    Image.new("L", (64, 64)).save(busi / "benign" / "benign (3)_mask.png")
    with pytest.raises(InputError, match=r"benign \(3\)_mask\.png: the mask is empty"):
        read(busi)
    (busi / "benign" / "benign (3)_mask.png").unlink()
    with pytest.raises(InputError, match=r"benign \(3\)_mask\.png: no such mask"):
        read(busi)
    with pytest.raises(InputError, match="malign: no such folder"):
        read(busi, ["benign", "malign"])


# --- folds ----------------------------------------------------------------------------------------


def test_a_patient_is_in_one_part_and_every_image_is_tested_once():
    labels = np.arange(60) % 2
    group = np.arange(60) // 2 // 2 * 2 + labels  # two images each
    tested = []
    for fold in range(1, 6):
        train, val, test = Split(fold).apply(labels, group)
        parts = [set(group[p]) for p in (train, val, test)]
        assert not parts[0] & parts[1]
        assert not parts[0] & parts[2]
        assert not parts[1] & parts[2]
        assert sorted([*train, *val, *test]) == list(range(60))
        assert abs(labels[test].mean() - 0.5) < 0.2
        tested += list(test)
    assert sorted(tested) == list(range(60))


def test_duplicates_stay_together_or_are_dropped(busi):
    twin = np.asarray(Image.open(busi / "benign" / "benign (2).png")).copy()
    twin[:4] = np.clip(twin[:4].astype(int) + 2, 0, 255)  # nearly the same
    for suffix in ("", "_mask"):
        source = Image.open(busi / "benign" / f"benign (2){suffix}.png")
        source.save(busi / "malignant" / f"malignant (13){suffix}.png")
    Image.fromarray(twin).save(busi / "malignant" / "malignant (13).png")
    samples = read(busi)
    a, b = samples.names.index("benign (2)"), samples.names.index("malignant (13)")
    assert duplicates(samples.images, 6).sum() == len(samples) + 2
    together = groups(samples, 6)
    assert together[a] == together[b]
    assert len(set(together)) == len(samples) - 1
    assert len(set(groups(samples, None))) == len(samples)
    data = UltrasoundData(root=busi, image_size=64, duplicates="drop")
    assert len(data.train) + len(data.val) + len(data.test) == len(samples) - 1


def test_too_few_patients(busi):
    with pytest.raises(InputError, match=r"12 images in the smaller class: too few for 20 folds"):
        UltrasoundData(root=busi, image_size=64, split=Split(folds=20))
    with pytest.raises(InputError, match="no fold 6 of 5"):
        UltrasoundData(root=busi, image_size=64, split=Split(fold=6))


def test_inner_folds_keep_patients_and_cover_all(busi):
    data = UltrasoundData(root=busi, image_size=64, cross_fit=3)
    assert set(data.train.fold) == {0, 1, 2}


# --- hiding and perturbing ------------------------------------------------------------------------


def make(busi, **options) -> UltrasoundData:
    return UltrasoundData(root=busi, image_size=64, **options)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_share_of_the_training_boxes_is_hidden_in_each_class(busi, share):
    data = make(busi, hidden=share)
    drawn = np.isfinite(data.train.boxes).all(1)
    for label in (0, 1):
        mine = data.train.samples.labels == label
        assert (~drawn[mine]).sum() == round(share * mine.sum())
    assert np.isfinite(data.test.boxes).all()
    assert np.isfinite(data.val.boxes).all()
    again, other = make(busi, hidden=share), make(busi, hidden=share, seed=1)
    np.testing.assert_array_equal(data.train.boxes, again.train.boxes)
    assert not np.array_equal(drawn, np.isfinite(other.train.boxes).all(1))


def test_boxes_are_perturbed_within_bounds_and_test_boxes_are_not(busi):
    data = make(busi, coarse=0.25)
    for part in (data.train, data.val):
        true = part.samples.boxes * part.scale[:, None]
        sides = np.tile(true[:, 2:] - true[:, :2], 2)
        moved = np.abs(part.boxes - true) / sides
        assert moved.max() <= 0.25 + 1e-6
        assert moved.max() > 0.1
    np.testing.assert_array_equal(data.test.boxes, data.test.samples.boxes)


def test_a_perturbed_box_stays_in_the_image_and_keeps_its_area():
    boxes = np.array([[0.0, 0, 3, 3], [np.nan] * 4, [40, 40, 64, 64]], dtype=np.float32)
    size = np.array([[64.0, 64]] * 3)
    for seed in range(20):
        moved = perturb(boxes, size, 0.49, np.random.default_rng(seed))
        assert np.isnan(moved[1]).all()
        real = moved[[0, 2]]
        assert real.min() >= 0
        assert real.max() <= 64
        assert (real[:, 2:] - real[:, :2] >= 2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 1.0}, "hidden 1.0"),
        ({"coarse": 0.6}, "coarse"),
        ({"cross_fit": 1}, "cross_fit 1"),
    ],
)
def test_options_out_of_range(busi, options, message):
    with pytest.raises(InputError, match=message):
        make(busi, **options)


# --- batches --------------------------------------------------------------------------------------


def test_the_canvas_keeps_proportions_and_boxes_follow():
    image = np.arange(100 * 50, dtype=np.uint8).reshape(100, 50)
    canvas, scale, size = place(image, 64)
    assert (scale, size) == (0.64, (64, 32))
    assert canvas[:, 32:].max() == 0


def test_a_box_at_the_edge_of_the_canvas_is_in_the_image():
    """384 × 251 pixels become 128 × 84, which is 252 of the image's rows."""
    images = [np.zeros(shape, np.uint8) for shape in ((251, 384), (384, 251), (333, 77))]
    none = np.full((3, 4), np.nan, dtype=np.float32)
    names = ["a", "b", "c"]
    part = Lesions(Samples(names, images, np.zeros(3, int), none, names), 128, None)
    edge = np.tile(part.size[:, ::-1], 2)
    edge[:, :2] = 3.0
    found = part.original(edge)
    for (x1, y1, x2, y2), image in zip(found, images, strict=True):
        assert (y2, x2) == pytest.approx(image.shape, abs=1.5)
        cells = [str(v) for v in (x1, y1, x2, y2)]
        assert parse_box(cells, image.shape, "here") == [x1, y1, x2, y2]
    assert np.isnan(part.original(none)).all()


def test_a_flip_moves_box_and_image_alike():
    samples = synthetic.samples(2)
    part = Lesions(samples, 128, Augment(flip=1.0, brightness=0.0))
    plain = Lesions(samples, 128, None)
    a, b = part[Draw(0, 3)], plain[0]
    torch.testing.assert_close(a["image"].flip(-1), b["image"])
    assert a["box"].tolist() == [128 - b["box"][2], b["box"][1], 128 - b["box"][0], b["box"][3]]
    assert (a["jitter"].abs() <= 0.05).all()
    assert torch.equal(part[Draw(0, 3)]["image"], a["image"])
    assert b["jitter"].abs().sum() == 0


def test_training_draws(busi):
    data = make(busi, hidden=0.5, train_on="boxed", batch_size=4)
    seen = torch.cat([b["index"] for b in data.train_dataloader()])
    assert np.isfinite(data.train.boxes[seen.numpy()]).all()
    assert sorted(balanced(np.arange(5), np.array([0, 0, 0, 1, 1])).tolist()) == [0, 1, 2, 3, 3, 4]
    data.train.boxes[:] = np.nan
    with pytest.raises(InputError, match="no training image has a box"):
        data.train_dataloader()


def test_the_generated_images_are_what_they_say():
    found = synthetic.samples(40)
    longer = synthetic.samples(41)
    np.testing.assert_array_equal(found.images[7], longer.images[7])
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    ratio = sides[:, 1] / sides[:, 0]
    assert ratio[found.labels == 1].mean() > ratio[found.labels == 0].mean()
    for image, (x1, y1, x2, y2) in zip(found.images, found.boxes.astype(int), strict=True):
        assert image[y1:y2, x1:x2].mean() < image.mean(), "a lesion is dark"
    assert "SYNTHETIC" in UltrasoundData(synthetic_images=40).describe()
