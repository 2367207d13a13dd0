"""Pictures with masks from files: reading, the three layouts, resizing and normalisation."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from cohobate.core.errors import InputError
from cohobate.core.training.data import Draw
from cohobate.medseg.esp_medsam.controller import unknown_modality

Normalization = Literal["sam", "official"]
Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}

MEAN = (123.675, 116.28, 103.53)
# The official loader divides by the mean where SAM divides by the standard deviation.
SCALE: dict[Normalization, tuple[float, float, float]] = {
    "sam": (58.395, 57.12, 57.375),
    "official": MEAN,
}


@dataclass(frozen=True)
class Picture:
    """An image with its mask, in files or in memory.

    Attributes:
        name: Shown in messages and results.
        modality: What kind of image it is; empty for a natural image.
        image: File, or RGB ``(H, W, 3)`` uint8.
        mask: File, or ``(H, W)`` bool; ``None`` without one.
    """

    name: str
    modality: str
    image: Path | np.ndarray
    mask: Path | np.ndarray | None


def read_rgb(path: Path) -> np.ndarray:
    """Read an image as RGB ``(H, W, 3)`` uint8.

    Grey images get three equal channels; what has more than 8 bits is stretched from its own
    smallest value to its largest.

    Raises:
        InputError: The file is missing or no image.
    """
    image = _open(path)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise InputError(f"{path}: has values that are not finite")
        low, high = values.min(), values.max()
        grey = np.rint((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8)
        return np.repeat(grey[..., None], 3, -1)
    return np.array(image.convert("RGB"))


def read_mask(path: Path, like: tuple[int, ...] | None = None) -> np.ndarray:
    """Read a mask, ``(H, W)`` bool: everything above 0 is foreground.

    Args:
        path: The file.
        like: Height and width that it must have.

    Raises:
        InputError: The file is missing, no image, or of another size.
    """
    image = _open(path)
    if image.mode not in ("1", "L") and not image.mode.startswith(("I", "F")):
        image = image.convert("L")
    mask = np.asarray(image) > 0
    if like is not None and mask.shape != tuple(like):
        raise InputError(f"{path}: the mask is {mask.shape}, the image {tuple(like)}")
    return mask


def _shape(path: Path) -> tuple[int, int]:
    """Height and width of an image, from its header alone.

    Raises:
        InputError: The file is missing or no image.
    """
    width, height = _open(path, decode=False).size
    return height, width


def _open(path: Path, decode: bool = True) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.copy() if decode else image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (
        UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable image: {reason}") from None


def prepare(rgb: np.ndarray, size: int, normalization: Normalization) -> tuple[Tensor, list[int]]:
    """An image as the network takes it.

    The longer side becomes ``size``; zeros are padded on the right and below after normalising.

    Args:
        rgb: ``(H, W, 3)`` uint8.
        size: Side of the square.
        normalization: As for `ImageData`.

    Returns:
        ``(3, size, size)``, and height and width of the part that is image.
    """
    inside = scaled(rgb.shape[:2], size)
    pixels = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None].float()
    if tuple(inside) != rgb.shape[:2]:
        pixels = F.interpolate(
            pixels, inside, mode="bilinear", align_corners=False, antialias=True
        ).clamp(0, 255)
    mean, scale = (torch.tensor(v)[:, None, None] for v in (MEAN, SCALE[normalization]))
    x = (pixels[0] - mean) / scale
    return F.pad(x, (0, size - inside[1], 0, size - inside[0])), list(inside)


def scaled(shape: Sequence[int], size: int) -> tuple[int, int]:
    """Height and width when the longer of them becomes ``size``."""
    longest = max(shape)
    height, width = (max(1, round(n * size / longest)) for n in shape[:2])
    return height, width


class Pictures(Dataset[dict[str, Any]]):
    """Pictures as samples: ``image``, ``mask``, ``inside``, ``modality``, ``name``, key.

    Args:
        pictures: What to read.
        size: Side of the square image.
        normalization: As for `ImageData`.
        flip: Probability of a horizontal flip, of image and mask alike; it follows from the draw.
        keep: Keep all in memory once read.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        size: int,
        normalization: Normalization,
        flip: float = 0.0,
        keep: bool = False,
    ) -> None:
        self.pictures, self.size, self.normalization = list(pictures), size, normalization
        self.flip, self.keep = flip, keep
        self._kept: dict[int, tuple[Tensor, Tensor, list[int]]] = {}
        self._digests: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self.pictures[index]
        image, mask, inside = self._read(int(index))
        if self.flipped(index):
            # within the image: what is padded stays on the right
            image, mask = (_flip(x, inside[1]) for x in (image, mask))
        sample, augmentation = self.sample_key(index)
        return {
            "image": image,
            "mask": mask,
            "inside": torch.tensor(inside),
            "modality": picture.modality,
            "name": picture.name,
            "sample": sample,
            "augmentation": augmentation,
        }

    def flipped(self, index: int) -> bool:
        """Whether this draw is flipped; a plain index never is."""
        seed = getattr(index, "seed", None)
        return seed is not None and bool(np.random.default_rng(seed).random() < self.flip)

    @property
    def transform_key(self) -> str:
        """What is done to every image."""
        return f"longest side {self.size}, padded, {self.normalization}"

    def sample_key(self, index: int) -> tuple[str, str]:
        """Modality and digest of the image's content, and how it is augmented."""
        place = int(index)
        if place not in self._digests:
            picture = self.pictures[place]
            content = (
                picture.image.read_bytes()
                if isinstance(picture.image, Path)
                else np.ascontiguousarray(picture.image).tobytes()
            )
            digest = blake2b(content, digest_size=16).hexdigest()
            self._digests[place] = f"{picture.modality}/{digest}"
        augmentation = ("flip" if self.flipped(index) else "as it is") if self.flip else ""
        return self._digests[place], augmentation

    def every_draw(self) -> list[int]:
        """Each picture once in every way that it may be drawn."""
        if not self.flip:
            return list(range(len(self)))
        seeds = {self.flipped(Draw(0, seed)): seed for seed in range(256)}
        return [Draw(i, seed) for i in range(len(self)) for seed in seeds.values()]

    def _read(self, index: int) -> tuple[Tensor, Tensor, list[int]]:
        if index in self._kept:
            return self._kept[index]
        picture = self.pictures[index]
        rgb = read_rgb(picture.image) if isinstance(picture.image, Path) else picture.image
        image, inside = prepare(rgb, self.size, self.normalization)
        mask = self._mask(picture, rgb.shape[:2], inside)
        if self.keep:
            self._kept[index] = image, mask, inside
        return image, mask, inside

    def _mask(self, picture: Picture, shape: tuple[int, ...], inside: list[int]) -> Tensor:
        if picture.mask is None:
            return torch.zeros(1, self.size, self.size)
        found = picture.mask
        mask = read_mask(found, shape) if isinstance(found, Path) else found
        y = torch.from_numpy(np.ascontiguousarray(mask))[None, None].float()
        if tuple(inside) != mask.shape:
            y = F.interpolate(y, tuple(inside), mode="nearest-exact")
        return F.pad(y[0], (0, self.size - inside[1], 0, self.size - inside[0]))


def _flip(x: Tensor, width: int) -> Tensor:
    return torch.cat([x[..., :width].flip(-1), x[..., width:]], -1)


# --- layouts -------------------------------------------------------------------------------------

Found = dict[Part, list[Picture]]


@dataclass(frozen=True)
class Source:
    """Where pictures come from.

    Args:
        root: The folder.
        known: Modalities that may occur.
        splits: Modality → JSON file with the lists ``train``, ``valid`` and ``test``.
        modality: What a folder of ``images`` and ``masks`` shows.
        test: Share of such a folder for the test.
        val: Share for validation.
    """

    root: Path
    known: Sequence[str]
    splits: Mapping[str, Path] = field(default_factory=dict)
    modality: str | None = None
    test: float = 0.2
    val: float = 0.1

    def find(self) -> Found:
        """The pictures of each part.

        Raises:
            InputError: The folder is not laid out as described, a file is missing or no image, or
                a mask is of another size than its image.
        """
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder")
        if self.splits:
            return self._complete(self._official())
        if (self.root / "manifest.csv").exists():
            return self._complete(self._manifest(self.root / "manifest.csv"))
        if (self.root / "images").is_dir() and (self.root / "masks").is_dir():
            return self._complete(self._folder())
        raise InputError(
            f"{self.root}: no manifest.csv, no images and masks, and no --data.splits were given"
        )

    def _complete(self, found: Found) -> Found:
        for part, pictures in found.items():
            if not pictures:
                raise InputError(f"{self.root}: no picture for {part}")
            for picture in pictures:
                assert isinstance(picture.image, Path)
                assert isinstance(picture.mask, Path)
                image, mask = _shape(picture.image), _shape(picture.mask)
                if image != mask:
                    raise InputError(f"{picture.mask}: the mask is {mask}, the image {image}")
        return found

    def _check(self, modality: str, place: str) -> str:
        if modality not in self.known:
            raise InputError(
                f"{place}: {unknown_modality(modality, self.known)}; --data.modalities names others"
            )
        return modality

    def _manifest(self, path: Path) -> Found:
        found: Found = {part: [] for part in PARTS}
        try:
            rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: {error}") from None
        for number, row in enumerate(rows, start=2):
            place = f"{path}: line {number}"
            for column in ("image", "mask", "modality", "split"):
                if not row.get(column):
                    raise InputError(f"{place}: no {column}")
            part = _part(row["split"], place)
            image, mask = self.root / row["image"], self.root / row["mask"]
            modality = self._check(row["modality"], place)
            found[part].append(Picture(row["image"], modality, image, mask))
        return found

    def _official(self) -> Found:
        found: Found = {part: [] for part in PARTS}
        for modality, path in self.splits.items():
            file = path if path.is_absolute() or path.exists() else self.root / path
            self._check(modality, str(file))
            for key, names in _read_split(file).items():
                part = _part(key, str(file))
                for name in names:
                    name = name if Path(name).suffix.lower() in SUFFIXES else f"{name}.png"
                    image, mask = (self.root / f"{kind}_1024" / name for kind in ("image", "mask"))
                    found[part].append(Picture(name, modality, image, mask))
        return found

    def _folder(self) -> Found:
        if self.modality is None:
            raise InputError(f"{self.root}: images and masks, but no --data.modality")
        modality = self._check(self.modality, "--data.modality")
        images, masks = (_by_stem(self.root / name) for name in ("images", "masks"))
        if missing := sorted(set(images) - set(masks)):
            raise InputError(f"{images[missing[0]]}: no mask of that name in {self.root / 'masks'}")
        pictures = [Picture(name, modality, images[name], masks[name]) for name in sorted(images)]
        random.Random(0).shuffle(pictures)
        test, val = (round(n * len(pictures)) for n in (self.test, self.val))
        return {
            "train": pictures[test + val :],
            "val": pictures[test : test + val],
            "test": pictures[:test],
        }


def _part(name: str, place: str) -> Part:
    names: dict[str, Part] = {"train": "train", "val": "val", "valid": "val", "test": "test"}
    if name not in names:
        raise InputError(f"{place}: split '{name}' is none of train, val, test")
    return names[name]


def _read_split(path: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    right = isinstance(content, dict) and all(
        isinstance(content.get(key), list) for key in ("train", "valid", "test")
    )
    if not right:
        raise InputError(f"{path}: needs the lists train, valid and test")
    return {key: [str(name) for name in content[key]] for key in ("train", "valid", "test")}


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in image_files(folder):
        other = found.setdefault(path.stem, path)
        if other != path:
            raise InputError(f"{path}: has the name of {other}")
    return found


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, sorted."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def each_modality(pictures: Iterable[Picture], order: Sequence[str]) -> list[str]:
    """The modalities that occur, in a given order."""
    there = {picture.modality for picture in pictures}
    return [name for name in order if name in there]
