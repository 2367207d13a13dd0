"""One of two ranks with unequal numbers of tokens under DDP; run by test_distributed.py."""

from __future__ import annotations

import sys

import torch

from cohobate.core.fused import linear_divergence
from cohobate.core.losses import global_items


class Student(torch.nn.Module):
    """A body and a head; the loss is taken inside, as a fused loss must be under DDP."""

    def __init__(self, body: torch.Tensor, head: torch.Tensor) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Parameter(body), torch.nn.Parameter(head)

    def forward(self, x: torch.Tensor, *teacher: torch.Tensor, **options: object) -> torch.Tensor:
        return linear_divergence(x @ self.body, self.head, *teacher, **options)


def main(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    x, x_t, body, head, w_t, keep = torch.load(f"{folder}/batch.pt", weights_only=True)
    model = torch.nn.parallel.DistributedDataParallel(Student(body, head))
    mine = slice(0, 2) if rank == 0 else slice(2, len(x))
    items = global_items(keep[mine])
    model(x[mine], x_t[mine], w_t, weight=keep[mine], num_items=items).backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], f"{folder}/gradients.pt")
    # a rank that leaves closes connections from which the other may still read
    store.set(f"done-{rank}", "")
    store.wait(["done-0", "done-1"])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
