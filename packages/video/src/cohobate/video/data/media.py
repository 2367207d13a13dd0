"""Pictures and clips in and out: Pillow and PyAV, one frame at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
CLIPS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv"}


def read_picture(path: Path) -> np.ndarray:
    """Read an image.

    Args:
        path: Any format of Pillow with 8 bits a channel.

    Returns:
        ``(H, W, 3)`` RGB, uint8.

    Raises:
        InputError: The file is missing, damaged, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("RGB", "RGBA", "L", "P", "LA"):
                raise InputError(f"{path}: needs 8 bits a channel, found mode {picture.mode}")
            return np.asarray(picture.convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a picture that can be read: {reason}") from None


def write_picture(path: Path, picture: np.ndarray) -> Path:
    """Write an image; the suffix chooses the format.

    Args:
        path: The file.
        picture: ``(H, W, 3)`` RGB, uint8.
    """
    with save_atomic(path) as temporary:
        Image.fromarray(picture).save(temporary)
    return path


class Clip:
    """A video file that is decoded as it is read.

    Args:
        path: The file.

    Attributes:
        frames: Number of frames the file declares, 0 when it does not say.
        rate: Frames a second.

    Raises:
        InputError: The file cannot be opened or has no pictures.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with self._open() as container:
            stream = container.streams.video[0]
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            declared = float((stream.duration or 0) * (stream.time_base or 0) * self.rate)
            self.frames = stream.frames or round(declared)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The frames, ``(H, W, 3)`` RGB, uint8.

        Raises:
            InputError: The file is damaged.
        """
        with self._open() as container:
            container.streams.video[0].thread_type = "AUTO"
            try:
                for frame in container.decode(video=0):
                    yield frame.to_ndarray(format="rgb24")
            except av.error.FFmpegError as error:
                raise InputError(
                    f"{self.path}: cannot be read to its end: {error.strerror}"
                ) from None

    def _open(self) -> Any:
        try:
            container = av.open(str(self.path))
        except (av.error.FFmpegError, OSError) as error:
            reason = error.strerror or type(error).__name__
            raise InputError(f"{self.path}: not a video that can be read: {reason}") from None
        if not container.streams.video:
            container.close()
            raise InputError(f"{self.path}: has no pictures")
        return container


class ClipWriter:
    """Encodes frames as H.264 as they come; nothing else is held in memory.

    Args:
        path: An ``.mp4`` file.
        rate: Frames a second.
    """

    def __init__(self, path: Path, rate: Fraction | float) -> None:
        self._rate = Fraction(rate).limit_denominator(1001)
        self._container = av.open(str(path), "w")
        self._stream: Any = None

    def add(self, picture: np.ndarray) -> None:
        """Append a frame ``(H, W, 3)`` RGB, uint8.

        The format needs even sizes: an odd last row or column is repeated.
        """
        h, w = picture.shape[:2]
        if h % 2 or w % 2:
            picture = np.pad(picture, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._rate)
            self._stream.height, self._stream.width = picture.shape[:2]
            self._stream.pix_fmt, self._stream.options = "yuv420p", {"crf": "16"}
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder still holds."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()


@contextmanager
def clip_writer(path: Path, rate: Fraction | float) -> Iterator[ClipWriter]:
    """A clip that is whole in the end, or not there.

    Args:
        path: An ``.mp4`` file.
        rate: Frames a second.

    Raises:
        InputError: The disk is full or the folder cannot be written.
    """
    with save_atomic(path) as temporary:
        writer = ClipWriter(temporary, rate)
        try:
            yield writer
        finally:
            writer.close()
