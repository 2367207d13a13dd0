from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cohobate.avviolence.data import (
    BagData,
    Features,
    SyntheticBags,
    layout,
    read_features,
    synthetic,
    write_features,
)
from cohobate.avviolence.data.bags import collate, sample_positions
from cohobate.avviolence.data.features import check
from cohobate.core.errors import InputError
from cohobate.core.testing import golden

SMALL = SyntheticBags(train=6, val=2, test=4, visual_width=12, audio_width=5, crops=5)


def published(root: Path, options: SyntheticBags = SMALL) -> Path:
    for split, picture, sound in (("train", "RGB", "train"), ("test", "RGBTest", "test")):
        synthetic.write_published(
            synthetic.make(options, 3, split),
            root / picture,
            root / "vggish-features" / sound,
            root / "annotations.txt",
        )
    return root


def test_sampling_matches_the_official_code(golden_folder: Path) -> None:
    for name, wanted in golden(golden_folder / "sampling_s7.npz").items():
        snippets, length = (int(part[1:]) for part in name.split("_"))
        found = np.full(length, -1)
        places = sample_positions(snippets, length)
        found[: len(places)] = places
        np.testing.assert_array_equal(found, wanted.numpy())


def test_frame_truth_matches_the_official_code(golden_folder: Path) -> None:
    z = {k: v.numpy() for k, v in golden(golden_folder / "gt_frames_s12.npz").items()}
    ends = np.cumsum(z["n_fragments"])
    parts = []
    for number, frames in enumerate(z["n_frames"]):
        spans = z["fragments"][ends[number] - z["n_fragments"][number] : ends[number]]
        marked = () if z["is_normal"][number] else tuple(map(tuple, spans.tolist()))
        parts.append(layout.frame_truth(int(frames), marked))
    assert [len(part) for part in parts] == z["kept"].tolist()
    np.testing.assert_array_equal(np.concatenate(parts), z["gt"])


def test_the_same_seed_gives_the_same_bytes() -> None:
    one, two, other = (synthetic.make(SMALL, seed, "train") for seed in (3, 3, 4))
    bytes_of = [b"".join(v.source.load().visual.tobytes() for v in videos) for videos in (one, two)]
    assert bytes_of[0] == bytes_of[1]
    assert one[0].source.load().audio.tobytes() != other[0].source.load().audio.tobytes()


def test_asynchrony_is_there_and_can_be_switched_off() -> None:
    def shifts(asynchrony: int) -> list[int]:
        options = replace(SyntheticBags(), asynchrony=asynchrony)
        found = (e for video in synthetic.events(options, 0, "train") for e in video)
        return [abs(e.seen[0] - e.heard[0]) for e in found if e.seen and e.heard]

    assert np.median(shifts(8)) >= 2
    assert max(shifts(0)) == 0


def test_synthetic_bags_have_the_described_make_up() -> None:
    videos = synthetic.make(SyntheticBags(), 0, "train")
    assert sum(v.violent for v in videos) == 200
    truth = [layout.snippet_frames_truth(len(v.source.load()), v.intervals or ()) for v in videos]
    assert 0.1 < np.concatenate(truth).mean() < 0.25
    assert all(t.any() == v.violent for t, v in zip(truth, videos, strict=True))
    lengths = [len(v.source.load()) for v in videos]
    assert min(lengths) >= 24
    assert max(lengths) <= 71
    assert "SYNTHETIC" in BagData(synthetic=SMALL).describe()


def test_the_published_layout_reads_back_what_was_written(tmp_path: Path) -> None:
    data = BagData(published(tmp_path), val_share=0.0)
    memory = BagData(synthetic=SMALL, seed=3)
    assert data.visual_extractor == "i3d"
    for split in ("train", "test"):
        for disk, made in zip(data.videos[split], memory.videos[split], strict=True):
            a, b = disk.source.load(), made.source.load()
            np.testing.assert_array_equal(a.visual, b.visual)
            np.testing.assert_array_equal(a.audio, b.audio)
            assert (disk.id, disk.violent, disk.crops) == (made.id, made.violent, 5)
            if split == "test":
                assert disk.intervals == made.intervals
    assert len(data.train_dataloader().dataset) == 5 * 6


def test_lists_choose_and_order_whatever_folder_they_name(tmp_path: Path) -> None:
    root = published(tmp_path)
    names = [v.id for v in synthetic.make(SMALL, 3, "test")][::-1][:2]
    lines = [f"/elsewhere/RGBTest/{name}__{crop}.npy" for name in names for crop in range(5)]
    (root / "rgb_test.list").write_text("\n".join(lines))
    data = BagData(root, test_list=root / "rgb_test.list", val_share=0.0)
    assert [v.id for v in data.videos["test"]] == names


def test_held_out_videos_are_apart_and_stay_apart(tmp_path: Path) -> None:
    root = published(tmp_path, replace(SMALL, train=40))
    one, two = BagData(root, val_share=0.3), BagData(root, val_share=0.3, seed=9)
    ids = {split: {v.id for v in one.videos[split]} for split in ("train", "val")}
    assert not ids["train"] & ids["val"]
    assert len(ids["train"] | ids["val"]) == 40
    assert 2 < len(ids["val"]) < 25
    assert ids["val"] == {v.id for v in two.videos["val"]}


def test_a_batch_is_padded_to_its_longest_bag_and_carries_true_lengths() -> None:
    bags = [
        {"visual": torch.zeros(n, 3), "audio": torch.ones(n, 2), "label": 1.0} for n in (4, 7, 1)
    ]
    batch = collate(bags)
    assert batch["length"].tolist() == [4, 7, 1]
    assert batch["audio"].shape == (3, 7, 2)
    assert batch["audio"].sum(1)[:, 0].tolist() == [4, 7, 1]


def test_own_features_read_back_with_their_extractors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((2, 6, 4), np.float32), rng.standard_normal((6, 3), np.float32)
    made = Features("clip", *arrays, "s3d@1", "vggish@2", has_sound=False)
    write_features(made, tmp_path / "clip.one.safetensors")
    found = read_features(tmp_path / "clip.one.safetensors")
    np.testing.assert_array_equal(found.visual, made.visual)
    assert (found.visual_extractor, found.audio_extractor) == ("s3d@1", "vggish@2")
    assert found.has_sound is False
    (tmp_path / "labels.csv").write_text(
        "video,violent,split,intervals\nclip.one,1,train,\nclip.one,1,test,0.5-1;2-9\n"
    )
    data = BagData(tmp_path, val_share=0.0)
    assert len(data.train_dataloader().dataset) == 2
    truth = data.test_dataloader()[0].dataset[0]["truth"]
    assert truth.tolist() == [0] * 12 + [1] * 12 + [0] * 24 + [1] * 48


def features(visual: tuple[int, ...] = (1, 9, 4), audio: tuple[int, ...] = (9, 3)) -> Features:
    return Features("a.npy", np.ones(visual, np.float32), np.ones(audio, np.float32))


def test_lengths_that_differ_a_little_are_cut_to_the_shorter() -> None:
    assert check(features((1, 9, 4), (7, 3))).visual.shape == (1, 7, 4)
    with pytest.warns(UserWarning, match="300 visual snippets but 303"):
        assert len(check(features((1, 300, 4), (303, 3)))) == 300


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (features((1, 9, 4), (12, 3)), "9 visual snippets but 12 of audio"),
        (features((1, 0, 4), (0, 3)), "empty"),
        (features((9, 4)), r"features must be \(crops"),
        (replace(features(), audio=np.full((9, 3), np.nan, np.float32)), "not finite"),
    ],
)
def test_bad_features_name_their_file(bad: Features, fault: str) -> None:
    with pytest.raises(InputError, match=f"a.npy: .*{fault}"):
        check(bad)


def test_a_wrong_width_names_its_file(tmp_path: Path) -> None:
    root = published(tmp_path)
    path = sorted((root / "vggish-features" / "train").iterdir())[-1]
    np.save(path, np.ones((30, 7), np.float32))
    for crop in range(5):
        stem = path.name.removesuffix("__vggish.npy")
        np.save(root / "RGB" / f"{stem}__{crop}.npy", np.ones((30, 12), np.float32))
    data = BagData(root, val_share=0.0)
    with pytest.raises(InputError, match=r"RGB.*widths 12 \(visual\) and 7 \(audio\), expected"):
        list(data.train_dataloader().dataset)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda root: next((root / "vggish-features/train").iterdir()).unlink(), "no synthetic-"),
        (lambda root: [p.unlink() for p in (root / "RGB").glob("*0001*")], "no visual features"),
        (lambda root: (root / "annotations.txt").write_text(""), "annotations.txt: no line for"),
        (lambda root: (root / "annotations.txt").write_text("x 3\n"), "line 1: expected a name"),
        (lambda root: np.save(root / "RGB/odd_label_Q__0.npy", np.ones((3, 12))), "odd_label_Q"),
        (lambda root: [p.unlink() for p in (root / "RGB").iterdir()], "RGB: no files named"),
    ],
)
def test_a_faulty_folder_is_refused_by_name(tmp_path: Path, spoil: object, fault: str) -> None:
    root = published(tmp_path)
    spoil(root)  # type: ignore[operator]
    if "odd" in fault:
        np.save(root / "vggish-features/train/odd_label_Q__vggish.npy", np.ones((3, 5)))
    with pytest.raises(InputError, match=fault):
        BagData(root)


@pytest.mark.parametrize("name", ["a_label_Q", "a_label_", "nolabel", "a_label_B1-C-0"])
def test_unknown_labels_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        layout.labels_of(name)


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ("name,violent\na,1\n", "needs the columns"),
        ("video,violent\na,2\n", "line 2: split must be"),
        ("video,violent\nb,1\n", "b.safetensors does not exist"),
        ("video,violent,intervals\na,1,3..4\n", "no span of seconds"),
    ],
)
def test_a_faulty_table_is_refused_by_line(tmp_path: Path, table: str, fault: str) -> None:
    write_features(features(), tmp_path / "a.safetensors")
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(InputError, match=rf"labels.csv.*{fault}"):
        BagData(tmp_path)


def test_damaged_feature_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"no features")
    with pytest.raises(InputError, match=r"a.safetensors: damaged"):
        read_features(path)
