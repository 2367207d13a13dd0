"""SYNTHETIC bags: events in two modalities that need not coincide, from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cohobate.avviolence.data.features import SNIPPET_FRAMES, Features
from cohobate.avviolence.data.layout import Split, Video

SCENES, CLASSES = 12, 3
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class SyntheticBags:
    """A made-up audio-visual data set; no picture, sound or violence is behind it.

    Every video has a scene in each modality, a random walk and white noise. A violent one has one
    to three events: in both modalities (60 %), seen only, or heard only (20 % each). What is heard
    is shifted against what is seen by up to ``asynchrony`` snippets. Distractors, half like an
    event, are in all videos.

    Attributes:
        train: Number of training videos, every second one violent.
        val: Number of validation videos.
        test: Number of test videos.
        visual_width: Width of the visual features.
        audio_width: Width of the audio features.
        asynchrony: Largest shift between sound and picture in snippets; 0 makes them coincide.
        crops: Crops a video; those after the first differ from it by noise.
        seed: Seed; the run's own seed when not given.
    """

    train: int = 400
    val: int = 80
    test: int = 80
    visual_width: int = 64
    audio_width: int = 32
    asynchrony: int = 8
    crops: int = 1
    seed: int | None = None

    def describe(self) -> str:
        """One line for wherever a result is shown."""
        return (
            f"SYNTHETIC bags, {self.train} training, {self.val} validation and {self.test} test "
            f"videos, asynchrony up to {self.asynchrony} snippets"
        )


@dataclass(frozen=True)
class Event:
    """Where an event is seen and heard, ``[start, end)`` in snippets; ``None`` where it is not."""

    seen: tuple[int, int] | None
    heard: tuple[int, int] | None


def make(options: SyntheticBags, seed: int, split: Split) -> list[Video]:
    """Make the videos of one split.

    Args:
        options: Sizes and asynchrony.
        seed: Used when the options name none.
        split: The splits share their prototypes and differ in everything else.

    Returns:
        Videos with their features in memory.
    """
    seed = seed if options.seed is None else options.seed
    prototypes = _Prototypes(np.random.default_rng([seed, 0]), options)
    count = getattr(options, split)
    return [_video(options, prototypes, seed, split, number)[0] for number in range(count)]


def events(options: SyntheticBags, seed: int, split: Split) -> list[list[Event]]:
    """The violent events of each video of `make`: what the labels do not tell."""
    seed = seed if options.seed is None else options.seed
    prototypes = _Prototypes(np.random.default_rng([seed, 0]), options)
    count = getattr(options, split)
    return [_video(options, prototypes, seed, split, number)[1] for number in range(count)]


def write_published(videos: list[Video], visual: Path, audio: Path, annotations: Path) -> None:
    """Write videos as XD-Violence is published, so that its reader can be tried on them.

    Args:
        videos: With features in memory.
        visual: Folder for ``<video>__<c>.npy``.
        audio: Folder for ``<video>__vggish.npy``.
        annotations: File for the violent spans; lines are appended.
    """
    for folder in (visual, audio):
        folder.mkdir(parents=True, exist_ok=True)
    with annotations.open("a") as file:
        for video in videos:
            features = video.source.load()
            for crop, array in enumerate(features.visual):
                np.save(visual / f"{video.id}__{crop}.npy", array)
            np.save(audio / f"{video.id}__vggish.npy", features.audio)
            if video.violent:
                frames = " ".join(str(f) for span in video.intervals or () for f in span)
                file.write(f"{video.id} {frames}\n")


class _Prototypes:
    """Directions of unit root mean square, shared by all videos."""

    def __init__(self, rng: np.random.Generator, options: SyntheticBags) -> None:
        widths = (options.visual_width, options.audio_width)
        self.scene = [_unit(rng.standard_normal((SCENES, w))) for w in widths]
        self.violent = [_unit(rng.standard_normal((CLASSES, w))) for w in widths]
        self.distractor = [
            0.5 * violent + 0.75**0.5 * _unit(rng.standard_normal(violent.shape))
            for violent in self.violent
        ]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows**2).mean(-1, keepdims=True))


def _video(
    options: SyntheticBags, prototypes: _Prototypes, seed: int, split: Split, number: int
) -> tuple[Video, list[Event]]:
    rng = np.random.default_rng([seed, 1 + SPLITS.index(split), number])
    length = int(rng.integers(24, 72))
    violent = number % 2 == 1
    streams = []
    for scenes in prototypes.scene:
        steps = rng.standard_normal((length, scenes.shape[1])) * (0.7 / length**0.5)
        noise = rng.standard_normal(steps.shape)
        streams.append(scenes[rng.integers(SCENES)] + steps.cumsum(0) + noise)
    found = _add_events(rng, streams, prototypes, options.asynchrony) if violent else []
    for _ in range(rng.integers(3)):
        modality = int(rng.integers(2))
        prototype = prototypes.distractor[modality][rng.integers(CLASSES)]
        start, end = _span(rng, length)
        streams[modality][start:end] += rng.uniform(0.6, 1.4) * prototype
    visual, audio = streams
    crops = [visual] + [
        visual + 0.2 * rng.standard_normal(visual.shape) for _ in range(options.crops - 1)
    ]
    name = f"synthetic-{split}-{number:04d}_label_{'B1-0-0' if violent else 'A'}"
    made = "synthetic"
    features = Features(
        name, np.stack(crops).astype(np.float32), audio.astype(np.float32), made, made
    )
    spans = [span for event in found for span in (event.seen, event.heard) if span is not None]
    frames = tuple((start * SNIPPET_FRAMES, end * SNIPPET_FRAMES) for start, end in spans)
    return Video(name, violent, features, options.crops, frames), found


def _add_events(
    rng: np.random.Generator,
    streams: list[np.ndarray],
    prototypes: _Prototypes,
    asynchrony: int,
) -> list[Event]:
    length = len(streams[0])
    found = []
    for _ in range(rng.integers(1, 4)):
        kind, cls = rng.uniform(), rng.integers(CLASSES)
        start, end = _span(rng, length)
        lag = int(rng.integers(-asynchrony, asynchrony + 1))
        shift = min(max(lag, -start), length - end)
        seen = (start, end) if kind < 0.8 else None
        heard = (start + shift, end + shift) if kind < 0.6 or kind >= 0.8 else None
        for stream, violent, span in zip(streams, prototypes.violent, (seen, heard), strict=True):
            amplitude = rng.uniform(0.6, 1.4)
            if span is not None:
                stream[slice(*span)] += amplitude * violent[cls]
        found.append(Event(seen, heard))
    return found


def _span(rng: np.random.Generator, length: int) -> tuple[int, int]:
    size = int(rng.integers(4, 12))
    start = int(rng.integers(0, length - size + 1))
    return start, start + size
