"""Optical flow estimators: frozen networks, and one without parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from torch import nn

from cohobate.core.errors import InputError
from cohobate.core.io import fitting_weights, load_weights
from cohobate.video.flow.lucas_kanade import LucasKanade
from cohobate.video.flow.pwc import PWCNet, correlation
from cohobate.video.flow.raft import Raft

FlowKind = Literal["lucas-kanade", "pwc", "raft"]

__all__ = ["FlowKind", "LucasKanade", "PWCNet", "Raft", "correlation", "make_flow"]


def make_flow(
    kind: FlowKind, weights: Path | None = None, *, official_warp: bool = False
) -> nn.Module:
    """An estimator with the methods ``forward(first, second)`` and ``pairs(frames, pairs)``.

    Args:
        kind: ``lucas-kanade`` has no weights; ``pwc`` takes the released file of PWC-Net
            (``network-default.pytorch``), ``raft`` torchvision's ``raft_small``.
        weights: A local file.
        official_warp: As for `PWCNet`.

    Raises:
        InputError: Weights are missing, not wanted, or do not fit.
    """
    if kind not in get_args(FlowKind):
        raise InputError(f"flow {kind}: must be one of {', '.join(get_args(FlowKind))}")
    if kind == "lucas-kanade":
        if weights is not None:
            raise InputError(f"{weights}: flow lucas-kanade has no weights")
        return LucasKanade()
    if weights is None:
        raise InputError(f"flow {kind} needs a file of weights")
    network: nn.Module = PWCNet(official_warp=official_warp) if kind == "pwc" else Raft()
    inner = network.moduleNetwork if kind == "pwc" else network.network
    tensors = {k.removeprefix("moduleNetwork."): v for k, v in load_weights(weights).items()}
    inner.load_state_dict(fitting_weights(inner, tensors, weights))  # type: ignore[union-attr,arg-type]
    return network
