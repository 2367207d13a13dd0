"""What the tests of this paper share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cohobate.core.testing import golden
from cohobate.detection.boxes import Targets, pad_targets

GOLDEN = Path(__file__).parent / "golden"
Record = dict[str, Any]


@pytest.fixture
def recorded() -> Callable[[str], Record]:
    """Arrays recorded from the official code, by file name without ending."""
    return lambda name: golden(next(GOLDEN.glob(f"{name}.*")))


@pytest.fixture
def cases(recorded) -> Callable[[str], list[Record]]:
    """The cases of a file, each with its own names."""

    def read(name: str) -> list[Record]:
        record = recorded(name)
        return [
            {k.removeprefix(f"c{n}_"): v for k, v in record.items() if k.startswith(f"c{n}_")}
            for n in range(int(record["n_cases"]))
        ]

    return read


@pytest.fixture
def targets_of() -> Callable[[Record], Targets]:
    """The objects of a record as a batch."""

    def read(record: Record) -> Targets:
        counts = record["tgt_counts"].tolist()
        return pad_targets(record["tgt_labels"].split(counts), record["tgt_boxes"].split(counts))

    return read


@pytest.fixture
def match_of() -> Callable[[Record, str, int], Tensor]:
    """Recorded pairs as the object of each query, -1 for none."""

    def read(record: Record, name: str, queries: int) -> Tensor:
        counts = record[f"{name}_counts"].tolist()
        match = torch.full((len(counts), queries), -1)
        pairs = zip(
            record[f"{name}_query"].split(counts), record[f"{name}_target"].split(counts),
            strict=True,
        )  # fmt: skip
        for row, (query, target) in zip(match, pairs, strict=True):
            row[query] = target
        return match

    return read
