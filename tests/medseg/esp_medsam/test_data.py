from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cohobate.core.errors import InputError
from cohobate.core.training.data import Draw
from cohobate.medseg.esp_medsam import synthetic
from cohobate.medseg.esp_medsam.data import ImageData, ModalitySampler
from cohobate.medseg.esp_medsam.pictures import (
    MEAN,
    Picture,
    Pictures,
    prepare,
    read_mask,
    read_rgb,
)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def manifest(root: Path, rows: list[str]) -> Path:
    text = "\n".join(["image,mask,modality,split", *rows]) + "\n"
    (root / "manifest.csv").write_text(text)
    return root


@pytest.fixture
def folder(tmp_path):
    """Nine pictures of two modalities with a manifest whose names tell nothing."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(9):
        name = f"x_{number}.png"
        save(tmp_path / "i" / name, rng.integers(0, 255, (40, 64, 3), dtype=np.uint8))
        save(tmp_path / "m" / name, (rng.random((40, 64)) > 0.8).astype(np.uint8) * 255)
        modality = "fundus" if number % 3 else "xray"
        split = ["train", "train", "train", "valid", "val", "test"][min(number, 5)]
        rows.append(f"i/{name},m/{name},{modality},{split}")
    return manifest(tmp_path, rows)


def test_the_modality_is_the_manifests(folder):
    data = ImageData(folder, image_size=64)
    assert data.modalities == ["xray", "fundus"]
    assert data.describe() == (
        f"{folder.name}: xray 1/1/1, fundus 2/1/3 (train/val/test) at 64 pixels"
    )
    sample = data.parts["train"][0]
    assert sample["modality"] == "xray"
    assert sample["image"].shape == (3, 64, 64)
    assert sample["mask"].shape == (1, 64, 64)
    assert sample["inside"].tolist() == [40, 64]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("i/x_0.png,m/x_0.png,ultrasond,train", r"line 2: unknown modality 'ultrasond', did you"),
        ("i/no.png,m/x_0.png,xray,train", r"i/no\.png: no such file"),
        ("i/x_0.png,m/no.png,xray,train", r"m/no\.png: no such file"),
        ("i/x_0.png,m/x_0.png,xray,training", r"line 2: split 'training' is none of"),
        ("i/x_0.png,m/x_0.png,,train", r"line 2: no modality"),
        ("i/x_0.png,m/x_0.png,xray,train", "no picture for val"),
    ],
)
def test_a_bad_manifest_is_named(folder, row, message):
    with pytest.raises(InputError, match=message):
        ImageData(manifest(folder, [row]), image_size=64)


def test_own_modalities_are_named(folder):
    with pytest.raises(InputError, match="unknown modality 'xray'"):
        ImageData(folder, image_size=64, modalities=["fundus"])
    data = ImageData(folder, image_size=64, modalities=["fundus", "xray", "mri"])
    assert data.modalities == ["fundus", "xray"]


def test_official_splits_are_read(tmp_path):
    names = {"train": ["benign (1).png", "b"], "valid": ["c.png"], "test": ["d.png"]}
    for name in ("benign (1).png", "b.png", "c.png", "d.png"):
        save(tmp_path / "image_1024" / name, np.zeros((32, 32, 3), np.uint8))
        save(tmp_path / "mask_1024" / name, np.zeros((32, 32), np.uint8))
    (tmp_path / "busi.json").write_text(json.dumps(names))
    data = ImageData(tmp_path, splits={"ultrasound": Path("busi.json")}, image_size=32)
    assert [p.modality for p in data.parts["train"].pictures] == ["ultrasound"] * 2
    assert [p.name for p in data.parts["train"].pictures] == ["benign (1).png", "b.png"]
    assert len(data.parts["val"]) == len(data.parts["test"]) == 1
    (tmp_path / "bad.json").write_text('{"train": []}')
    with pytest.raises(InputError, match=r"bad\.json: needs the lists"):
        ImageData(tmp_path, splits={"ultrasound": Path("bad.json")})
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match=r"bad\.json: not JSON"):
        ImageData(tmp_path, splits={"ultrasound": Path("bad.json")})


def test_images_and_masks_are_paired_by_name(tmp_path):
    for number in range(10):
        save(tmp_path / "images" / f"{number}.jpg", np.zeros((32, 32, 3), np.uint8))
        save(tmp_path / "masks" / f"{number}.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(InputError, match=r"no --data\.modality"):
        ImageData(tmp_path, image_size=32)
    data = ImageData(tmp_path, modality="ultrasound", image_size=32)
    assert [len(data.parts[p]) for p in ("train", "val", "test")] == [7, 1, 2]
    everything = [p for part in data.parts.values() for p in part.pictures]
    assert all(p.image.stem == p.mask.stem for p in everything)
    assert len({p.name for p in everything}) == 10
    (tmp_path / "masks" / "4.png").unlink()
    with pytest.raises(InputError, match=r"4\.jpg: no mask of that name"):
        ImageData(tmp_path, modality="ultrasound", image_size=32)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"text", "not a readable image"), (None, "no such file"), (b"", "not a readable image")],
)
def test_unreadable_files_are_named(tmp_path, content, message):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"a.png: {message}"):
        read_rgb(path)


def test_a_truncated_file_is_named(tmp_path):
    path = save(
        tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    )
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"a\.png: not a readable image"):
        read_rgb(path)


def test_grey_and_16_bit_images_get_three_channels(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    found = read_rgb(save(tmp_path / "grey.png", grey))
    assert np.array_equal(found, np.repeat(grey[..., None], 3, -1))
    deep = (1000 + 100 * np.arange(64, dtype=np.uint16)).reshape(8, 8)
    found = read_rgb(save(tmp_path / "deep.png", deep))
    assert found.shape == (8, 8, 3)
    assert found.min() == 0
    assert found.max() == 255
    constant = read_rgb(save(tmp_path / "flat.png", np.full((4, 4), 9, np.uint16)))
    assert not constant.any()


def test_every_value_above_0_is_foreground(tmp_path):
    mask = np.array([[0, 1], [128, 255]], np.uint8)
    expected = [[False, True], [True, True]]
    assert read_mask(save(tmp_path / "a.png", mask)).tolist() == expected
    Image.fromarray(mask > 0).save(tmp_path / "b.png")
    assert read_mask(tmp_path / "b.png").tolist() == expected
    save(tmp_path / "c.png", np.repeat(mask[..., None], 3, -1))
    assert read_mask(tmp_path / "c.png").tolist() == expected


def test_a_mask_of_another_size_is_named(tmp_path):
    image = save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    mask = save(tmp_path / "b.png", np.zeros((8, 9), np.uint8))
    with pytest.raises(InputError, match=r"b\.png: the mask is \(8, 9\), the image \(8, 8\)"):
        Pictures([Picture("a", "xray", image, mask)], 32, "sam")[0]


def test_normalisation_and_padding():
    rgb = np.full((10, 20, 3), 255, np.uint8)
    sam, inside = prepare(rgb, 64, "sam")
    assert inside == [32, 64]
    assert sam[0, 0, 0].item() == pytest.approx((255 - 123.675) / 58.395, rel=1e-5)
    assert not sam[:, 32:].any()
    official, _ = prepare(rgb, 64, "official")
    expected = [(255 - m) / m for m in MEAN]
    torch.testing.assert_close(official[:, 5, 5], torch.tensor(expected))


def test_a_flip_mirrors_image_and_mask_and_leaves_the_padding():
    image = np.zeros((40, 20, 3), np.uint8)
    image[:, :5] = 255
    pictures = Pictures([Picture("a", "xray", image, image[..., 0] > 0)], 64, "sam", flip=0.5)
    draws = {pictures.flipped(draw): pictures[draw] for draw in pictures.every_draw()}
    assert set(draws) == {True, False}
    plain, flipped = draws[False], draws[True]
    width = int(plain["inside"][1])
    for key in ("image", "mask"):
        assert torch.equal(flipped[key][..., :width], plain[key][..., :width].flip(-1))
        assert not flipped[key][..., width:].any()
    assert not torch.equal(flipped["mask"], plain["mask"])
    assert plain["sample"] == flipped["sample"]
    assert plain["augmentation"] != flipped["augmentation"]


def test_names_are_of_content_and_modality():
    image = np.zeros((32, 32, 3), np.uint8)
    other = image.copy()
    other[0, 0] = 1
    rows = [
        ("a", "xray", image),
        ("b", "xray", image),
        ("a", "fundus", image),
        ("a", "xray", other),
    ]
    pictures = Pictures([Picture(n, m, i, None) for n, m, i in rows], 32, "sam")
    keys = [pictures.sample_key(i) for i in range(4)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert pictures.transform_key != Pictures([], 64, "sam").transform_key
    assert pictures.transform_key != Pictures([], 32, "official").transform_key


def test_batches_are_of_one_modality():
    names = ["a"] * 10 + ["b"] * 7 + ["c"] * 2
    sampler = ModalitySampler(names, 4, seed=3)
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        draws = list(sampler)
        assert len(draws) == len(sampler) == 16
        batches = [draws[i : i + 4] for i in range(0, 16, 4)]
        kinds = [{names[d] for d in batch} for batch in batches]
        assert all(len(kind) == 1 for kind in kinds)
        assert Counter(next(iter(kind)) for kind in kinds) == {"a": 2, "b": 1, "c": 1}
        assert all(
            len(set(batch)) == 4 for batch, k in zip(batches, kinds, strict=True) if k != {"c"}
        )
        seen.append([int(d) for d in draws])
    assert seen[0] != seen[1]
    again = ModalitySampler(names, 4, seed=3)
    again.set_epoch(1)
    assert [int(d) for d in again] == seen[1]
    assert isinstance(next(iter(again)), Draw)


def test_processes_share_a_batch_of_one_modality():
    names = ["a"] * 8 + ["b"] * 8
    whole = [int(d) for d in ModalitySampler(names, 4, seed=1)]
    parts = [[int(d) for d in ModalitySampler(names, 2, seed=1, rank=r, world=2)] for r in (0, 1)]
    assert [x for pair in zip(*parts, strict=True) for x in pair] == whole


def test_the_embedded_pictures_are_always_the_same():
    one, other = synthetic.pictures(64), synthetic.pictures(64)
    for part, pictures in one.items():
        assert len(pictures) == 3 * synthetic.COUNTS[part]
        for a, b in zip(pictures, other[part], strict=True):
            assert np.array_equal(a.image, b.image)
            assert np.array_equal(a.mask, b.mask)
            assert a.mask.any()
    assert "SYNTHETIC" in ImageData(image_size=32).describe()


def test_natural_images(tmp_path):
    data = ImageData(images="natural", image_size=64, epoch_images=6, batch_size=2)
    train, val = data.parts["train"], data.parts["val"]
    assert train[Draw(0, 1)]["image"].shape == (3, 64, 64)
    assert not torch.equal(train[Draw(0, 1)]["image"], train[Draw(0, 2)]["image"])
    assert torch.equal(val[3]["image"], val[3]["image"])
    assert data.describe().endswith("scikit-learn: 6 train, 32 val")
    assert data.modalities == []
    with pytest.raises(InputError, match="0 images; the common stage needs two"):
        ImageData(images="natural", natural=tmp_path)
    for number in range(3):
        save(tmp_path / f"{number}.png", np.full((32, 40), number, np.uint8))
    own = ImageData(images="natural", natural=tmp_path, image_size=32)
    assert own.describe() == f"images of {tmp_path.name}: 2 train, 1 val"
    assert next(iter(own.val_dataloader()))["image"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("size", [0, 33, 100])
def test_a_size_that_is_not_whole_patches_is_refused(size):
    with pytest.raises(InputError, match=f"image_size: {size} is not divisible by 32"):
        ImageData(image_size=size)
