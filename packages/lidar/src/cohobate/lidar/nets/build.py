"""Point networks by name."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from cohobate.core.errors import InputError
from cohobate.lidar.nets.unet import ResUNet
from cohobate.lidar.nets.voxelnet import VoxelNet
from cohobate.lidar.sparse import Backend

Network = Literal["res16unet34c", "unet-small", "voxelnet"]

SMALL: dict[str, Any] = {
    "stem": 16,
    "encoder": (32, 64),
    "encoder_blocks": (1, 1),
    "decoder": (32, 32),
    "decoder_blocks": (1, 1),
}


def build(
    name: Network,
    out_channels: int,
    *,
    normalize: bool = False,
    momentum: float = 0.05,
    backend: Backend = "torch",
    arguments: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a network for points.

    Args:
        name: ``res16unet34c``, the paper's (37.85 million parameters); ``unet-small``, the same
            with three levels (0.4 million); ``voxelnet``, the backbone of detectors.
        out_channels: D.
        normalize: Whether outputs have norm 1; VoxelNet's always have.
        momentum: Batch-normalisation momentum of the U-Nets.
        backend: What computes the sparse convolutions.
        arguments: Further arguments of `ResUNet`, such as widths.

    Raises:
        InputError: The name is unknown, or an argument does not fit.
    """
    given = dict(arguments or {})
    if name == "voxelnet":
        if given:
            raise InputError(f"network_args: VoxelNet takes none, not {', '.join(given)}")
        return VoxelNet(out_channels=out_channels, backend=backend)
    if name not in ("res16unet34c", "unet-small"):
        raise InputError(f"network: there is no '{name}'")
    sizes: dict[str, Any] = {**(SMALL if name == "unet-small" else {}), **given}
    tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    try:
        return ResUNet(
            out_channels=out_channels,
            normalize=normalize,
            momentum=momentum,
            backend=backend,
            **tuples,
        )
    except TypeError as error:
        raise InputError(f"network_args: {error}") from None
