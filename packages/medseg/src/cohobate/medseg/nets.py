"""MONAI's U-shaped networks by name, with the sizes the literature trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from monai.networks import nets
from torch import nn

from cohobate.core.errors import InputError

Backbone = Literal["dynunet", "unetr", "swinunetr", "vnet", "basicunet", "unet", "segresnet"]

_CLASSES: dict[str, Callable[..., nn.Module]] = {
    "dynunet": nets.DynUNet,
    "unetr": nets.UNETR,
    "swinunetr": nets.SwinUNETR,
    "vnet": nets.VNet,
    "basicunet": nets.BasicUNet,
    "unet": nets.UNet,
    "segresnet": nets.SegResNet,
}

_SIZES: dict[str, dict[str, Any]] = {
    "dynunet": {"filters": [32, 64, 128, 256, 320], "norm_name": "instance", "res_block": True},
    "unetr": {"feature_size": 32, "proj_type": "perceptron", "norm_name": "instance"},
    "swinunetr": {"feature_size": 36},
    "vnet": {},
    "basicunet": {},
    "unet": {"channels": [32, 64, 128, 256, 320], "num_res_units": 2},
    "segresnet": {"init_filters": 16},
}


def build(
    name: Backbone,
    in_channels: int,
    out_channels: int,
    roi_size: Sequence[int],
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a MONAI network.

    Args:
        name: Which one.
        in_channels: Channels of the image.
        out_channels: Classes with the background, K.
        roi_size: Spatial size of a training patch; two or three axes.
        args: Arguments of the MONAI class that replace the preset's. For ``dynunet`` and ``unet``
            the strides follow the number of levels unless they are given.

    Returns:
        The network, ``(B, in_channels, *S) → (B, out_channels, *S)``.

    Raises:
        InputError: There is no such network or argument, or MONAI refuses the values.

    Example:
        >>> net = build("dynunet", 1, 4, (32, 32, 32), {"filters": [8, 16, 32]})
        >>> sum(p.numel() for p in net.parameters())
        85508
    """
    if name not in _CLASSES:
        raise InputError(f"backbone '{name}': known are {', '.join(get_args(Backbone))}")
    cls = _CLASSES[name]
    known = inspect.signature(cls).parameters
    given = {**_SIZES[name], **(args or {})}
    for argument in given:
        if argument not in known:
            raise InputError(f"backbone {name} has no argument '{argument}'; it has {[*known]}")
    given = {
        "spatial_dims": len(roi_size),
        "in_channels": in_channels,
        "out_channels": out_channels,
        **_derived(name, given, roi_size),
        **given,
    }
    try:
        return cls(**given)
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f"backbone {name}: {error}") from error


def _derived(name: str, given: Mapping[str, Any], roi_size: Sequence[int]) -> dict[str, Any]:
    """The arguments that follow from others: strides from the levels, UNETR's image size."""
    dims = len(roi_size)
    if name == "unetr":
        return {"img_size": tuple(roi_size)}
    if name == "unet":
        return {"strides": [2] * (len(given["channels"]) - 1)}
    if name == "dynunet":
        levels = len(given["filters"])
        strides = given.get("strides", [[1] * dims] + [[2] * dims] * (levels - 1))
        kernels = given.get("kernel_size", [[3] * dims] * levels)
        return {"kernel_size": kernels, "strides": strides, "upsample_kernel_size": strides[1:]}
    return {}
