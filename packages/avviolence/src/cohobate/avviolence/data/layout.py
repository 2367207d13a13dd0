"""Videos on disk: XD-Violence as published, or a folder of own features with labels."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

import numpy as np

from cohobate.avviolence.data.features import (
    SNIPPET_FRAMES,
    SNIPPET_SECONDS,
    SUFFIX,
    Features,
    check,
    read_features,
    read_header,
)
from cohobate.core.errors import InputError

Split = Literal["train", "val", "test"]

CODES = {
    "A": "normal",
    "B1": "fighting",
    "B2": "shooting",
    "B4": "riot",
    "B5": "abuse",
    "B6": "car accident",
    "G": "explosion",
}
"""XD-Violence's classes; ``0`` fills up."""

_VISUAL = re.compile(r"^(?P<id>.+)__(?P<crop>\d+)\.npy$")
_AUDIO = re.compile(r"^(?P<id>.+)__vggish\.npy$")


class Source(Protocol):
    """Where a video's features come from."""

    def load(self) -> Features:
        """Read them, checked and aligned."""
        ...


@dataclass(frozen=True)
class PublishedFiles:
    """Feature files of XD-Violence: one array a crop and one of audio.

    Attributes:
        visual: ``<video>__<c>.npy`` in order of the crops, ``(T, 1024)`` each.
        audio: ``<video>__vggish.npy``, ``(T, 128)``.
    """

    visual: tuple[Path, ...]
    audio: Path

    def load(self) -> Features:
        """Read all crops and the audio.

        Raises:
            InputError: A file cannot be read, or the features are bad.
        """
        crops = [_array(path) for path in self.visual]
        if len({crop.shape for crop in crops}) > 1:
            raise InputError(f"{self.visual[0]}: its crops have shapes {[c.shape for c in crops]}")
        audio = _array(self.audio)
        return check(Features(str(self.visual[0]), np.stack(crops), audio, "i3d", "vggish"))


@dataclass(frozen=True)
class OwnFile:
    """A feature file written by ``extract``."""

    path: Path

    def load(self) -> Features:
        """Read it."""
        return read_features(self.path)


@dataclass(frozen=True)
class Video:
    """One video of a data set.

    Attributes:
        id: Its name without crop and suffix.
        violent: The label of the whole video.
        source: Where its features are.
        crops: Number of crops.
        intervals: Violent spans in frames, ``[start, end)``; ``None`` where nobody marked them.
    """

    id: str
    violent: bool
    source: Source
    crops: int
    intervals: tuple[tuple[int, int], ...] | None = None


def labels_of(video_id: str) -> tuple[str, ...]:
    """Class codes in an XD-Violence name, ``..._label_B2-G-0`` → ``("B2", "G")``.

    Args:
        video_id: Name, with or without folder and suffix.

    Raises:
        InputError: There is no label or an unknown one.

    Example:
        >>> labels_of("Fast.Five__#00-10_label_B6-0-0")
        ('B6',)
    """
    _, found, suffix = video_id.rpartition("_label_")
    codes = tuple(code for code in suffix.split("-") if code != "0")
    if not found or not codes or any(code not in CODES for code in codes):
        raise InputError(
            f"{video_id}: its name must end with _label_ and codes of "
            f"{', '.join(CODES)} joined by '-'"
        )
    return codes


def published(
    visual: Path,
    audio: Path,
    *,
    order: Path | None = None,
    annotations: Path | None = None,
) -> list[Video]:
    """Videos of XD-Violence's folders, paired by id.

    Args:
        visual: Folder of ``<video>__<c>.npy``.
        audio: Folder of ``<video>__vggish.npy``.
        order: A published list (one path a line); it chooses the videos and their order. Only the
            file names count. By default all videos in order of their names.
        annotations: Frame annotations; without them no frame is marked.

    Raises:
        InputError: A partner is missing, a label unknown, a listed file not there.
    """
    crops: dict[str, dict[int, Path]] = {}
    for path in sorted(visual.glob("*.npy")):
        if match := _VISUAL.match(path.name):
            crops.setdefault(match["id"], {})[int(match["crop"])] = path
    sounds = {m["id"]: p for p in audio.glob("*.npy") if (m := _AUDIO.match(p.name))}
    if not crops:
        raise InputError(f"{visual}: no files named <video>__<crop>.npy")
    wanted = _listed(order) if order else list(crops)
    marks = read_annotations(annotations) if annotations else None
    videos = []
    for name in wanted:
        if name not in crops:
            raise InputError(f"{order}: {name} has no visual features in {visual}")
        if name not in sounds:
            raise InputError(f"{crops[name][min(crops[name])]}: no {name}__vggish.npy in {audio}")
        files = tuple(path for _, path in sorted(crops[name].items()))
        violent = labels_of(name) != ("A",)
        if marks is not None and violent and name not in marks:
            raise InputError(f"{annotations}: no line for {name}")
        spans = None if marks is None else marks[name] if violent else ()
        videos.append(Video(name, violent, PublishedFiles(files, sounds[name]), len(files), spans))
    if order is None and (alone := sounds.keys() - crops.keys()):
        raise InputError(f"{sounds[min(alone)]}: no visual features in {visual}")
    return videos


def own(root: Path) -> dict[Split, list[Video]]:
    """Videos whose features ``extract`` wrote, with ``labels.csv`` beside them.

    ``labels.csv`` has the columns ``video`` (name without suffix) and ``violent`` (0 or 1), and may
    have ``split`` (``train``, ``val`` or ``test``; default ``train``) and ``intervals``, violent
    spans in seconds such as ``3.2-5;10-12.5``, needed where frames are to be evaluated.

    Args:
        root: The folder.

    Raises:
        InputError: A column, file or value is wrong.
    """
    table = root / "labels.csv"
    splits: dict[Split, list[Video]] = {"train": [], "val": [], "test": []}
    with _open(table) as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"video", "violent"} <= rows[0].keys():
        raise InputError(f"{table}: needs the columns video and violent")
    for number, row in enumerate(rows, start=2):
        place = f"{table}, line {number}"
        split = row.get("split") or "train"
        if split not in splits or row["violent"] not in ("0", "1"):
            raise InputError(f"{place}: split must be train, val or test and violent 0 or 1")
        path = root / f"{row['video']}{SUFFIX}"
        if not path.exists():
            raise InputError(f"{place}: {path} does not exist")
        crops = int(read_header(path)["crops"])
        spans = _seconds(row.get("intervals"), place)
        violent = row["violent"] == "1"
        if spans is None and not violent:
            spans = ()
        splits[split].append(Video(row["video"], violent, OwnFile(path), crops, spans))
    return splits


def read_annotations(path: Path) -> dict[str, tuple[tuple[int, int], ...]]:
    """Violent spans of XD-Violence: lines ``name s1 e1 s2 e2 ...`` in frames.

    Raises:
        InputError: A line does not parse.
    """
    marks = {}
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            name, *numbers = line.split() or [""]
            if not name:
                continue
            if len(numbers) % 2 or not all(n.isdigit() for n in numbers):
                raise InputError(f"{path}, line {number}: expected a name and pairs of frames")
            ends = [int(n) for n in numbers]
            spans = tuple(zip(ends[::2], ends[1::2], strict=True))
            marks[name.removesuffix(".mp4")] = spans
    return marks


def frame_truth(frames: int, intervals: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Ground truth of a video's frames as the published evaluation counts them.

    Args:
        frames: Frames of the video. The last one and what does not fill a snippet are dropped.
        intervals: Violent spans ``[start, end)``; they may run past the end.

    Returns:
        ``(16 * ((frames - 1) // 16),)`` of 0 and 1, float32.

    Example:
        >>> frame_truth(34, ((14, 18),)).nonzero()[0]
        array([14, 15, 16, 17])
    """
    truth = np.zeros((frames - 1) // SNIPPET_FRAMES * SNIPPET_FRAMES, np.float32)
    for start, end in intervals:
        truth[start:end] = 1
    return truth


def snippet_frames_truth(snippets: int, intervals: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Ground truth of the frames that a number of snippets covers, ``(16 * snippets,)``."""
    return frame_truth(snippets * SNIPPET_FRAMES + 1, intervals)


def _listed(path: Path) -> list[str]:
    """Ids in order, each once: lists have a line a crop."""
    ids = []
    with _open(path) as file:
        for line in filter(None, map(str.strip, file)):
            name = line.rsplit("/", 1)[-1]
            match = _AUDIO.match(name) or _VISUAL.match(name)
            if match is None:
                raise InputError(f"{path}: {name} is neither <video>__<crop>.npy nor an audio file")
            ids.append(match["id"])
    return list(dict.fromkeys(ids))


def _seconds(text: str | None, place: str) -> tuple[tuple[int, int], ...] | None:
    if not text:
        return None
    spans = []
    for part in text.split(";"):
        try:
            start, end = (float(x) for x in part.split("-"))
        except ValueError:
            raise InputError(f"{place}: '{part}' is no span of seconds such as 3.2-5") from None
        rate = SNIPPET_FRAMES / SNIPPET_SECONDS
        spans.append((round(start * rate), round(end * rate)))
    return tuple(spans)


def _array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable .npy array ({type(error).__name__})") from None
    if array.ndim != 2 or array.dtype.kind != "f":
        raise InputError(
            f"{path}: expected (snippets, width) floats, found {array.dtype}{array.shape}"
        )
    return np.asarray(array)


def _open(path: Path) -> IO[str]:
    try:
        return path.open(newline="", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
