"""A small data set with names, and a teacher for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cohobate.core.cache import write_cache

CLASSES = 32


class Samples:
    """Vectors named ``case-<i>``; with ``crops`` each draw adds a shift that its seed decides."""

    def __init__(self, size=30, shape=(6,), crops=False, keyed=True):
        self.size, self.shape, self.crops, self.keyed = size, shape, crops, keyed

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        x = np.random.default_rng(int(index)).standard_normal(self.shape)
        if self.crops:
            x = x + np.random.default_rng(getattr(index, "seed", 0)).standard_normal()
        return {"x": torch.from_numpy(x).float(), "index": int(index)}

    def sample_key(self, index):
        crop = f"seed={getattr(index, 'seed', 0)}" if self.crops and self.keyed else ""
        return f"case-{int(index)}", crop


def teacher(batch, class_dim=1):
    """Logits of a fixed linear layer, one vector of classes for each number of a sample."""
    x = batch["x"]
    weight = torch.linspace(-2, 2, CLASSES)
    logits = torch.sin(x.unsqueeze(-1) * weight * 3) * 4
    logits = logits.sum(1) if x.dim() == 2 else logits.mean(1)
    return logits.movedim(-1, class_dim)


@pytest.fixture
def samples():
    return Samples


@pytest.fixture
def ask():
    return teacher


@pytest.fixture
def write(tmp_path):
    def write(dataset, name="cache", **options):
        defaults = {
            "dataset": dataset, "ask": teacher, "teacher": "abc", "transform": "identity",
            "top_k": 5, "shard_samples": 7, "batch_size": 3, "progress": False,
        }  # fmt: skip
        return write_cache(tmp_path / name, **(defaults | options))

    return write
