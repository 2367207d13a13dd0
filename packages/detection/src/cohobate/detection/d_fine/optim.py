"""Learning rates and parameter groups as the official configurations turn out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from cohobate.detection.d_fine.network import DFineNet


class Rates(NamedTuple):
    """Learning rates and weight decay of a size.

    Attributes:
        lr: Of encoder and decoder.
        backbone: Of the backbone.
        weight_decay: Where there is any.
        decay_biases: Whether biases of encoder and decoder decay.
    """

    lr: float
    backbone: float
    weight_decay: float
    decay_biases: bool = False


RATES = {
    "n": Rates(8e-4, 4e-4, 1e-4),
    "s": Rates(2e-4, 1e-4, 1e-4),
    "m": Rates(2e-4, 2e-5, 1e-4),
    "l": Rates(2.5e-4, 1.25e-5, 1.25e-4, decay_biases=True),
    "x": Rates(2.5e-4, 2.5e-6, 1.25e-4, decay_biases=True),
    "tiny": Rates(1e-3, 1e-3, 1e-4),
}


def parameter_groups(network: DFineNet, rates: Rates) -> list[dict[str, Any]]:
    """Groups for AdamW.

    The backbone has its own rate and decays whole: the official pattern that would spare its norms
    matches nothing. Norms of encoder and decoder never decay, their biases do in L and X.

    Args:
        network: The network.
        rates: Its rates.
    """
    norms = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)
        for parameter in module.parameters(recurse=False)
    }
    backbone, spared, rest = [], [], []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.endswith("bias") and not rates.decay_biases
        if name.startswith("model.backbone."):
            backbone.append(parameter)
        elif id(parameter) in norms or is_bias:
            spared.append(parameter)
        else:
            rest.append(parameter)
    return [
        {"params": backbone, "lr": rates.backbone, "weight_decay": rates.weight_decay},
        {"params": spared, "lr": rates.lr, "weight_decay": 0.0},
        {"params": rest, "lr": rates.lr, "weight_decay": rates.weight_decay},
    ]


def adamw(network: DFineNet, rates: Rates, *, mixed: bool = False) -> torch.optim.AdamW:
    """AdamW over the groups, all tensors in one call.

    Args:
        network: The network, on its device.
        rates: Its rates.
        mixed: Whether the precision is mixed: a fused step leaves the trainer nothing to clip then.
    """
    groups = [group for group in parameter_groups(network, rates) if group["params"]]
    fused = not mixed and next(network.parameters()).device.type == "cpu"
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=fused, foreach=not fused)
