"""The toy paper with a frozen teacher and named samples, for the cache."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader

from cohobate.core.teachers import FrozenTeacher, TeacherSet
from cohobate.core.training.data import EpochSampler, ResumableLoader
from cohobate.toy.tiny.method import Cloud, Points, Range, Tiny


class NamedCloud(Cloud):
    transform_key = "none"

    def __init__(self, samples: int, augment: bool, keyed: bool) -> None:
        super().__init__(samples, augment)
        self.keyed = keyed

    def sample_key(self, index: int) -> tuple[str, str]:
        return f"point-{int(index)}", f"seed={index.seed}" if self.keyed and self.augment else ""


class NamedPoints(Points):
    """Points with names.

    Args:
        augment: Whether samples get noise.
        keyed: Whether the noise is part of their names.
        samples: Number of points.
    """

    def __init__(self, augment: bool = False, keyed: bool = True, samples: int = 20) -> None:
        super().__init__(samples=samples)
        self.augment, self.keyed = augment, keyed

    def train_dataloader(self) -> DataLoader:
        data = NamedCloud(self.samples, self.augment, self.keyed)
        return ResumableLoader(data, batch_size=4, sampler=EpochSampler(len(data), seed=self.seed))


class Taught(Tiny):
    """The perceptron with a frozen teacher.

    Args:
        features: Number of inputs, from the data.
        bounds: As for the perceptron.
        frozen: Whether the teacher is frozen; otherwise it is the average.
        several: Whether it is a set of one.
        more: Whether there is another.
    """

    def __init__(
        self,
        features: int,
        bounds: Range,
        frozen: bool = True,
        several: bool = False,
        more: bool = False,
    ) -> None:
        super().__init__(features, bounds)
        if frozen:
            torch.manual_seed(5)
            self.teacher = FrozenTeacher(nn.Linear(features, 6))
        if several:
            self.teacher = TeacherSet({"only": self.teacher})
        if more:
            self.other = FrozenTeacher(nn.Linear(features, 6))
