"""Commands of this package beside the common ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cohobate.core.errors import InputError


def extract(
    videos: list[Path],
    out: Path,
    visual: str = "s3d",
    audio: str = "vggish",
    visual_weights: Path | None = None,
    audio_weights: Path | None = None,
    crops: int = 1,
    device: str = "cpu",
    jobs: int = 1,
) -> int | None:
    """Turn videos into picture and sound features on one time grid.

    Args:
        videos: Files and folders.
        out: Folder for the features; what is there already is kept.
        visual: A video model of torchvision (s3d, r3d_18, mvit_v2_s, ...) or of transformers.
        audio: vggish, vggish-pca, logmel (needs no weights), or a model of transformers.
        visual_weights: Local weights of the visual model; by default its public ones.
        audio_weights: Local weights of the audio model; by default its public ones.
        crops: 1 for the centre, 5 for centre and corners.
        device: Where the networks run.
        jobs: Processes.
    """
    from cohobate.avviolence.features.extract import Choice, extract_all, videos_in

    choice = Choice(visual, audio, visual_weights, audio_weights, crops, device)
    reports = extract_all(videos_in(videos), out, choice, jobs)
    faults = [report.fault for report in reports if report.fault]
    if faults:
        raise InputError(f"{len(faults)} of {len(reports)} files skipped: {'; '.join(faults[:5])}")
    print(out)
    return None


def ground_truth(
    annotations: Path,
    features: Path,
    out: Path,
    order: Path | None = None,
    audio: Path | None = None,
) -> int | None:
    """Build XD-Violence's frame ground truth for a folder of published test features.

    Args:
        annotations: annotations.txt.
        features: The folder RGBTest.
        out: The .npy file to write, 16 values a snippet, videos in order.
        order: A published list; by default the order of the names.
        audio: The folder vggish-features/test; by default beside the features.
    """
    from cohobate.avviolence.data.layout import published, snippet_frames_truth
    from cohobate.core.io import save_atomic

    audio = audio or features.parent / "vggish-features" / "test"
    videos = published(features, audio, order=order, annotations=annotations)
    truth = [snippet_frames_truth(len(v.source.load()), v.intervals or ()) for v in videos]
    with save_atomic(out) as temporary:
        np.save(temporary, np.concatenate(truth))
    print(f"{out}: {len(videos)} videos, {sum(map(len, truth))} frames")
    return None


COMMANDS: tuple[Callable[..., int | None], ...] = (extract, ground_truth)
