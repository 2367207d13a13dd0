from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cohobate.avviolence.features.logmel import log_mel, mel_matrix, snippet_sound
from cohobate.avviolence.features.media import SAMPLE_RATE, read_sound, snippets
from cohobate.core.errors import InputError
from cohobate.core.testing import golden

Video = Callable[..., Path]


def shown(path: Path) -> np.ndarray:
    """Number of the source frame behind each of the 24 frames a second."""
    return np.concatenate([s[:, 0, 0, 0] for s in snippets(path)]).astype(int)


@pytest.mark.parametrize("case", ["s13", "s14"])
def test_log_mel_equals_vggish(golden_folder: Path, case: str) -> None:
    z = golden(golden_folder / f"vggish_logmel_{case}.npz")
    wave = torch.from_numpy(np.asarray(z["pcm16"]) / 32768.0).float()
    torch.testing.assert_close(mel_matrix().float(), z["mel_matrix"].float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(log_mel(wave), z["log_mel"].float(), rtol=0, atol=1e-5)
    hop = float(z["patch_hop_s"])
    for number, patch in enumerate(z["patches"]):
        start = round(hop * number * 100) * 160
        found = log_mel(wave[start : start + 15_600])
        torch.testing.assert_close(found, patch.float(), rtol=0, atol=1e-5)


def test_sound_of_a_snippet_ends_with_it() -> None:
    wave = np.arange(1, 40_001, dtype=np.float32)
    sound = snippet_sound(wave, range(5))
    assert sound.shape == (5, 15_600)
    assert sound[:, -1].tolist() == [10_667, 21_333, 32_000, 0, 0]
    assert (sound[0] == 0).sum() == 15_600 - 10_667
    np.testing.assert_array_equal(sound[2:5], snippet_sound(wave, range(2, 5)))


@pytest.mark.parametrize("fps", [10.0, 24.0, 25.0, 30000 / 1001, 60.0, 0.0])
def test_frames_are_the_nearest_in_time(tmp_path: Path, video: Video, fps: float) -> None:
    varying = [n / 30 for n in range(30)] + [1 + n / 6 for n in range(13)]
    times = np.array([n / fps for n in range(round(3 * fps))] if fps else varying)
    found = shown(video(tmp_path / "a.mov", times=times.tolist(), codec="png"))
    assert len(found) == 64
    wanted = np.arange(64) / 24
    distance = np.abs(wanted[:, None] - times)
    np.testing.assert_allclose(distance[np.arange(64), found], distance.min(1), atol=2e-3)


def test_a_clip_shorter_than_a_snippet_repeats_its_last_frame(tmp_path: Path, video: Video) -> None:
    (only,) = snippets(video(tmp_path / "a.mp4", times=[0, 1 / 24, 2 / 24]))
    assert only.shape == (16, 48, 64, 3)
    assert (only[3:] == only[2]).all()


def test_sound_is_resampled_to_one_channel(tmp_path: Path, video: Video) -> None:
    path = video(tmp_path / "a.mp4", times=[n / 24 for n in range(48)], sound=2.0, rate=44_100)
    wave = read_sound(path)
    assert wave is not None
    assert wave.dtype == np.float32
    assert abs(len(wave) / SAMPLE_RATE - 2) < 0.1
    spectrum = np.abs(np.fft.rfft(wave[8000:24_000]))
    assert spectrum.argmax() == 440
    assert 0.4 < np.abs(wave[8000:24_000]).max() < 0.6


def test_a_silent_video_has_no_sound(tmp_path: Path, video: Video) -> None:
    assert read_sound(video(tmp_path / "a.mp4", times=[0, 0.04])) is None


def test_real_clips_decode(clips: Path) -> None:
    assert len(list(snippets(clips / "bigbuckbunny.mp4"))) == 7  # 5.28 s at 25 frames a second
    wave = read_sound(clips / "bigbuckbunny.mp4")
    assert wave is not None
    assert 5.2 < len(wave) / SAMPLE_RATE < 5.4
    assert len(list(snippets(clips / "carphone_pristine.mp4"))) == 6
    assert read_sound(clips / "carphone_pristine.mp4") is None


def test_text_named_like_a_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("hello")
    for read in (read_sound, lambda path: list(snippets(path))):
        with pytest.raises(InputError, match=r"a.mp4: not a video or sound file"):
            read(tmp_path / "a.mp4")


def test_a_file_cut_off_is_refused_with_what_can_be_decoded(tmp_path: Path, clips: Path) -> None:
    whole = (clips / "bigbuckbunny.mp4").read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut.mp4: "):
        list(snippets(path))


def test_sound_alone_has_no_pictures(tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.zeros(8000, np.int16).tobytes())
    with pytest.raises(InputError, match=r"a.wav: has no pictures"):
        list(snippets(tmp_path / "a.wav"))
    sound = read_sound(tmp_path / "a.wav")
    assert sound is not None
    assert abs(len(sound) - 16_000) < 50
