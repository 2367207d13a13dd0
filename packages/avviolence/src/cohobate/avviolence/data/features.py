"""Features of one video on the snippet grid: checked, aligned, with their extractors."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic

FPS = 24
"""Frames a second to which every video is brought."""
SNIPPET_FRAMES = 16
"""Frames of a snippet; snippets do not overlap."""
SNIPPET_SECONDS = SNIPPET_FRAMES / FPS
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Features:
    """Features of one video.

    Attributes:
        name: Where they come from, for messages.
        visual: ``(C, T, V)`` for C crops, float32.
        audio: ``(T, A)``, float32.
        visual_extractor: What made the visual features.
        audio_extractor: What made the audio features.
        has_sound: Whether the video had an audio stream.
    """

    name: str
    visual: np.ndarray
    audio: np.ndarray
    visual_extractor: str = "unknown"
    audio_extractor: str = "unknown"
    has_sound: bool = True

    def __len__(self) -> int:
        return len(self.audio)

    @property
    def crops(self) -> int:
        """Number of crops."""
        return len(self.visual)

    def load(self) -> Features:
        """Themselves: features in memory stand where files can stand."""
        return self


def check(features: Features) -> Features:
    """Align both modalities and refuse what would train or score silently wrong.

    Both are cut to the shorter one. Lengths that differ by more than 2 snippets are worth a
    warning, by more than 2 snippets and 2 % an error: the files are not of one video, or of other
    grids.

    Args:
        features: As read.

    Raises:
        InputError: Wrong dimensions, no snippets, unequal lengths, values that are not finite.
    """
    name, visual, audio = features.name, features.visual, features.audio
    if visual.ndim != 3 or audio.ndim != 2:
        raise InputError(
            f"{name}: features must be (crops, snippets, width) and (snippets, width), "
            f"found {visual.shape} and {audio.shape}"
        )
    shorter, longer = sorted((visual.shape[1], audio.shape[0]))
    if shorter == 0:
        raise InputError(f"{name}: empty, it has no snippets")
    if longer - shorter > 2:
        text = f"{name}: {visual.shape[1]} visual snippets but {audio.shape[0]} of audio"
        if longer - shorter > 0.02 * longer:
            raise InputError(text)
        warnings.warn(text, stacklevel=2)
    visual, audio = visual[:, :shorter], audio[:shorter]
    for kind, array in (("visual", visual), ("audio", audio)):
        if not np.isfinite(array).all():
            raise InputError(f"{name}: {kind} features hold values that are not finite")
    return replace(
        features,
        visual=np.ascontiguousarray(visual, np.float32),
        audio=np.ascontiguousarray(audio, np.float32),
    )


def check_widths(features: Features, widths: tuple[int, int]) -> Features:
    """Refuse features of other widths than the network's.

    Args:
        features: As read.
        widths: Visual and audio width.

    Raises:
        InputError: They differ.
    """
    found = (features.visual.shape[2], features.audio.shape[1])
    if found != widths:
        raise InputError(
            f"{features.name}: widths {found[0]} (visual) and {found[1]} (audio), "
            f"expected {widths[0]} and {widths[1]}"
        )
    return features


def write_features(features: Features, path: Path) -> None:
    """Write one video's features to one file, whole or not at all.

    Args:
        features: What to write.
        path: Target, ``.safetensors``.
    """
    about = {
        "visual_extractor": features.visual_extractor,
        "audio_extractor": features.audio_extractor,
        "crops": str(features.crops),
        "has_sound": json.dumps(features.has_sound),
        "snippet_seconds": repr(SNIPPET_SECONDS),
    }
    arrays = {"visual": features.visual, "audio": features.audio}
    with save_atomic(path) as temporary:
        save_file(arrays, temporary, metadata=about)


def read_features(path: Path) -> Features:
    """Read a file of `write_features`.

    Args:
        path: The file.

    Raises:
        InputError: The file is damaged, is something else, or holds bad features.
    """
    about = read_header(path)
    with safe_open(path, framework="numpy") as file:
        visual, audio = file.get_tensor("visual"), file.get_tensor("audio")
    return check(
        Features(
            str(path),
            visual,
            audio,
            about["visual_extractor"],
            about["audio_extractor"],
            json.loads(about["has_sound"]),
        )
    )


def read_header(path: Path) -> dict[str, str]:
    """Which extractors made a file of `write_features`, without reading its arrays.

    Raises:
        InputError: The file is damaged or is something else.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about, names = file.metadata() or {}, set(file.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged feature file: {error}") from None
    if not {"visual", "audio"} <= names or "visual_extractor" not in about:
        raise InputError(f"{path}: not a feature file of `extract`")
    return dict(about)
