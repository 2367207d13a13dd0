"""Dual reversed pairs on disk and in memory, found by name and checked before they are used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cohobate.core.errors import InputError
from cohobate.video.data.media import read_picture

Layout = Literal["auto", "rs-gopro", "pairs"]
Picture = Path | np.ndarray

_GOPRO = re.compile(r"(\d+)_rs_(t2b|b2t)\.png")
_TRUTH = re.compile(r"(\d+)_gs_(\d+)\.png")
_REAL = re.compile(r"(.+)_(t2b|b2t)\.(?:png|jpe?g|bmp|tiff?|webp)", re.IGNORECASE)
_UPSIDE_DOWN = 0.5  # a flipped partner fits at least this much better


@dataclass(frozen=True)
class DualPair:
    """Two images of one moment, read in opposite directions.

    Attributes:
        name: For messages and results.
        t2b: Read from the top: a file, or ``(H, W, 3)`` RGB, uint8.
        b2t: Read from the bottom, stored upright.
        frames: True global-shutter frames at evenly spaced times; none when unknown.
    """

    name: str
    t2b: Picture
    b2t: Picture
    frames: tuple[Picture, ...] = ()

    def load(self) -> np.ndarray:
        """Both images, ``(2, H, W, 3)``, uint8.

        Raises:
            InputError: A file cannot be read, or the two do not belong together.
        """
        t2b, b2t = load(self.t2b), load(self.b2t)
        check_pair(t2b, b2t, _called(self.t2b, self.name), _called(self.b2t, self.name))
        return np.stack((t2b, b2t))

    def truth(self, numbers: Sequence[int]) -> np.ndarray:
        """True frames by number, ``(len(numbers), H, W, 3)``, uint8."""
        found = [load(self.frames[k]) for k in numbers]
        for picture, k in zip(found, numbers, strict=True):
            if picture.shape != found[0].shape:
                raise InputError(f"{self.frames[k]}: another size than the frames beside it")
        return np.stack(found)


def load(picture: Picture) -> np.ndarray:
    """The pixels of a file, or the array itself."""
    return read_picture(picture) if isinstance(picture, Path) else picture


def check_pair(t2b: np.ndarray, b2t: np.ndarray, first: str, second: str) -> None:
    """Refuse two images that cannot be of one moment.

    Args:
        t2b: ``(H, W, 3)``.
        b2t: The same.
        first: Name of t2b, for the message.
        second: Name of b2t.

    Raises:
        InputError: Sizes differ, there are too few rows, or b2t is stored upside down.
    """
    if t2b.shape != b2t.shape:
        a, b = (f"{x.shape[1]}×{x.shape[0]}" for x in (t2b, b2t))
        raise InputError(f"{second}: {b} pixels, but its partner {first} has {a}")
    if len(t2b) < 2:
        raise InputError(f"{first}: one row has no readout time")
    one, other = (x.astype(np.float32).mean(2) for x in (t2b, b2t))
    upright, flipped = np.abs(one - other).mean(), np.abs(one - other[::-1]).mean()
    if flipped < _UPSIDE_DOWN * upright:
        raise InputError(
            f"{second}: wrong row order, it fits {first} upside down: store the rows of b2t upright"
        )


def find_pairs(folder: Path) -> list[DualPair]:
    """Pairs ``<name>_t2b.*`` and ``<name>_b2t.*`` in a folder and in its folders.

    Raises:
        InputError: There is none, or a partner is missing.
    """
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = [pair for inner in folders for pair in _paired(inner, _REAL, folder)]
    if not found:
        raise InputError(f"{folder}: no pictures named <name>_t2b.png and <name>_b2t.png")
    return found


def find_rs_gopro(folder: Path) -> list[DualPair]:
    """Pairs with their truth in the layout of RS-GOPRO: ``<sequence>/RS`` and ``<sequence>/GS``.

    Raises:
        InputError: There is none, or a file is missing.
    """
    found = []
    for sequence in sorted(path for path in folder.iterdir() if (path / "RS").is_dir()):
        truth: dict[str, dict[int, Path]] = {}
        for path in sorted((sequence / "GS").glob("*.png")):
            if match := _TRUTH.fullmatch(path.name):
                truth.setdefault(match[1], {})[int(match[2])] = path
        for pair in _paired(sequence / "RS", _GOPRO, folder):
            number = pair.name.rsplit("/", 1)[1]
            frames = truth.get(number, {})
            if truth and sorted(frames) != list(range(max(map(len, truth.values())))):
                raise InputError(f"{sequence / 'GS'}: frames of {number} are missing")
            name = f"{sequence.name}/{number}"
            found.append(
                DualPair(name, pair.t2b, pair.b2t, tuple(frames[k] for k in sorted(frames)))
            )
    if not found:
        raise InputError(f"{folder}: no sequences with RS/<number>_rs_t2b.png")
    return found


def order(inputs: Sequence[Path]) -> tuple[Path, Path]:
    """Two files as t2b and b2t: by their names where these say so, else in the order given.

    Raises:
        InputError: There are not two, or the names contradict the order.
    """
    if len(inputs) != 2:
        raise InputError(
            f"{inputs[0]}: needs its partner; give the t2b and then the b2t picture or clip"
            if len(inputs) == 1
            else f"{len(inputs)} inputs: give two pictures or clips, t2b then b2t, or one folder"
        )
    for path, own, other in zip(inputs, ("t2b", "b2t"), ("b2t", "t2b"), strict=True):
        if other in path.stem.lower() and own not in path.stem.lower():
            raise InputError(f"{path}: wrong row order, the {own} file is expected at this place")
    return inputs[0], inputs[1]


def _paired(folder: Path, pattern: re.Pattern[str], root: Path) -> list[DualPair]:
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := pattern.fullmatch(path.name):
            files.setdefault(match[1], {})[match[2].lower()] = path
    for sides in files.values():
        for own, other in (("t2b", "b2t"), ("b2t", "t2b")):
            if own not in sides:
                raise InputError(f"{sides[other]}: has no {own} partner beside it")
    names = {n: f"{folder.relative_to(root)}/{n}".removeprefix("./") for n in files}
    return [DualPair(names[n], sides["t2b"], sides["b2t"]) for n, sides in files.items()]


def _called(picture: Picture, name: str) -> str:
    return str(picture) if isinstance(picture, Path) else name
