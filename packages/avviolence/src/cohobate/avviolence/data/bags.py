"""The data module: bags of fixed length to train on, whole videos to evaluate on."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cohobate.avviolence.data import synthetic
from cohobate.avviolence.data.features import check_widths
from cohobate.avviolence.data.layout import Split, Video, own, published, snippet_frames_truth
from cohobate.avviolence.data.synthetic import SyntheticBags
from cohobate.core.errors import InputError
from cohobate.core.training.data import EpochSampler, ResumableLoader

Bag = dict[str, Any]


def sample_positions(snippets: int, length: int) -> np.ndarray:
    """Which snippets represent a bag: all of them, or ``length`` spread evenly over it.

    Args:
        snippets: Snippets of the video.
        length: Most that are taken.

    Returns:
        Indices, ``(min(snippets, length),)``.

    Example:
        >>> sample_positions(10, 4)
        array([0, 3, 6, 9])
    """
    if snippets <= length:
        return np.arange(snippets)
    return np.linspace(0, snippets - 1, length).astype(np.int64)


class Bags(Dataset[Bag]):
    """Training bags: every crop of every video is one.

    Args:
        videos: The videos.
        length: Most snippets of a bag.
        widths: Visual and audio width that every file must have.
    """

    def __init__(self, videos: list[Video], length: int, widths: tuple[int, int]) -> None:
        self.videos, self.length, self.widths = videos, length, widths
        self.index = [(v, c) for v, video in enumerate(videos) for c in range(video.crops)]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> Bag:
        number, crop = self.index[item]
        video = self.videos[number]
        features = check_widths(video.source.load(), self.widths)
        places = sample_positions(len(features), self.length)
        return {
            "visual": torch.from_numpy(features.visual[crop, places]),
            "audio": torch.from_numpy(features.audio[places]),
            "label": float(video.violent),
        }


class Videos(Dataset[Bag]):
    """Whole videos with all crops, for evaluation.

    Args:
        videos: The videos.
        widths: Visual and audio width that every file must have.
    """

    def __init__(self, videos: list[Video], widths: tuple[int, int]) -> None:
        self.videos, self.widths = videos, widths

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, item: int) -> Bag:
        video = self.videos[item]
        features = check_widths(video.source.load(), self.widths)
        spans = video.intervals
        truth = None if spans is None else snippet_frames_truth(len(features), spans)
        return {
            "visual": torch.from_numpy(features.visual),
            "audio": torch.from_numpy(features.audio),
            "label": float(video.violent),
            "truth": None if truth is None else torch.from_numpy(truth),
        }


def collate(bags: list[Bag]) -> dict[str, Tensor]:
    """Stack bags, padded with zeros to the longest of them.

    Returns:
        ``visual`` ``(B, T, V)``, ``audio`` ``(B, T, A)``, ``label`` ``(B,)``, ``length`` ``(B,)``.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "visual": pad([bag["visual"] for bag in bags], batch_first=True),
        "audio": pad([bag["audio"] for bag in bags], batch_first=True),
        "label": torch.tensor([bag["label"] for bag in bags]),
        "length": torch.tensor([len(bag["audio"]) for bag in bags]),
    }


class BagData(pl.LightningDataModule):
    """Audio-visual bags with video labels.

    Args:
        root: A folder: XD-Violence as published (``RGB/``, ``RGBTest/``, ``vggish-features/train``
            and ``test``, ``annotations.txt``), or features written by ``extract`` with a
            ``labels.csv``. Without it the embedded SYNTHETIC set.
        batch_size: Bags a step.
        length: Snippets of a training bag; longer videos are thinned out, shorter ones padded.
        val_share: Share of the training videos held out where the data has no validation split. A
            held-out video has a label but no marked frames, so it is judged as a whole.
        watch_test: Also score the test videos in every epoch. It chooses nothing; it shows what
            choosing on test data would have reported.
        train_list: Published list that chooses the training videos and their order.
        test_list: The same for the test videos.
        synthetic: The embedded set.
        workers: Processes that read files.
        seed: The run's seed.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        batch_size: int = 128,
        length: int = 200,
        val_share: float = 0.1,
        watch_test: bool = True,
        train_list: Path | None = None,
        test_list: Path | None = None,
        synthetic: SyntheticBags | None = None,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root, self.batch_size, self.length = root, batch_size, length
        self.watch_test, self.workers, self.seed = watch_test, workers, seed
        self.synthetic = synthetic or SyntheticBags()
        if root is None:
            self.videos = self._synthetic()
        else:
            self.videos = _read(root, train_list, test_list)
        if not self.videos["train"]:
            raise InputError(f"{root}: no training videos")
        if not self.videos["val"]:
            self.videos |= _hold_out(self.videos["train"], val_share)
        first = self.videos["train"][0].source.load()
        self.visual_width, self.audio_width = first.visual.shape[2], first.audio.shape[1]
        self.visual_extractor, self.audio_extractor = first.visual_extractor, first.audio_extractor

    def describe(self) -> str:
        """What the data is, in one line."""
        if self.root is None:
            return self.synthetic.describe()
        counts = ", ".join(f"{len(videos)} {split}" for split, videos in self.videos.items())
        made = f"{self.visual_extractor} + {self.audio_extractor}"
        return f"{self.root.name}: videos {counts}; features {made}"

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled bags, a sample a crop."""
        bags = Bags(self.videos["train"], self.length, self._widths)
        return ResumableLoader(
            bags,
            batch_size=self.batch_size,
            sampler=EpochSampler(len(bags), seed=self.seed),
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

    def val_dataloader(self) -> list[DataLoader[Bag]]:
        """Validation videos and, when watched, the test videos."""
        splits: list[Split] = ["val", "test"] if self.watch_test else ["val"]
        return [self._whole(split) for split in splits if self.videos[split]]

    def test_dataloader(self) -> list[DataLoader[Bag]]:
        """Test videos, one a batch; no loader where there are none."""
        return [self._whole("test")] if self.videos["test"] else []

    @property
    def _widths(self) -> tuple[int, int]:
        return self.visual_width, self.audio_width

    def _whole(self, split: Split) -> DataLoader[Bag]:
        videos = Videos(self.videos[split], self._widths)
        return DataLoader(videos, batch_size=None, num_workers=self.workers)

    def _synthetic(self) -> dict[Split, list[Video]]:
        return {
            split: synthetic.make(self.synthetic, self.seed, split) for split in synthetic.SPLITS
        }


def _read(root: Path, train_list: Path | None, test_list: Path | None) -> dict[Split, list[Video]]:
    if (root / "labels.csv").exists():
        return own(root)
    if not (root / "RGB").is_dir():
        raise InputError(f"{root}: has neither labels.csv nor XD-Violence's folder RGB")
    sound, marks = root / "vggish-features", root / "annotations.txt"
    train = published(root / "RGB", sound / "train", order=train_list)
    test: list[Video] = []
    if (root / "RGBTest").is_dir():
        test = published(root / "RGBTest", sound / "test", order=test_list, annotations=marks)
    return {"train": train, "val": [], "test": test}


def _hold_out(videos: list[Video], share: float) -> dict[Split, list[Video]]:
    """Split by a hash of the name: a video stays on its side when others come or go."""
    held = {v.id for v in videos if zlib.crc32(v.id.encode()) / 2**32 < share}
    val = [v for v in videos if v.id in held]
    train = [v for v in videos if v.id not in held]
    if not train:
        raise InputError(f"val_share {share} leaves no training videos")
    return {"train": train, "val": val}
