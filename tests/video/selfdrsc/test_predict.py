from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cohobate.core.errors import InputError
from cohobate.core.testing import assert_one_line, run_command
from cohobate.video.data.media import Clip, clip_writer
from cohobate.video.selfdrsc.network import CorrectionNet, preset
from cohobate.video.selfdrsc.predict import frames_at, times_of


@pytest.fixture(scope="module")
def network() -> CorrectionNet:
    torch.manual_seed(0)
    return preset("tiny").eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    done = run_command(
        "fit", "video/selfdrsc", "--out", out, "--data.readout.height=32",
        "--data.readout.upsample=8", "--data.epoch_pairs=4", "--data.patch=32",
        "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false",
    )  # fmt: skip
    assert done.code == 0, done.err
    return out


def picture(height: int = 36, width: int = 50, shift: int = 0) -> np.ndarray:
    rng = np.random.default_rng(3)
    small = rng.integers(0, 256, (9, 20, 3), np.uint8)
    wide = np.asarray(Image.fromarray(small).resize((width + 8, height)))
    return wide[:, shift : shift + width]


def save_clip(path: Path, frames: int, height: int = 36) -> Path:
    with clip_writer(path, 25) as writer:
        for k in range(frames):
            writer.add(picture(height, shift=k))
    return path


def predict(run: Path, *words: str | Path) -> tuple[int, list[str], str]:
    done = run_command("predict", "video/selfdrsc", *words, "--checkpoint", run)
    return done.code, done.out.split(), done.err


def test_times_are_even_or_those_given() -> None:
    assert times_of(5, None) == [0, 0.25, 0.5, 0.75, 1]
    assert times_of(1, None) == [0.5]
    assert times_of(9, [0.1, 1]) == [0.1, 1]
    for bad in ([-0.1], [0.5, 1.5], [float("nan")]):
        with pytest.raises(InputError, match="outside the exposure"):
            times_of(9, bad)
    with pytest.raises(InputError, match="at least one"):
        times_of(0, None)
    with pytest.raises(InputError, match="at least one"):
        times_of(9, [])


@pytest.mark.parametrize("size", [(31, 45), (16, 16), (5, 70), (54, 96), (64, 48)])
def test_any_size_comes_back(network: CorrectionNet, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        frames = frames_at(network, images, (0.0, 0.3, 1.0))
    assert frames.shape == (3, 3, *size)
    # an untrained tiny network gives the average, in the padding as well as outside
    torch.testing.assert_close(frames, images.mean(0).expand(3, -1, -1, -1))


def test_padding_extends_the_row_times(
    network: CorrectionNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = CorrectionNet.forward

    def spy(self: CorrectionNet, images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        seen.append((images.shape, maps))
        return forward(self, images, maps)

    monkeypatch.setattr(CorrectionNet, "forward", spy)
    frames_at(network, torch.rand(2, 3, 20, 40), (0.5,))
    shape, maps = seen[0]
    assert shape[-2:] == (32, 48)
    steps = maps[0, 0, 1:, 0] - maps[0, 0, :-1, 0]
    torch.testing.assert_close(steps, torch.full_like(steps, 1 / 19))


def test_first_and_last_frame_are_of_the_first_and_last_pass(network: CorrectionNet) -> None:
    torch.manual_seed(1)
    trained = preset("tiny").eval()
    for p in trained.parameters():
        torch.nn.init.normal_(p, std=0.05)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        frames = frames_at(trained, images, (0.0, 0.25, 0.75, 1.0))
        early, late = (frames_at(trained, images, (0.0, t, 1.0)) for t in (0.25, 0.75))
        again = frames_at(trained, images, (1.0, 0.75, 0.25, 0.0))
    torch.testing.assert_close(frames[:2], early[:2])
    torch.testing.assert_close(frames[2:], late[1:])
    torch.testing.assert_close(again, frames.flip(0))


def test_two_pictures_become_frames_and_clips(run: Path, tmp_path: Path) -> None:
    for side in ("t2b", "b2t"):
        Image.fromarray(picture()).save(tmp_path / f"x_{side}.png")
    words = (tmp_path / "x_t2b.png", tmp_path / "x_b2t.png", "--frames=5", "--out", tmp_path / "o")
    code, written, err = predict(run, *words)
    assert code == 0, err
    names = {Path(path).name for path in written}
    assert names == {f"x_{k:03d}.png" for k in range(5)} | {
        "x.png", "x.mp4", "x_side_by_side.mp4"
    }  # fmt: skip
    frames = [np.asarray(Image.open(tmp_path / "o" / f"x_{k:03d}.png")) for k in range(5)]
    assert {frame.shape for frame in frames} == {(36, 50, 3)}
    assert np.abs(frames[2].astype(int) - picture()).mean() < 8
    clip = Clip(tmp_path / "o/x_side_by_side.mp4")
    assert clip.frames == 5
    assert next(iter(clip)).shape == (36, 150, 3)


def test_a_folder_of_pairs_and_times_of_ones_own(run: Path, tmp_path: Path) -> None:
    (tmp_path / "in/r0").mkdir(parents=True)
    for name in ("0", "1"):
        for side in ("t2b", "b2t"):
            Image.fromarray(picture()).save(tmp_path / f"in/r0/{name}_{side}.png")
    words = ("--times=[0.1,0.9]", "--side_by_side=false", "--out", tmp_path / "o")
    code, written, err = predict(run, tmp_path / "in", *words)
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == sorted(
        f"r0_{n}{end}" for n in "01" for end in ("_000.png", "_001.png", ".png", ".mp4")
    )
    assert len(written) == 8


def test_two_clips_become_one(run: Path, tmp_path: Path) -> None:
    t2b, b2t = (save_clip(tmp_path / f"{side}.mp4", 4) for side in ("left", "right"))
    code, written, err = predict(run, t2b, b2t, "--frames=3", "--fps=50", "--out", tmp_path / "o")
    assert code == 0, err
    clip = Clip(Path(written[0]))
    assert (clip.frames, float(clip.rate)) == (12, 50.0)
    assert len(written) == 2


def test_bad_input_ends_in_one_line_and_writes_nothing(run: Path, tmp_path: Path) -> None:
    for name, height in (("a_t2b", 36), ("a_b2t", 40)):
        Image.fromarray(picture(height)).save(tmp_path / f"{name}.png")
    long, short = save_clip(tmp_path / "long.mp4", 4), save_clip(tmp_path / "short.mp4", 3)
    small = save_clip(tmp_path / "small.mp4", 4, height=20)
    (tmp_path / "bad.mp4").write_bytes(b"no clip")
    t2b, b2t = tmp_path / "a_t2b.png", tmp_path / "a_b2t.png"
    out = tmp_path / "out"
    cases = [
        ((t2b, b2t), ("a_b2t.png", "50×40 pixels, but its partner")),
        ((b2t, t2b), ("a_b2t.png", "wrong row order")),
        ((t2b,), ("a_t2b.png", "needs its partner")),
        ((t2b, long), ("long.mp4", "a clip needs a clip")),
        ((long, short), ("short.mp4", "3 frames, but its partner", "has 4")),
        ((long, small), ("small.mp4", "50×20 pixels, but its partner")),
        ((long, tmp_path / "bad.mp4"), ("bad.mp4", "not a video")),
        ((long, long, "--times=[0.5,1.2]"), ("times 1.2", "outside the exposure")),
        ((long, long, "--fps=0"), ("fps 0",)),
    ]
    for words, parts in cases:
        done = run_command("predict", "video/selfdrsc", *words, "--checkpoint", run, "--out", out)
        assert_one_line(done, *parts)
    assert not list(out.glob("*"))
