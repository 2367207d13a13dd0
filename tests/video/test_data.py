from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cohobate.core.errors import InputError
from cohobate.core.testing import assert_one_line, run_command
from cohobate.core.training.data import Draw
from cohobate.video.data import DualShutterData, Readout, synthesise
from cohobate.video.data.media import Clip, clip_writer, read_picture
from cohobate.video.data.module import Crops, embedded_clip
from cohobate.video.data.pairs import DualPair, check_pair, find_pairs, order
from cohobate.video.data.synthesis import between, pairs_of_clip


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def panning(tmp_path: Path) -> Path:
    """A clip of 40 frames whose picture moves a pixel a frame."""
    path, wide = tmp_path / "pan.mp4", texture(16, 96)
    with clip_writer(path, 25) as writer:
        for k in range(40):
            writer.add(wide[:, k : k + 32])
    return path


def save_pair(folder: Path, name: str = "0", height: int = 20) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("t2b", "b2t"):
        Image.fromarray(texture(height, 24)).save(folder / f"{name}_{side}.png")


@pytest.mark.parametrize("name", ["rs_synthesis_s13", "rs_synthesis_s14", "rs_synthesis_s15"])
def test_pairs_of_the_official_generator(
    golden: Callable[[str], dict[str, Any]], name: str
) -> None:
    z = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in golden(name).items()}
    found = synthesise(
        z["frames"], row_gap=int(z["row_gap"]), exposure=int(z["exposure"]),
        frames=int(z["gt_frames"]), gamma=bool(z["gamma"]),
    )  # fmt: skip
    for key, made in (("rs_t2b", found.t2b), ("rs_b2t", found.b2t), ("gs", found.frames)):
        np.testing.assert_allclose(made, z[key], rtol=0, atol=1e-9)


def test_a_still_clip_gives_one_picture_three_times() -> None:
    still = np.repeat(texture(12, 10)[None], 12, 0)
    found = synthesise(still)
    for made in (found.t2b, found.b2t, *found.frames):
        np.testing.assert_array_equal(made, still[0])


def test_motion_to_the_right_skews_both_directions_oppositely() -> None:
    wide = np.zeros((8, 40, 3), np.uint8)
    wide[:, 20] = 255
    clip = np.stack([np.roll(wide, k, 1) for k in range(8)])
    found = synthesise(clip)
    assert found.t2b[..., 0].argmax(1).tolist() == list(range(20, 28))
    assert found.b2t[..., 0].argmax(1).tolist() == list(range(27, 19, -1))


def test_too_few_frames_or_rows() -> None:
    clip = np.zeros((5, 8, 4, 3), np.uint8)
    with pytest.raises(InputError, match="5 source frames, 8 rows need 8"):
        synthesise(clip)
    with pytest.raises(InputError, match="too few"):
        synthesise(clip, exposure=0)


def test_upsampling_moves_what_moves() -> None:
    wide = texture(32, 64)
    first, second = wide[:, 4:52], wide[:, :48]  # moves four pixels to the right
    made = between(first, second, 4)
    assert len(made) == 3
    for step, frame in enumerate(made, 1):
        inner = np.s_[6:-6, 8:-8]
        true = wide[:, 4 - step : 52 - step].astype(float)
        blend = first * (1 - step / 4) + second * (step / 4)
        assert np.abs(frame - true)[inner].mean() < 0.4 * np.abs(blend - true)[inner].mean()


def test_upsampled_readouts_start_and_end_at_source_frames() -> None:
    clip = [texture(9, 12, seed) for seed in range(6)]
    readout = Readout(upsample=4, cut=300)
    assert readout.source_frames(9) == 3
    pairs = list(pairs_of_clip(clip, readout))
    assert len(pairs) == 2
    for k, pair in enumerate(pairs):
        np.testing.assert_array_equal(pair.t2b[0], clip[3 * k][0])
        np.testing.assert_array_equal(pair.t2b[-1], clip[3 * k + 2][-1])
        np.testing.assert_array_equal(pair.b2t[-1], clip[3 * k][-1])


def test_readouts_across_a_cut_are_left_out() -> None:
    dark, bright = np.zeros((4, 6, 3), np.uint8), np.full((4, 6, 3), 200, np.uint8)
    clip = [dark] * 6 + [bright] * 6
    pairs = list(pairs_of_clip(clip, Readout()))
    assert [pair.t2b.mean() for pair in pairs] == [0.0, 200.0]
    assert len(list(pairs_of_clip(clip, Readout(cut=300)))) == 3


def test_the_embedded_pairs_are_real_disjoint_in_time_and_say_how_they_were_made() -> None:
    assert embedded_clip().exists()
    data = DualShutterData(readout=Readout(height=24, upsample=4))
    text = data.describe()
    assert "real clip" in text
    assert "upsampled 4 times" in text
    batch = next(iter(data.train_dataloader()))
    assert batch["images"].shape == (4, 2, 3, 24, 29)
    assert batch["frames"].shape == (4, 3, 3, 24, 29)
    last, first = data.pairs["train"][-1], data.pairs["test"][0]
    assert not np.array_equal(last.truth([8]), first.truth([0]))


def test_crops_follow_from_the_draw_and_keep_their_times() -> None:
    ramp = np.repeat(np.arange(40, dtype=np.uint8)[:, None, None], 30, 1).repeat(3, 2)
    pair = DualPair("a", ramp, ramp, tuple(ramp for _ in range(9)))
    crops = Crops([pair], 16)
    one, again, other = (crops[Draw(0, seed)] for seed in (5, 5, 6))
    assert torch.equal(one["images"], again["images"])
    assert (one["time"], one["top"]) == (again["time"], again["top"])
    tops = {crops[Draw(0, seed)]["top"] for seed in range(30)}
    times = {round(crops[Draw(0, seed)]["time"].item() * 8) for seed in range(60)}
    assert len(tops) > 10
    assert times == set(range(1, 8))
    for item in (one, other):
        assert item["rows"] == 40
        assert round(item["images"][0, 0, 0, 0].item() * 255) == item["top"]


def test_rs_gopro_is_read_by_number(tmp_path: Path, panning: Path) -> None:
    done = run_command(
        "make-pairs", panning, tmp_path / "set", "--height=8", "--upsample=4", "--frames=5",
        "--val_share=0.2", domain="video",
    )  # fmt: skip
    assert done.code == 0, done.err
    root = tmp_path / "set"
    assert (root / "train/pan/RS/00000000_rs_t2b.png").exists()
    assert (root / "test/pan/GS/00000000_gs_004.png").exists()
    data = DualShutterData(root, patch=8)
    assert "with truth" in data.describe()
    batch = next(iter(data.train_dataloader()))
    assert batch["frames"].shape[1:] == (3, 3, 8, 8)
    whole = next(iter(data.test_dataloader()))
    assert whole["frames"].shape == (1, 5, 3, 8, 16)
    (root / "train/pan/RS/00000000_rs_b2t.png").unlink()
    with pytest.raises(InputError, match=r"00000000_rs_t2b\.png: has no b2t partner"):
        DualShutterData(root)


def test_missing_truth_is_named(tmp_path: Path, panning: Path) -> None:
    words = ("--height=8", "--upsample=4", "--val_share=0.2")
    run_command("make-pairs", panning, tmp_path / "set", *words, domain="video")
    (tmp_path / "set/test/pan/GS/00000000_gs_003.png").unlink()
    with pytest.raises(InputError, match="frames of 00000000 are missing"):
        DualShutterData(tmp_path / "set")


def test_pairs_without_truth_train_and_test_on_themselves(tmp_path: Path) -> None:
    save_pair(tmp_path / "real" / "r0")
    save_pair(tmp_path / "real", "1")
    data = DualShutterData(tmp_path / "real", patch=16)
    assert "without truth" in data.describe()
    assert [pair.name for pair in data.pairs["train"]] == ["1", "r0/0"]
    batch = next(iter(data.train_dataloader()))
    assert "frames" not in batch
    assert batch["images"].shape == (2, 2, 3, 16, 16)


@pytest.mark.parametrize(
    ("break_it", "fault"),
    [
        (lambda d: (d / "0_b2t.png").unlink(), "0_t2b.png: has no b2t partner"),
        (lambda d: (d / "0_t2b.png").unlink(), "0_b2t.png: has no t2b partner"),
        (lambda d: [p.unlink() for p in d.iterdir()], "no pictures named"),
    ],
)
def test_missing_partners_are_named(
    tmp_path: Path, break_it: Callable[[Path], Any], fault: str
) -> None:
    save_pair(tmp_path)
    break_it(tmp_path)
    with pytest.raises(InputError, match=fault.replace(".", r"\.")):
        find_pairs(tmp_path)


def test_pairs_that_do_not_belong_together() -> None:
    picture = texture(20, 24)
    check_pair(picture, picture, "a", "b")
    with pytest.raises(InputError, match="b: 24×16 pixels, but its partner a has 24×20"):
        check_pair(picture, picture[:16], "a", "b")
    with pytest.raises(InputError, match="b: wrong row order, it fits a upside down"):
        check_pair(picture, picture[::-1], "a", "b")
    with pytest.raises(InputError, match="one row"):
        check_pair(picture[:1], picture[:1], "a", "b")


def test_names_that_contradict_the_order() -> None:
    t2b, b2t, other = Path("x_t2b.png"), Path("x_b2t.png"), Path("left.png")
    assert order([t2b, b2t]) == (t2b, b2t)
    assert order([other, b2t]) == (other, b2t)
    with pytest.raises(InputError, match=r"x_b2t\.png: wrong row order"):
        order([b2t, t2b])
    with pytest.raises(InputError, match=r"x_t2b\.png: wrong row order"):
        order([other, t2b])
    with pytest.raises(InputError, match="needs its partner"):
        order([t2b])
    with pytest.raises(InputError, match="3 inputs"):
        order([t2b, b2t, other])


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a\.png: not a picture"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"b\.png: no such picture"):
        read_picture(tmp_path / "b.png")
    Image.fromarray(np.zeros((4, 4), np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(InputError, match=r"deep\.tif: needs 8 bits"):
        read_picture(tmp_path / "deep.tif")


def test_clips_that_cannot_be_read(tmp_path: Path, panning: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no clip")
    with pytest.raises(InputError, match=r"a\.mp4: not a video"):
        Clip(tmp_path / "a.mp4")
    words = ("make-pairs", panning, tmp_path / "out")
    assert_one_line(
        run_command(*words, "--height=64", domain="video"), "pan.mp4", "one readout takes 64"
    )
    assert not (tmp_path / "out").exists()
    assert_one_line(run_command(*words, "--val_share=2", domain="video"), "val_share")


def test_a_clip_of_one_frame(tmp_path: Path) -> None:
    with clip_writer(tmp_path / "one.mp4", 25) as writer:
        writer.add(texture(16, 16))
    with pytest.raises(InputError, match=r"one\.mp4: train part of 1 frames: 1 frames of 16 rows"):
        DualShutterData(clip=tmp_path / "one.mp4", readout=Readout()).setup()


def test_clips_keep_rate_size_and_order(tmp_path: Path) -> None:
    with clip_writer(tmp_path / "odd.mp4", 12.5) as writer:
        for grey in (20, 120, 220):
            writer.add(np.full((15, 17, 3), grey, np.uint8))
    clip = Clip(tmp_path / "odd.mp4")
    assert (clip.frames, float(clip.rate)) == (3, 12.5)
    frames = list(clip)
    assert frames[0].shape == (16, 18, 3)
    assert [round(f.mean(), -1) for f in frames] == [20, 120, 220]


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        DualShutterData(tmp_path / "none")
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="valid: no such folder"):
        DualShutterData(tmp_path)
    with pytest.raises(InputError, match="not both"):
        DualShutterData(tmp_path, clip=tmp_path / "a.mp4")
