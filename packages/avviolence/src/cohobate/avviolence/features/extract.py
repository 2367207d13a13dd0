"""Extraction: one video or thousands, in parallel, resumable, with a report of lengths."""

from __future__ import annotations

import csv
import multiprocessing
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cohobate.avviolence.data.features import (
    SNIPPET_SECONDS,
    SUFFIX,
    Features,
    check,
    read_header,
    write_features,
)
from cohobate.avviolence.features.extractors import (
    AudioExtractor,
    VisualExtractor,
    audio_extractor,
    visual_extractor,
)
from cohobate.avviolence.features.logmel import snippet_sound
from cohobate.avviolence.features.media import MEDIA, SAMPLE_RATE, read_sound, snippets
from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic

_CLIPS, _SOUNDS = 4, 32  # snippets a forward pass: what is in memory does not grow with the video


@dataclass(frozen=True)
class Choice:
    """Which extractors, picklable for worker processes.

    Attributes:
        visual: Name for `visual_extractor`.
        audio: Name for `audio_extractor`.
        visual_weights: Local weights.
        audio_weights: Local weights.
        crops: 1, or 5 with the corners.
        device: Where the networks run.
    """

    visual: str = "s3d"
    audio: str = "vggish"
    visual_weights: Path | None = None
    audio_weights: Path | None = None
    crops: int = 1
    device: str = "cpu"

    def load(self) -> Extraction:
        """Load both extractors."""
        return Extraction(
            visual_extractor(self.visual, self.visual_weights).to(self.device),
            audio_extractor(self.audio, self.audio_weights).to(self.device),
            self.crops,
        )


@dataclass(frozen=True)
class Report:
    """What came of one file: lengths in seconds, or the fault."""

    file: str
    snippets: int = 0
    video_seconds: float = 0.0
    audio_seconds: float = 0.0
    difference: float = 0.0
    fault: str = ""


class Extraction:
    """Both extractors, applied to files.

    Args:
        visual: For the pictures.
        audio: For the sound.
        crops: 1, or 5 with the corners.
    """

    def __init__(self, visual: VisualExtractor, audio: AudioExtractor, crops: int = 1) -> None:
        if crops not in (1, 5):
            raise InputError(f"crops must be 1 or 5, not {crops}")
        self.visual, self.audio, self.crops = visual, audio, crops

    @torch.inference_mode()
    def run(self, path: Path) -> Extracted:
        """Extract the features of one video; pictures are decoded a few snippets at a time.

        Args:
            path: The video. Without sound its audio is silence, with a warning.

        Raises:
            InputError: The file cannot be decoded.
        """
        thumbnails = _Thumbnails()
        clips = (
            self.visual.crops(torch.from_numpy(thumbnails.see(snippet)), self.crops)
            for snippet in snippets(path)
        )
        parts = [self.visual(torch.cat(batch)) for batch in _batches(clips, _CLIPS)]
        visual = torch.cat(parts).unflatten(0, (-1, self.crops)).transpose(0, 1)
        count = visual.shape[1]
        sound = read_sound(path)
        if sound is None:
            warnings.warn(f"{path}: has no sound, silence is used", stacklevel=2)
        waveform = np.zeros(0, np.float32) if sound is None else sound
        parts = [
            self.audio(snippet_sound(waveform, range(count)[start : start + _SOUNDS]))
            for start in range(0, count, _SOUNDS)
        ]
        features = Features(
            str(path),
            visual.numpy(),
            torch.cat(parts).numpy(),
            self.visual.id,
            self.audio.id,
            sound is not None,
        )
        return Extracted(check(features), waveform, thumbnails.kept)


@dataclass(frozen=True)
class Extracted:
    """What extraction knows of a video.

    Attributes:
        features: Its features.
        waveform: Its sound at 16 kHz, empty when it has none.
        thumbnails: Small pictures, evenly spread, by snippet number.
    """

    features: Features
    waveform: np.ndarray
    thumbnails: dict[int, np.ndarray]

    def report(self, path: Path) -> Report:
        """Lengths in seconds."""
        pictures = len(self.features) * SNIPPET_SECONDS
        heard = len(self.waveform) / SAMPLE_RATE
        return Report(
            path.name,
            len(self.features),
            round(pictures, 3),
            round(heard, 3),
            round(heard - pictures, 3),
        )


class _Thumbnails:
    """Keeps a picture of every n-th snippet, 16 to 32 of them, however long the video is."""

    def __init__(self) -> None:
        self.kept: dict[int, np.ndarray] = {}
        self._count, self._step = 0, 1

    def see(self, snippet: np.ndarray) -> np.ndarray:
        if self._count % self._step == 0:
            stride = max(1, snippet.shape[1] // 96)
            self.kept[self._count] = snippet[0, ::stride, ::stride].copy()
        if len(self.kept) > 32:
            self._step *= 2
            self.kept = {n: p for n, p in self.kept.items() if n % self._step == 0}
        self._count += 1
        return snippet


def videos_in(inputs: Iterable[Path], suffixes: set[str] = MEDIA) -> list[Path]:
    """Files as given, folders searched through.

    Args:
        inputs: Files and folders.
        suffixes: What is taken from a folder.

    Raises:
        InputError: A path does not exist, nothing is found, or two files would share an output.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
            found += sorted(inside)
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"{path}: no such file or folder")
    if not found:
        raise InputError(f"{', '.join(map(str, inputs))}: no videos")
    names: dict[str, Path] = {}
    for path in found:
        other = names.setdefault(path.stem, path)
        if other != path:
            raise InputError(f"{path}: has the same name as {other}; their features would collide")
    return list(names.values())


def extract_all(paths: list[Path], out: Path, choice: Choice, jobs: int = 1) -> list[Report]:
    """Extract many videos to ``<out>/<name>.safetensors``.

    What is there already, by the same extractors, is kept; a file that cannot be decoded is
    reported and skipped. ``<out>/report.csv`` lists lengths and faults.

    Args:
        paths: The videos.
        out: Folder for the features.
        choice: The extractors.
        jobs: Processes; each loads the extractors and uses one thread.

    Returns:
        A report for each file that was not there already.

    Raises:
        InputError: The extractors cannot be loaded, or a file in ``out`` is by other extractors.
    """
    extraction = choice.load()
    waiting = [path for path in paths if not _is_done(out / f"{path.stem}{SUFFIX}", extraction)]
    reports: list[Report] = []
    with tqdm(
        total=len(paths), initial=len(paths) - len(waiting), desc="extract", unit="video"
    ) as bar:
        for report in _run(waiting, out, choice, extraction, jobs):
            reports.append(report)
            bar.update()
            if report.fault:
                bar.write(report.fault)
    _write_report(out / "report.csv", reports)
    return reports


def _run(
    paths: list[Path], out: Path, choice: Choice, extraction: Extraction, jobs: int
) -> Iterator[Report]:
    if jobs <= 1:
        for path in paths:
            yield _one(extraction, path, out)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start_worker, (choice,)) as pool:
        tasks: list[Future[Report]] = [pool.submit(_in_worker, path, out) for path in paths]
        for task in as_completed(tasks):
            yield task.result()


_worker: list[Extraction] = []


def _start_worker(choice: Choice) -> None:
    torch.set_num_threads(1)
    _worker.append(choice.load())


def _in_worker(path: Path, out: Path) -> Report:
    return _one(_worker[0], path, out)


def _one(extraction: Extraction, path: Path, out: Path) -> Report:
    try:
        extracted = extraction.run(path)
    except InputError as error:
        return Report(path.name, fault=str(error))
    write_features(extracted.features, out / f"{path.stem}{SUFFIX}")
    return extracted.report(path)


def _is_done(path: Path, extraction: Extraction) -> bool:
    if not path.exists():
        return False
    about = read_header(path)
    made = (about["visual_extractor"], about["audio_extractor"], about["crops"])
    wanted = (extraction.visual.id, extraction.audio.id, str(extraction.crops))
    if made != wanted:
        raise InputError(f"{path}: made by {made}, not by {wanted}; choose another folder")
    return True


def _write_report(path: Path, reports: list[Report]) -> None:
    """Add to the report of earlier calls; a file that was tried again has its newest line."""
    rows: dict[str, dict[str, object]] = {}
    if path.exists():
        with path.open(newline="") as file:
            rows = {row["file"]: dict(row) for row in csv.DictReader(file)}
    rows |= {report.file: asdict(report) for report in reports}
    with save_atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Report.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(rows.values())


def _batches(items: Iterable[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    batch: list[torch.Tensor] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
