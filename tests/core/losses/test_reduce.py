"""The one rule for weights and counts."""

from __future__ import annotations

import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.core.losses import global_items, reduce_items


def test_weight_scales_and_count_counts():
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert reduce_items(losses).item() == 3
    assert reduce_items(losses, torch.tensor([2.0, 0.0, 1.0])).item() == 4
    assert reduce_items(losses, num_items=2).item() == 4.5
    assert reduce_items(losses, num_items=torch.tensor(2)).item() == 4.5
    assert reduce_items(losses, torch.zeros(3), num_items=0).item() == 0
    assert reduce_items(losses, torch.zeros(3), num_items=torch.tensor(0)).item() == 0


def test_a_weight_broadcasts():
    losses = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert reduce_items(losses, torch.tensor([[True], [False]])).item() == 1.5


def test_without_reduction():
    losses = torch.tensor([1.0, float("nan")])
    kept = reduce_items(losses, torch.tensor([2.0, 0.0]), reduction="none")
    assert kept.tolist() == [2.0, 0.0]
    with pytest.raises(InputError, match="num_items"):
        reduce_items(losses, num_items=1, reduction="none")


def test_global_items_of_one_process():
    assert global_items(torch.tensor([0.5, 0.0, 2.0])).item() == 2
    assert global_items(5).item() == 5
