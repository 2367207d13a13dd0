"""The one rule for weights and counts, also across processes."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from cohobate.core.errors import InputError
from cohobate.core.losses import forward_kl, global_items, reduce_items


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


def _rank(rank: int, path: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=2
    )
    logits, teacher = torch.load(f"{path}/batch.pt", weights_only=True)
    mine = slice(0, 3) if rank == 0 else slice(3, 10)  # unequal shares
    weight = torch.ones(5, 4, dtype=torch.float64, requires_grad=True)
    keep = torch.arange(10)[mine] % 3 != 0
    loss = forward_kl(
        logits[mine] @ weight.T, teacher[mine], weight=keep, num_items=global_items(keep)
    )
    loss.backward()
    torch.distributed.all_reduce(weight.grad)  # DDP averages over ranks
    if rank == 0:
        torch.save(weight.grad / 2, f"{path}/grad.pt")
    torch.distributed.destroy_process_group()


def test_unequal_ranks_average_to_the_whole_batch(tmp_path):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    teacher = torch.randn(10, 5, generator=generator, dtype=torch.float64)
    torch.save((features, teacher), tmp_path / "batch.pt")
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    weight = torch.ones(5, 4, dtype=torch.float64, requires_grad=True)
    forward_kl(features @ weight.T, teacher, weight=torch.arange(10) % 3 != 0).backward()
    torch.testing.assert_close(torch.load(tmp_path / "grad.pt", weights_only=True), weight.grad)
