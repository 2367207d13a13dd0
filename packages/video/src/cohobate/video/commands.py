"""Commands of this package beside the common ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cohobate.core.errors import InputError
from cohobate.video.data.media import Clip, write_picture
from cohobate.video.data.synthesis import Readout, Synthesised, pairs_of_clip


def make_pairs(
    clip: Path,
    out: Path,
    height: int | None = None,
    row_gap: int = 1,
    exposure: int = 1,
    upsample: int = 1,
    stride: int | None = None,
    frames: int = 9,
    gamma: bool = False,
    cut: float = 40.0,
    val_share: float = 0.1,
    test_share: float = 0.25,
) -> int | None:
    """Make dual reversed pairs and their truth from a clip, in the layout of RS-GOPRO.

    The clip's beginning becomes training pairs, its end test pairs; no frame is in two parts.

    Args:
        clip: A video, the faster the better.
        out: Folder for train, valid and test; sequences are named after the clip.
        height: Rows of the pairs; by default the clip's.
        row_gap: Source frames from one row to the next, after upsampling.
        exposure: Source frames averaged for a row, after upsampling.
        upsample: Frames made of one by motion-compensated interpolation.
        stride: Frames of the clip from one pair to the next; by default one readout.
        frames: Global-shutter frames of each pair.
        gamma: Average light instead of grey values.
        cut: Leave out pairs across a cut, by mean difference of neighbouring frames, of 255.
        val_share: Part of the clip for validation.
        test_share: Part of the clip for test.
    """
    readout = Readout(height, row_gap, exposure, upsample, stride, frames, gamma, cut)
    source = Clip(clip)
    total = source.frames or sum(1 for _ in source)
    ends = [round(total * (1 - val_share - test_share)), round(total * (1 - test_share)), total]
    if not 0 <= ends[0] <= ends[1] <= total:
        raise InputError(
            f"val_share {val_share:g} and test_share {test_share:g}: not parts of a clip"
        )
    frames_left = iter(tqdm(source, total=total, unit="frame"))
    made, start = {}, 0
    for part, end in zip(("train", "valid", "test"), ends, strict=True):
        made[part] = 0
        if end == start:
            continue
        folder = out / part / clip.stem
        try:
            for pair in pairs_of_clip(islice(frames_left, end - start), readout):
                _write(folder, made[part], pair)
                made[part] += 1
        except InputError as error:
            raise InputError(f"{clip}: {part} part: {error}") from None
        start = end
    if not any(made.values()):
        raise InputError(f"{clip}: every readout has a cut in it")
    print(f"{out}: " + ", ".join(f"{count} {part}" for part, count in made.items()))
    return None


def _write(folder: Path, number: int, pair: Synthesised) -> None:
    t2b, b2t, truth = (np.rint(x).astype(np.uint8) for x in pair)
    write_picture(folder / "RS" / f"{number:08d}_rs_t2b.png", t2b)
    write_picture(folder / "RS" / f"{number:08d}_rs_b2t.png", b2t)
    for k, picture in enumerate(truth):
        write_picture(folder / "GS" / f"{number:08d}_gs_{k:03d}.png", picture)


COMMANDS: tuple[Callable[..., int | None], ...] = (make_pairs,)
