"""One of two ranks with unequal shares of a batch; run by test_distributed.py.

Rank 0 writes the averaged gradients, as DDP would leave them in the parameters.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from cohobate.core.losses import forward_kl, global_items, info_nce


def main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, y, weight_x, weight_y, keep = torch.load(f"{folder}/batch.pt", weights_only=True)
    weight_x.requires_grad_()
    weight_y.requires_grad_()
    mine = slice(0, 3) if rank == 0 else slice(3, len(x))
    items = global_items(keep[mine])
    counted = {"weight": keep[mine], "num_items": items}
    found = []
    for loss in (
        lambda s, t: forward_kl(s, t, **counted),
        lambda s, t: info_nce(s, t, gather=True, **counted),
        lambda s, t: info_nce(s, t, t.roll(1, 0), gather=True, **counted),
    ):
        value = loss(x[mine] @ weight_x, y[mine] @ weight_y)
        gradients = torch.autograd.grad(value, [weight_x, weight_y])
        for gradient in gradients:
            dist.all_reduce(gradient)
        found.append([gradient / 2 for gradient in gradients])
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
