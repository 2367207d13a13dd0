"""RTMPose and DWPose weights from files, in whatever wrapping they come."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.io import load_weights
from cohobate.core.runs import checkpoint_file
from cohobate.detection.dwpose.network import RTMPose
from cohobate.detection.weights import fill

Weights = dict[str, Tensor]


def read_weights(path: Path) -> Weights:
    """Read the weights of a plain RTMPose.

    Args:
        path: A released ``.pth`` (``backbone.*``, ``head.*``), an unmerged checkpoint of the
            released distiller, a run folder of this package, or a checkpoint in one.

    Returns:
        Tensors by the names of `RTMPose`.

    Raises:
        InputError: The file cannot be read or holds no RTMPose.
    """
    file = checkpoint_file(path) if Path(path).is_dir() else Path(path)
    found = merge(load_weights(file))
    if not any(name.startswith("backbone.stem.") for name in found):
        raise InputError(f"{path}: holds no RTMPose weights")
    return found


def merge(weights: Weights) -> Weights:
    """The student of a distiller's state, as a plain network.

    Stage 1 keeps the student; stage 2, whose student has no backbone, takes the teacher's.

    Args:
        weights: Tensors by the names of a plain network, of a run here (``network.*``), or of the
            released distiller (``student.*``, ``teacher.*``).
    """
    own = {k.removeprefix("network."): v for k, v in weights.items() if k.startswith("network.")}
    if own:
        return own
    student = {
        k.removeprefix("student."): v for k, v in weights.items() if k.startswith("student.")
    }
    if not student:
        return {k: v for k, v in weights.items() if k.startswith(("backbone.", "head."))}
    if any(k.startswith("backbone.") for k in student) and not _second_stage(weights):
        return {k: v for k, v in student.items() if k.startswith(("backbone.", "head."))}
    backbone = {
        k.removeprefix("teacher."): v
        for k, v in weights.items()
        if k.startswith("teacher.backbone.")
    }
    return backbone | {k: v for k, v in student.items() if k.startswith("head.")}


def _second_stage(weights: Weights) -> bool:
    """In stage 2 both networks are of one size and only heads are trained."""
    name = "backbone.stem.0.conv.weight"
    one, other = weights.get(f"student.{name}"), weights.get(f"teacher.{name}")
    same = one is not None and other is not None and one.shape == other.shape
    align = any("connector" in k or "align" in k or k.startswith("distill_losses") for k in weights)
    return same and not align


def load_into(network: RTMPose, path: Path, *, strict: bool = True) -> list[str]:
    """Fill a network from a file of `read_weights`.

    Args:
        network: The network.
        path: The file or folder.
        strict: Refuse the file when a tensor is missing or has another shape. Otherwise such
            tensors keep their initial values: that is how to train other key points.

    Returns:
        Names of the network's tensors that were not filled.

    Raises:
        InputError: A tensor does not fit, or nothing does.
    """
    return fill(network, read_weights(path), path, strict=strict, skipped="num_batches_tracked")
