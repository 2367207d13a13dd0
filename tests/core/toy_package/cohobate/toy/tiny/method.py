from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cohobate.core.errors import InputError
from cohobate.core.module import DistillModule
from cohobate.core.teachers import EMATeacher
from cohobate.core.training.data import Draw, EpochSampler, ResumableLoader
from cohobate.core.training.schedules import Linear


class Cloud(Dataset):
    def __init__(self, samples: int, augment: bool) -> None:
        rng = np.random.default_rng(7)
        self.label = rng.integers(0, 2, samples)
        self.x = rng.normal(size=(samples, 4)) + self.label[:, None]
        self.augment = augment

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = self.x[index]
        if self.augment:
            assert isinstance(index, Draw)
            x = x + 0.3 * np.random.default_rng(index.seed).normal(size=4)
        return torch.as_tensor(x, dtype=torch.float32), int(self.label[index])


@dataclass(frozen=True)
class Range:
    """What the data says of itself.

    Args:
        low: Least value.
        high: Largest value.
    """

    low: float = -4.0
    high: float = 4.0


class Points(pl.LightningDataModule):
    """Two clouds of points.

    Args:
        samples: Number of points.
        batch_size: Points a batch.
        root: A folder; must exist when given.
        seed: Seed of order and noise.
        workers: Data workers.
    """

    def __init__(
        self,
        samples: int = 64,
        batch_size: int = 8,
        root: Path | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.samples, self.batch_size, self.seed, self.workers = samples, batch_size, seed, workers
        if root is not None and not root.is_dir():
            raise InputError(f"{root}: no such folder")
        self.features, self.bounds = 4, Range(high=5.0)

    def describe(self) -> str:
        return "SYNTHETIC points"

    def train_dataloader(self) -> ResumableLoader:
        data = Cloud(self.samples, augment=True)
        sampler = EpochSampler(len(data), seed=self.seed)
        return ResumableLoader(
            data, batch_size=self.batch_size, sampler=sampler, num_workers=self.workers
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Cloud(self.samples, augment=False), batch_size=32)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()


class Tiny(DistillModule):
    """A multi-layer perceptron taught by its own average.

    Args:
        features: Number of inputs, from the data.
        bounds: Range of the inputs, from the data.
        width: Hidden units.
        decay: Decay of the teacher.
        distill: Whether to distil.
        lr: Learning rate.
        dropout: Dropout rate.
    """

    from_data = ("features", "bounds")
    monitor = "val/accuracy"
    mode = "max"

    def __init__(
        self,
        features: int,
        bounds: Range = Range(),
        width: int = 8,
        decay: float = 0.9,
        distill: bool = True,
        lr: float = 0.05,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(distill=distill, weights={"consistency": Linear(0.0, 1.0)})
        layers = (nn.Linear(features, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 2))
        self.net = nn.Sequential(*layers)
        self.teacher = EMATeacher(self.net, decay)
        self.features, self.bounds, self.lr = features, bounds, lr

    @property
    def student(self) -> nn.Module:
        return self.net

    def example_input(self) -> tuple[Tensor, ...]:
        return (torch.zeros(1, self.features),)

    def forward_train(self, batch):
        deadly = os.environ.get("TINY_DIE_AT_STEP")
        if deadly is not None and int(deadly) == self.trainer.global_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.net(batch[0])

    def task_loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    def distill_loss(self, outputs, batch):
        target = self.teacher(batch[0]).softmax(1)
        return {"consistency": F.mse_loss(outputs.softmax(1), target)}

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.log("val/accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def test_step(self, batch, batch_idx):
        self.log("test/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        # asking for the number of steps makes Lightning set up the data before a run is resumed
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def predict_files(self, inputs: list[Path], out: Path, *, threshold: float = 0.5) -> list[Path]:
        """Classify points.

        Args:
            inputs: ``.npy`` files.
            out: Folder.
            threshold: Least probability of class 1.
        """
        written = []
        for path in inputs:
            try:
                x = torch.from_numpy(np.load(path)).float()
            except ValueError:
                raise InputError(f"{path}: not a .npy file of numbers") from None
            out.mkdir(parents=True, exist_ok=True)
            target = out / path.name
            np.save(target, self.net(x).softmax(1)[:, 1].numpy() > threshold)
            written.append(target)
        return written
