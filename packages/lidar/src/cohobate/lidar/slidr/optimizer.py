"""The optimiser of all stages: SGD and a cosine."""

from __future__ import annotations

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
    epochs = trainer.max_epochs or 1
    length = epochs if how.cosine == "epoch" else int(trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(length, 1))
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": how.cosine},
    }
