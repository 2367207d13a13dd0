"""Pictures and clips in; what is found in them as JSON, and drawn copies, out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic, write_json
from cohobate.core.predict import each_file, files_in
from cohobate.detection.data.annotations import PICTURES, read_picture
from cohobate.detection.plots import write_picture

CLIPS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv"}


class Found(NamedTuple):
    """What was found in a picture.

    Attributes:
        listed: As the JSON has it.
        drawn: Makes the copy ``(H, W, 3)`` with it drawn, uint8 RGB.
    """

    listed: Any
    drawn: Callable[[], np.ndarray]


Look = Callable[[Path, Sequence[np.ndarray]], Iterable[Found]]
"""File and pictures of it ``(H, W, 3)`` uint8 RGB → what is in each."""


def look_through(
    inputs: Sequence[Path], out: Path, look: Look, *, doing: str, results: str, ending: str | None,
    batch: int, about: Mapping[str, Any] | None = None, key: str | None = None,
) -> list[Path]:  # fmt: skip
    """Look at pictures and clips, and write what is found.

    One JSON has all pictures by file name; of a clip ``<name>.json`` has it frame by frame.

    Args:
        inputs: Pictures, clips, or folders of them.
        out: Folder for the results.
        look: Finds.
        doing: What the progress bar says.
        results: Name of the pictures' JSON.
        ending: What a drawn picture's name adds to its file's, with the format; None draws nothing.
        batch: Frames a pass.
        about: What every JSON says first.
        key: What the pictures are called in their JSON; None where it has nothing else.

    Returns:
        The files written.

    Raises:
        InputError: There is nothing to look at or a file cannot be read; the others are done all
            the same.
    """
    about, listed = dict(about or {}), dict[str, Any]()

    def work(path: Path) -> list[Path]:
        copy = out / f"{path.stem}{ending}" if ending else None
        if path.suffix.lower() in CLIPS:
            copy = copy and copy.with_suffix(".mp4")
            content = {**about, "file": str(path), "frames": _frames(path, look, batch, copy)}
            return [write_json(out / f"{path.stem}.json", content), *([copy] if copy else [])]
        (found,) = look(path, [read_picture(path)])
        listed[str(path)] = found.listed
        return [write_picture(copy, found.drawn())] if copy else []

    def finish() -> list[Path]:
        content = {**about, key: listed} if key else listed
        return [write_json(out / results, content)] if listed else []

    paths = files_in(inputs, media_in, "pictures or clips")
    return each_file(paths, out, work, doing, finish)


def media_in(folder: Path) -> list[Path]:
    """Pictures and clips of a folder, sorted."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES | CLIPS)


def read_frames(path: Path, batch: int) -> Iterator[tuple[list[np.ndarray], Fraction]]:
    """Frames of a clip ``(H, W, 3)`` uint8 RGB, ``batch`` at a time, and how many make a second.

    Raises:
        InputError: The file is missing, damaged or has no pictures.
    """
    group: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: has no pictures")
            stream = container.streams.video[0]
            rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            for frame in container.decode(video=0):
                if len(group) == batch:
                    yield group, rate
                    group = []
                group.append(frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"{path}: not a video that can be read: {reason}") from None
    if not group:
        raise InputError(f"{path}: has no pictures")
    yield group, rate


@contextmanager
def write_clip(path: Path) -> Iterator[Callable[[np.ndarray, Fraction], None]]:
    """Write an H.264 clip; what it gives takes frames ``(H, W, 3)`` uint8 RGB and their rate.

    The format needs even sides: an odd last row or column is repeated.

    Raises:
        InputError: The file cannot be written.
    """
    with save_atomic(path) as temporary, av.open(str(temporary), "w") as container:
        stream: Any = None

        def add(pixels: np.ndarray, rate: Fraction) -> None:
            nonlocal stream
            h, w = pixels.shape[:2]
            even = np.pad(pixels, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
            if stream is None:
                stream = container.add_stream("libx264", rate=rate.limit_denominator(1001))
                stream.height, stream.width = even.shape[:2]
                stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), "rgb24")
            container.mux(stream.encode(frame))

        yield add
        container.mux(stream.encode())


def _frames(path: Path, look: Look, batch: int, copy: Path | None) -> list[Any]:
    """What is found frame by frame; the drawn frames become the clip ``copy``."""
    listed: list[Any] = []
    with write_clip(copy) if copy else nullcontext() as add:
        for group, rate in read_frames(path, batch):
            for found in look(path, group):
                listed.append(found.listed)
                if add is not None:
                    add(found.drawn(), rate)
    return listed
