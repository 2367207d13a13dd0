"""Pre-trained point networks from files: our runs and the released checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.core.io import load_checkpoint
from cohobate.core.runs import checkpoint_file
from cohobate.lidar.data import Voxels

CONTRASTS = ("superpixel", "pixel")


def settings_tensor(voxels: Voxels, contrast: str) -> Tensor:
    """What a backbone was trained with, kept among its stage's weights.

    Args:
        voxels: Shape of the voxels.
        contrast: Which loss.
    """
    return torch.tensor(
        [voxels.size, float(voxels.cylindrical), voxels.angle, CONTRASTS.index(contrast)],
        dtype=torch.float64,
    )


def backbone_weights(
    network: nn.Module, weights: dict[str, Tensor], source: str
) -> dict[str, Tensor]:
    """The tensors that a network of the same backbone takes over: all but the last layer.

    Args:
        network: With a new last layer ``final``.
        weights: Tensors by name.
        source: Where they come from, for the message.

    Raises:
        InputError: A tensor is missing or has another shape.
    """
    own = {k: v for k, v in network.state_dict().items() if not k.startswith("final.")}
    for name, tensor in own.items():
        if name not in weights:
            raise InputError(f"{source}: no weights for {name}")
        if weights[name].shape != tensor.shape:
            raise InputError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, the network needs "
                f"{tuple(tensor.shape)}"
            )
    return {name: weights[name] for name in own}


def read_backbone(path: Path, voxels: Voxels, contrast: str | None = None) -> dict[str, Tensor]:
    """Weights of a point network from a file.

    Args:
        path: A released checkpoint (``model_points``), a run folder, or its
            ``student.safetensors``.
        voxels: What the run uses; a file that says otherwise is refused.
        contrast: Which loss the run says taught the backbone; ``None`` for any.

    Returns:
        Tensors under the network's own names.

    Raises:
        InputError: The file is damaged, was trained on other voxels or by another loss.
    """
    if path.is_dir():
        path = checkpoint_file(path)
    content: dict[str, Any] = load_checkpoint(path)
    if isinstance(content.get("model_points"), dict):
        check_official(content.get("config"), voxels, path)
        return _without_prefix(content["model_points"], "module.")
    if isinstance(content.get("state_dict"), dict):
        state = content["state_dict"]
        if "settings" in state:
            check_settings(state["settings"], voxels, contrast, str(path))
        return {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
    return content


def check_settings(found: Tensor, voxels: Voxels, contrast: str | None, source: str) -> None:
    """Whether a backbone was trained as the run expects.

    Args:
        found: Of `settings_tensor`.
        voxels: What the run uses.
        contrast: Which loss the run says taught the backbone; ``None`` for any.
        source: Where it comes from, for the message.

    Raises:
        InputError: It was not.
    """
    size, cylindrical, angle, kind = found.tolist()
    theirs = Voxels(size, bool(cylindrical), angle)
    same = abs(size - voxels.size) < 1e-9 and theirs.cylindrical == voxels.cylindrical
    if not same or (voxels.cylindrical and abs(angle - voxels.angle) > 1e-9):
        raise InputError(f"{source}: trained on {theirs}, this run uses {voxels}")
    if contrast is not None and CONTRASTS[int(kind)] != contrast:
        raise InputError(
            f"{source}: taught by the {CONTRASTS[int(kind)]} contrast, this run says {contrast}"
        )


def check_official(config: object, voxels: Voxels, path: Path) -> None:
    """Whether a released checkpoint was trained on the run's voxels.

    Args:
        config: Its entry ``config``.
        voxels: What the run uses.
        path: The file, for the message.

    Raises:
        InputError: It was not.
    """
    if not isinstance(config, dict) or "voxel_size" not in config:
        return
    size = float(config["voxel_size"])
    cylindrical = bool(config.get("cylindrical_coordinates", voxels.cylindrical))
    if abs(size - voxels.size) > 1e-9 or cylindrical != voxels.cylindrical:
        form = "cylindrical" if cylindrical else "Cartesian"
        raise InputError(f"{path}: trained on {form} voxels of {size} m, this run uses {voxels}")


def _without_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
