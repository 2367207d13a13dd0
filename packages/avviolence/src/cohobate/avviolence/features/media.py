"""Decoding: frames at 24 a second, sound at 16 kHz, both from the same time zero."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soxr

from cohobate.avviolence.data.features import FPS, SNIPPET_FRAMES
from cohobate.core.errors import InputError

SAMPLE_RATE = 16_000
MEDIA = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"}
"""Suffixes that are taken for video in a folder."""

_SHORT_SIDE = 512  # larger pictures are scaled down while decoding; extractors see 224
_LOST_SHARE = 0.01  # damaged packets that a recording may have


def snippets(path: Path) -> Iterator[np.ndarray]:
    """Cut a video into snippets of 16 frames at 24 frames a second, without overlap.

    Each frame is the one nearest in time, whatever the file's own rate is and whether it varies. An
    incomplete last snippet is dropped, unless it is the only one: then its last frame is repeated.

    Args:
        path: The video.

    Yields:
        ``(16, H, W, 3)``, 8-bit RGB, upright.

    Raises:
        InputError: The file cannot be decoded, is cut off, or has no picture.
    """
    snippet: list[np.ndarray] = []
    found = False
    for picture in _nearest(_pictures(path)):
        snippet.append(picture)
        if len(snippet) == SNIPPET_FRAMES:
            yield np.stack(snippet)
            snippet, found = [], True
    if not found:
        if not snippet:
            raise InputError(f"{path}: has no pictures")
        snippet += [snippet[-1]] * (SNIPPET_FRAMES - len(snippet))
        yield np.stack(snippet)


def read_sound(path: Path) -> np.ndarray | None:
    """Read the sound as one channel at 16 kHz, from the moment of the first picture.

    Args:
        path: A video or sound file.

    Returns:
        ``(samples,)`` float32 in [-1, 1]; ``None`` when the file has no sound.

    Raises:
        InputError: The file cannot be decoded.
    """
    with _open(path) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        begin = Fraction(0)
        if container.streams.video:
            picture = container.streams.video[0]
            begin = (picture.start_time or 0) * (picture.time_base or Fraction(1))
        to_float = av.AudioResampler(format="fltp")
        parts: list[np.ndarray] = []
        to_rate: soxr.ResampleStream | None = None
        for frame in _decode(container, stream, path):
            for piece in to_float.resample(frame):
                mono = piece.to_ndarray().mean(0)
                if to_rate is None:
                    to_rate = soxr.ResampleStream(piece.sample_rate, SAMPLE_RATE, 1, "float32")
                    late = float((frame.pts or 0) * (frame.time_base or 0) - begin)
                    mono = _shift(mono, round(late * piece.sample_rate))
                parts.append(to_rate.resample_chunk(mono))
        if to_rate is not None:
            parts.append(to_rate.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(parts) if parts else None


def _shift(samples: np.ndarray, late: int) -> np.ndarray:
    """Pad what starts late, cut what starts early."""
    return np.pad(samples, (late, 0)) if late > 0 else samples[-late:]


def _pictures(path: Path) -> Iterator[tuple[Any, Fraction, Fraction]]:
    """Decoded frames with the time they appear and the time they are due to stay."""
    with _open(path) as container:
        streams = [s for s in container.streams.video if not _is_cover(s)]
        if not streams:
            raise InputError(f"{path}: has no pictures")
        stream = streams[0]
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        base = stream.time_base or 1 / Fraction(rate)
        time, stay = Fraction(-1, 1), 1 / Fraction(rate)
        first = None
        for frame in _decode(container, stream, path):
            shown = time + stay if frame.pts is None else frame.pts * base
            first = shown if first is None else first
            time = max(shown - first, time)
            stay = frame.duration * base if frame.duration else 1 / Fraction(rate)
            yield frame, time, stay
        declared = (stream.duration or 0) * base
        if first is None or declared - (time + stay) > max(Fraction(1, 2), declared / 20):
            seconds = 0.0 if first is None else float(time + stay)
            raise InputError(
                f"{path}: cut off, {seconds:.2f} s of {float(declared):.2f} s can be decoded"
            )


def _nearest(frames: Iterator[tuple[Any, Fraction, Fraction]]) -> Iterator[np.ndarray]:
    """Pictures at 24 a second from frames at any times."""
    number = 0
    held: tuple[Any, Fraction, Fraction] | None = None
    for frame, time, stay in frames:
        if held is not None:
            until = (held[1] + time) / 2
            count = max(0, math.ceil(until * FPS) - number)
            yield from _repeat(held[0], count)
            number += count
        held = (frame, time, stay)
    if held is not None:
        until = held[1] + held[2]
        yield from _repeat(held[0], max(math.ceil(until * FPS) - number, 1 - min(number, 1)))


def _repeat(frame: Any, count: int) -> Iterator[np.ndarray]:
    if count > 0:
        scale = min(1.0, _SHORT_SIDE / min(frame.width, frame.height))
        size = (round(frame.width * scale), round(frame.height * scale))
        picture = frame.reformat(*size, "rgb24").to_ndarray()
        upright = np.rot90(picture, frame.rotation // 90)
        yield from [upright] * count


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _open(path: Path) -> Any:
    try:
        return av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{path}: not a video or sound file that can be read: {reason}") from None


def _decode(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    """All frames of a stream; a few damaged packets are stepped over with a warning."""
    packets = lost = 0
    try:
        for packet in container.demux(stream):
            packets += 1
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                lost += 1
    except av.error.FFmpegError as error:
        raise InputError(f"{path}: cannot be read to its end: {error.strerror}") from None
    if lost > max(1, _LOST_SHARE * packets):
        raise InputError(f"{path}: {lost} of {packets} packets are damaged")
    if lost:
        warnings.warn(f"{path}: {lost} of {packets} packets are damaged", stacklevel=2)
