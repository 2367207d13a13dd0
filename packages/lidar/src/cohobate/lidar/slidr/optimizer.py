"""The optimiser of all stages: SGD and a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch


@dataclass(frozen=True)
class Sgd:
    """SGD with momentum; the learning rate follows half a cosine down to 0.

    Args:
        lr: Learning rate.
        momentum: Momentum.
        dampening: Dampening of the momentum.
        weight_decay: Weight decay.
        cosine: Whether the rate changes with each ``epoch``, as in the paper, or each ``step``.
    """

    lr: float = 0.5
    momentum: float = 0.9
    dampening: float = 0.1
    weight_decay: float = 1e-4
    cosine: Literal["epoch", "step"] = "epoch"


def sgd(groups: list[dict[str, Any]], how: Sgd, trainer: pl.Trainer) -> dict[str, Any]:
    """What ``configure_optimizers`` returns.

    Args:
        groups: Parameters with their learning rates.
        how: The settings.
        trainer: Knows how long training is.
    """
    optimizer = torch.optim.SGD(
        groups,
        lr=how.lr,
        momentum=how.momentum,
        dampening=how.dampening,
        weight_decay=how.weight_decay,
    )

    def share(done: int) -> float:
        # How long training is, is asked for only once it runs: asked for earlier, Lightning sets up
        # the data before it knows where a stopped run was, and that run would begin its epoch anew.
        if not done:
            return 1.0
        by_epoch = how.cosine == "epoch"
        length = (trainer.max_epochs or 1) if by_epoch else trainer.estimated_stepping_batches
        return (1 + math.cos(math.pi * min(done / length, 1.0))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": how.cosine},
    }
