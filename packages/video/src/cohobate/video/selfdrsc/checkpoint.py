"""Weights in the layout of the released code."""

from __future__ import annotations

from pathlib import Path

import torch

from cohobate.core.io import fitting_weights, load_weights, save_atomic
from cohobate.video.selfdrsc.network import CorrectionNet


def load_official(network: CorrectionNet, file: Path) -> None:
    """Fill a network with released weights.

    Names of wrappers (``module.``, ``netG.``) and counters of a profiler are left out.

    Args:
        network: Of the paper's size.
        file: A ``.pth`` file of tensors, or safetensors.

    Raises:
        InputError: The file cannot be read or does not fit.
    """
    tensors = {}
    for name, tensor in load_weights(file).items():
        for prefix in ("module.", "netG."):
            name = name.removeprefix(prefix)
        if not name.endswith(("total_ops", "total_params")):
            tensors[name] = tensor
    network.load_state_dict(fitting_weights(network, tensors, file))


def save_official(network: CorrectionNet, file: Path) -> None:
    """Write a network's weights under the released names."""
    with save_atomic(file) as temporary:
        torch.save({k: v.detach().cpu() for k, v in network.state_dict().items()}, temporary)
