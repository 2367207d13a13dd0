from __future__ import annotations

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.core.training.data import Draw
from cohobate.medseg.data import Augment, Preprocess, SegmentationData, Split
from cohobate.medseg.data.nifti import Case, Volume
from cohobate.medseg.data.volumes import Patches, Volumes


def cases(count):
    return [Case(f"c{i:03d}", None, None) for i in range(count)]


def data(root, **options):
    options = {"roi_size": (16, 16, 16), "split": Split(test=2, val=1)} | options
    module = SegmentationData(root, **options)
    module.setup("fit")
    return module


# --- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "split", "sizes"),
    [
        (260, Split(test=60, val=30), (170, 30, 60)),
        (260, Split(test=0.2308, val=0.1154), (170, 30, 60)),
        (40, Split(test=0.2308, val=0.1154), (26, 5, 9)),
        (484, Split(test=24, val=72), (388, 72, 24)),
    ],
)
def test_decathlon_splits(count, split, sizes):
    train, val, test = split.apply(cases(count))
    assert (len(train), len(val), len(test)) == sizes
    assert test == cases(count)[-sizes[2] :]
    assert len({c.name for c in train + val + test}) == count


def test_the_shuffle_is_the_official_one():
    import random

    expected = cases(260)[:-60]
    random.Random(0).shuffle(expected)
    train, val, _ = Split(test=60, val=30).apply(cases(260))
    assert train == expected[:-30]
    assert val == expected[-30:]


@pytest.mark.parametrize("fold", [1, 2, 3, 4, 5])
def test_folds_hold_out_blocks_of_the_sorted_order(fold):
    train, val, test = Split(fold=fold).apply(cases(20))
    assert val == test == cases(20)[4 * (fold - 1) : 4 * fold]
    assert len(train) == 16
    assert not {c.name for c in train} & {c.name for c in val}


@pytest.mark.parametrize(
    "split", [Split(test=60, val=30), Split(test=0.001, val=0.1), Split(fold=6), Split(fold=0)]
)
def test_impossible_splits(split):
    with pytest.raises(InputError, match="split: "):
        split.apply(cases(40))


# --- the data module ------------------------------------------------------------------------------


def test_a_folder_gives_patches_and_volumes(tmp_path, make_cases):
    module = data(make_cases(tmp_path), augment=Augment(crops=3))
    assert module.num_classes == 3
    assert module.class_names == ["background", "class 1", "class 2"]
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == batch["label"].shape == (3, 1, 16, 16, 16)
    sample = next(iter(module.test_dataloader()))
    assert sample["image"].shape == (1, 1, 40, 36, 34)
    assert sample["label"].dtype == torch.uint8
    assert len(module.val_dataloader()) == 1
    assert len(module.test_dataloader()) == 2
    assert module.describe() == (
        f"{tmp_path.name}: 3 train, 1 val, 2 test cases, 1 channel, "
        "classes background, class 1, class 2"
    )


def test_batches_join_volumes_and_channels(tmp_path, make_cases):
    module = data(make_cases(tmp_path, channels=4), batch_size=2, epoch_volumes=8)
    loader = module.train_dataloader()
    assert len(loader) == 4
    assert next(iter(loader))["image"].shape == (4, 4, 16, 16, 16)
    assert module.in_channels == 4


@pytest.mark.parametrize("cache", [True, False])
def test_a_draw_decides_everything(tmp_path, make_cases, cache):
    module = data(make_cases(tmp_path), cache=cache, augment=Augment(flip=0.5, rotate90=0.5))
    patches = Patches(module._volumes["train"], module.augment, module.roi_size)
    first = patches[Draw(1, seed=2**40 + 7)]
    patches[Draw(0, seed=3)]
    again = patches[Draw(1, seed=2**40 + 7)]
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["label"], again["label"])
    assert not torch.equal(first["image"], patches[Draw(1, seed=8)]["image"])


def test_workers_change_nothing(tmp_path, make_cases):
    root = make_cases(tmp_path)
    alone, helped = (
        [batch["image"] for batch in data(root, num_workers=n).train_dataloader()] for n in (0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_augmentation_leaves_global_random_state_alone(tmp_path, make_cases):
    module = data(make_cases(tmp_path))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(iter(module.train_dataloader()))
    assert torch.equal(torch.rand(3), expected)


def test_patches_are_centred_on_foreground_and_padded():
    image = np.random.default_rng(0).normal(1, 0.1, (1, 10, 30, 30)).astype(np.float32)
    label = np.zeros((1, 10, 30, 30), np.uint8)
    label[0, 5, 15, 15] = 1
    case = type("Held", (), {"name": "a", "image": Volume(image, np.eye(4))})
    case.label = Volume(label, np.eye(4))
    volumes = Volumes([case], Preprocess(intensity="none"), 2, 1)
    patches = Patches(volumes, Augment(crops=2, pad="edge"), (16, 16, 16))
    for seed in range(5):
        batch = patches[Draw(0, seed=seed)]
        assert batch["image"].shape == (2, 1, 16, 16, 16)
        assert (batch["label"].flatten(1).sum(1) == 1).all()
        assert (batch["image"] != 0).all()  # edge values, not zeros


def test_rotation_needs_square_patches():
    with pytest.raises(InputError, match=r"augment.rotate90 needs"):
        Augment().transform((16, 32, 32))
    Augment(rotate90=0).transform((16, 32, 32))


# --- bad files, named -----------------------------------------------------------------------------


def test_a_label_with_too_many_classes(tmp_path, make_cases):
    with pytest.raises(InputError, match=r"labels/case_\d+.nii.gz: value 2 is not one of the 2"):
        data(make_cases(tmp_path), class_names=["background", "organ"])


def test_an_image_with_other_channels(tmp_path, make_cases, make_nifti):
    root = make_cases(tmp_path)
    make_nifti(root / "images" / "case_003.nii.gz", np.zeros((40, 36, 34, 2), np.float32))
    with pytest.raises(InputError, match=r"images/case_003.nii.gz: 2 channels, expected 1"):
        data(root)


def test_a_label_of_another_size(tmp_path, make_cases, make_nifti):
    root = make_cases(tmp_path)
    make_nifti(root / "labels" / "case_002.nii.gz", np.zeros((40, 36, 33), np.uint8))
    with pytest.raises(InputError, match=r"labels/case_002.nii.gz: size \(40, 36, 33\) differs"):
        data(root)


# --- the embedded data set ------------------------------------------------------------------------


def test_embedded_data_set():
    module = SegmentationData(roi_size=(32, 32, 32))
    assert module.num_classes == 4
    assert "SYNTHETIC subjects from one averaged brain" in module.describe()
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (2, 1, 32, 32, 32)
    assert batch["label"].unique().tolist() == [0, 1, 2, 3]
    assert batch["image"].isfinite().all()


def test_embedded_halves_are_apart_and_subjects_differ():
    from cohobate.medseg.data import brain

    reach = {}
    for half in ("back", "front"):
        maps, affine = brain._half(half)
        ends = [(affine @ [0, y, 0, 1])[1] for y in (0, maps.shape[2] - 1)]
        reach[half] = (ends[0] - brain.VOXEL / 2, ends[1] + brain.VOXEL / 2)
    assert reach["front"][0] - reach["back"][1] >= 8.0
    assert not set(brain.TRAIN_SEEDS) & set(brain.VAL_SEEDS)
    one, same = (brain.subjects("back", (5,))[0] for _ in range(2))
    np.testing.assert_array_equal(one.image.array, same.image.array)
    other = brain.subjects("back", (6,))[0]
    overlap = (one.label.array == other.label.array).mean()
    assert 0.6 < overlap < 0.99  # deformed, not copied
    shares = np.bincount(one.label.array.ravel(), minlength=4) / one.label.array.size
    assert (shares > 0.02).all()
