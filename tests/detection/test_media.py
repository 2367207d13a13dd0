from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from cohobate.core.errors import InputError
from cohobate.detection.data.annotations import read_picture
from cohobate.detection.media import Found, look_through, media_in, read_frames, write_clip


def look(path: Path, pictures: list[np.ndarray]) -> list[Found]:
    """The mean of each picture, drawn as black."""
    return [Found(round(float(p.mean()), 1), lambda p=p: np.zeros_like(p)) for p in pictures]


def through(inputs: list[Path], out: Path, ending: str | None = "_x.png", **more) -> list[str]:
    words = {"doing": "x", "results": "all.json", "ending": ending, "batch": 2, **more}
    return [path.name for path in look_through(inputs, out, look, **words)]


def test_pictures_and_clips_of_a_folder(picture, make_clip, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    one, two = picture(folder / "b.PNG", 1), picture(folder / "a.jpg", 2)
    clip = make_clip(folder / "c.d.mp4", 5)
    (folder / "notes.txt").write_text("not meant")
    assert media_in(folder) == [two, one, clip]
    written = through([folder], out, about={"unit": "grey"}, key="pictures")
    assert written == ["all.json", "a_x.png", "b_x.png", "c.d.json", "c.d_x.mp4"]
    found = json.loads((out / "all.json").read_text())
    means = {str(p): pytest.approx(read_picture(p).mean(), abs=0.1) for p in (two, one)}
    assert found == {"unit": "grey", "pictures": means}
    assert not read_picture(out / "a_x.png").any()
    found = json.loads((out / "c.d.json").read_text())
    frames = pytest.approx([0, 40, 80, 120, 160], abs=3)
    assert found == {"unit": "grey", "file": str(clip), "frames": frames}
    ((frames, rate),) = read_frames(out / "c.d_x.mp4", 9)
    assert (len(frames), rate) == (5, 10)
    assert max(frame.max() for frame in frames) < 3


def test_nothing_is_drawn_when_nothing_is_asked_for(picture, make_clip, tmp_path):
    inputs = [picture(tmp_path / "a.png"), make_clip(tmp_path / "b.mp4", 1)]
    assert through(inputs, tmp_path / "out", None) == ["all.json", "b.json"]
    assert list(json.loads((tmp_path / "out" / "all.json").read_text())) == [str(inputs[0])]
    assert through(inputs[1:], tmp_path / "clips", None) == ["b.json"]


def test_a_file_at_fault_does_not_stop_the_others(picture, tmp_path):
    good, bad = picture(tmp_path / "good.png"), tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    with pytest.raises(InputError, match=f"^{bad}: not a video.*; the other 1 are in {tmp_path}"):
        through([bad, good], tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"all.json", "good_x.png"}


def test_a_file_without_pictures_is_named(tmp_path):
    silent = tmp_path / "silent.mp4"
    with av.open(str(silent), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match=f"^{silent}: has no pictures$"):
        through([silent], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("size", [(32, 18), (33, 17)])
def test_a_clip_keeps_what_it_is_given(size, tmp_path):
    width, height = size
    given = np.zeros((3, height, width, 3), np.uint8)
    given[:, :, width // 2 :] = 200
    with write_clip(tmp_path / "x.mp4") as add:
        for frame in given:
            add(frame, Fraction(30000, 1001))
    groups = list(read_frames(tmp_path / "x.mp4", 2))
    assert [(len(frames), rate) for frames, rate in groups] == [
        (2, Fraction(30000, 1001)),
        (1, Fraction(30000, 1001)),
    ]
    for frame in (frame for frames, _ in groups for frame in frames):
        assert frame.shape == (height + height % 2, width + width % 2, 3)
        assert frame[:, : width // 2 - 2].mean() < 5
        assert frame[:, width // 2 + 2 :].mean() == pytest.approx(200, abs=5)


def test_a_clip_that_is_not_finished_is_not_there(tmp_path):
    def stopped() -> None:
        with write_clip(tmp_path / "x.mp4") as add:
            add(np.zeros((16, 16, 3), np.uint8), Fraction(10))
            raise InputError("stop")

    with pytest.raises(InputError, match="stop"):
        stopped()
    assert not list(tmp_path.iterdir())
