"""Scores of files: a value every two thirds of a second, intervals, one score a file, a picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cohobate.avviolence import plots
from cohobate.avviolence.data.features import (
    SNIPPET_SECONDS,
    SUFFIX,
    Features,
    check_widths,
    read_features,
)
from cohobate.avviolence.features.extract import Choice, Extracted, Extraction, videos_in
from cohobate.avviolence.features.media import MEDIA
from cohobate.avviolence.metrics import video_scores
from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic


@dataclass(frozen=True)
class Rule:
    """How scores become intervals.

    Attributes:
        threshold: A snippet counts from this score on.
        min_length: Shorter intervals are dropped, in seconds.
        max_gap: Intervals closer than this are joined, in seconds.
    """

    threshold: float = 0.5
    min_length: float = 0.0
    max_gap: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1 or min(self.min_length, self.max_gap) < 0:
            raise InputError("threshold must lie in 0..1, min_length and max_gap not below 0")


def intervals(scores: np.ndarray, rule: Rule) -> list[tuple[float, float]]:
    """Violent spans of a score curve; gaps are closed before short spans are dropped.

    Args:
        scores: Score of each snippet, ``(T,)``.
        rule: Threshold, minimum length and gap.

    Returns:
        ``(start, end)`` in seconds.

    Example:
        >>> intervals(np.array([0.1, 0.9, 0.2, 0.8]), Rule(max_gap=0.7))
        [(0.667, 2.667)]
    """
    above = np.concatenate(([0], scores >= rule.threshold, [0])).astype(np.int8)
    starts, ends = (np.flatnonzero(np.diff(above) == way) for way in (1, -1))
    if len(starts) == 0:
        return []
    apart = (starts[1:] - ends[:-1]) * SNIPPET_SECONDS > rule.max_gap
    begin = starts[np.concatenate(([True], apart))] * SNIPPET_SECONDS
    finish = ends[np.concatenate((apart, [True]))] * SNIPPET_SECONDS
    return [
        (round(float(start), 3), round(float(end), 3))
        for start, end in zip(begin, finish, strict=True)
        if end - start >= rule.min_length
    ]


@dataclass(frozen=True)
class Scored:
    """A scored file.

    Attributes:
        file: The file.
        scores: Score of each snippet, ``(T,)``.
        score: One score for the whole file: the network's bag probability, mean over crops.
        features: What was scored.
    """

    file: Path
    scores: np.ndarray
    score: float
    features: Features


def bag_logit_parts(network: nn.Module, features: Features, device: Any) -> Tensor:
    """Fused logits ``(C, T)`` of a two-stream network for all crops of a video."""
    visual = torch.from_numpy(features.visual).to(device)
    audio = torch.from_numpy(features.audio).to(device).expand(features.crops, -1, -1)
    logits: Tensor = network(visual, audio).logits
    return logits.float().cpu()


def score_files(
    inputs: Sequence[Path],
    out: Path,
    *,
    network: nn.Module,
    bag_probability: Any,
    trained_on: tuple[str, str],
    widths: tuple[int, int],
    choice: Choice,
    rule: Rule,
    force: bool,
    picture: bool,
) -> list[Path]:
    """Score videos or feature files and write what was found.

    For each file ``<name>.csv`` (a line a snippet), ``<name>.json`` and ``<name>.png``; for all of
    them ``files.csv``. A file that cannot be read is reported and skipped; the others are scored.

    Args:
        inputs: Videos, files of ``extract``, or folders of either.
        out: Folder for the results.
        network: Two-stream network.
        bag_probability: From logits ``(C, T)`` to a probability ``(C,)``.
        trained_on: Extractors of the features that the network was trained on.
        widths: Visual and audio width of those features.
        choice: Extractors for videos.
        rule: How scores become intervals.
        force: Score features of other extractors too.
        picture: Draw the timeline.

    Returns:
        The files written.

    Raises:
        InputError: At the end, when files were skipped; before, when nothing can be scored at all.
    """
    paths = videos_in(inputs, MEDIA | {SUFFIX})
    device = next(network.parameters()).device
    written: list[Path] = []
    faults: list[str] = []
    rows: list[dict[str, Any]] = []
    for path in tqdm(paths, desc="predict", unit="video"):
        try:
            features, extracted = _features(path, choice)
            _check_extractors(features, trained_on, force)
            check_widths(features, widths)
            logits = bag_logit_parts(network, features, device)
            score = float(bag_probability(logits).mean())
            scored = Scored(path, video_scores(logits.numpy()), score, features)
        except InputError as error:
            faults.append(str(error))
            tqdm.write(str(error))
            continue
        written += _write(scored, rule, out)
        if picture:
            written.append(_draw(scored, extracted, rule, out))
        rows.append(_row(scored, rule))
    if rows:
        written.append(out / "files.csv")
        _write_table(written[-1], rows)
    if faults:
        raise InputError(f"{len(faults)} of {len(paths)} files skipped: {'; '.join(faults[:5])}")
    return written


_loaded: dict[Choice, Extraction] = {}


def _features(path: Path, choice: Choice) -> tuple[Features, Extracted | None]:
    if path.suffix == SUFFIX:
        return read_features(path), None
    if choice not in _loaded:  # loading takes seconds; a folder of features needs none
        _loaded.clear()
        _loaded[choice] = choice.load()
    extracted = _loaded[choice].run(path)
    return extracted.features, extracted


def _check_extractors(features: Features, trained_on: tuple[str, str], force: bool) -> None:
    made = (features.visual_extractor, features.audio_extractor)
    for kind, here, there in zip(("visual", "audio"), made, trained_on, strict=True):
        if not force and not _same_extractor(here, there):
            raise InputError(
                f"{features.name}: {kind} features by {here}, but the checkpoint was trained on "
                f"{there}: its scores would mean nothing (--force true scores all the same)"
            )


def _same_extractor(one: str, other: str) -> bool:
    """Equal ids; where one has no fingerprint (published features), equal names."""
    if "@" in one and "@" in other:
        return one == other
    return "unknown" in (one, other) or one.partition("@")[0] == other.partition("@")[0]


def _row(scored: Scored, rule: Rule) -> dict[str, Any]:
    spans = intervals(scored.scores, rule)
    return {
        "file": scored.file.name,
        "score": round(scored.score, 6),
        "seconds": round(len(scored.scores) * SNIPPET_SECONDS, 3),
        "highest": round(float(scored.scores.max()), 6),
        "intervals": ";".join(f"{start}-{end}" for start, end in spans),
    }


def _snippets(scored: Scored) -> Iterator[dict[str, float]]:
    for number, score in enumerate(scored.scores):
        start, end = number * SNIPPET_SECONDS, (number + 1) * SNIPPET_SECONDS
        yield {"start": round(start, 3), "end": round(end, 3), "score": round(float(score), 6)}


def _write(scored: Scored, rule: Rule, out: Path) -> list[Path]:
    table, described = (out / f"{scored.file.stem}{suffix}" for suffix in (".csv", ".json"))
    _write_table(table, list(_snippets(scored)))
    content = {
        "file": scored.file.name,
        "score": round(scored.score, 6),
        "threshold": rule.threshold,
        "intervals": [{"start": s, "end": e} for s, e in intervals(scored.scores, rule)],
        "has_sound": scored.features.has_sound,
        "visual_extractor": scored.features.visual_extractor,
        "audio_extractor": scored.features.audio_extractor,
        "snippets": list(_snippets(scored)),
    }
    with save_atomic(described) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return [table, described]


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with save_atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _draw(scored: Scored, extracted: Extracted | None, rule: Rule, out: Path) -> Path:
    path = out / f"{scored.file.stem}.png"
    plots.timeline(
        path,
        scored.scores,
        intervals(scored.scores, rule),
        title=f"{scored.file.name}: score {scored.score:.3f}",
        threshold=rule.threshold,
        thumbnails=extracted.thumbnails if extracted else None,
        waveform=extracted.waveform if extracted else None,
    )
    return path
