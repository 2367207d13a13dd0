"""Two ranks with unequal numbers of tokens, under DDP, learn what one process would."""

from __future__ import annotations

import torch
import torch.multiprocessing as mp

from cohobate.core.fused import linear_divergence
from cohobate.core.losses import global_items

TOKENS, WIDTH, CLASSES = 10, 4, 6


def batch():
    generator = torch.Generator().manual_seed(0)
    x, x_t, w, w_t = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((TOKENS, WIDTH), (TOKENS, WIDTH), (CLASSES, WIDTH), (CLASSES, WIDTH))
    )
    return x, x_t, w, w_t, torch.arange(TOKENS) % 3 != 0


class Student(torch.nn.Module):
    """A body and a head; the loss is taken inside, as a fused loss must be."""

    def __init__(self, w):
        super().__init__()
        self.body = torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        torch.nn.init.eye_(self.body.weight)
        self.head = torch.nn.Parameter(w.clone())

    def forward(self, x, x_t, w_t, **options):
        return linear_divergence(self.body(x), self.head, x_t, w_t, **options)


def rank(number: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=number, world_size=2
    )
    x, x_t, w, w_t, keep = batch()
    model = torch.nn.parallel.DistributedDataParallel(Student(w))
    mine = slice(0, 2) if number == 0 else slice(2, TOKENS)
    loss = model(x[mine], x_t[mine], w_t, weight=keep[mine], num_items=global_items(keep[mine]))
    loss.backward()
    if number == 0:
        torch.save([p.grad for p in model.parameters()], f"{folder}/gradients.pt")
    torch.distributed.destroy_process_group()


def test_unequal_ranks_average_to_the_whole_batch(tmp_path):
    mp.spawn(rank, args=(str(tmp_path),), nprocs=2)
    x, x_t, w, w_t, keep = batch()
    whole = Student(w)
    whole(x, x_t, w_t, weight=keep).backward()
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    torch.testing.assert_close(gradients, [p.grad for p in whole.parameters()])
