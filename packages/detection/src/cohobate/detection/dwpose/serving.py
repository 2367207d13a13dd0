"""A pose network for others: the ONNX file that RTMPose's and DWPose's users run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.export import onnx_file
from cohobate.detection.dwpose.keypoints import BODY, WHOLEBODY, KeypointSet, by_names
from cohobate.detection.dwpose.losses import SimCC
from cohobate.detection.dwpose.network import RTMPose


def to_onnx(network: RTMPose, path: Path, *, tolerance: float = 1e-4) -> Path:
    """Write ``input (1, 3, height, width)`` → ``simcc_x``, ``simcc_y``, the raw logits.

    These are the names and shapes of the released files: what runs those runs this. The file is
    run on noise in ONNX Runtime and compared with the network.

    Args:
        network: A trained network.
        path: The file.
        tolerance: Largest difference of a logit, relative to the largest (at least 1).

    Returns:
        ``path``.

    Raises:
        InputError: The network cannot be put into ONNX, or ONNX Runtime finds something else;
            nothing is written.
    """
    network = network.cpu().float().eval()
    width, height = network.size
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    names = {"input_names": ["input"], "output_names": ["simcc_x", "simcc_y"]}
    with onnx_file(network, (images,), path, **names) as file:
        run, _ = open_onnx(file)
        with torch.no_grad():
            wanted = network(images)
        for want, got in zip(wanted, run(images), strict=True):
            worst = float((want - got).abs().max()) / max(1.0, float(want.abs().max()))
            if not worst <= tolerance:
                raise InputError(
                    f"{path}: ONNX Runtime differs from the network by {worst:.2g} "
                    f"(allowed {tolerance:.2g}); nothing was written"
                )
    return path


def open_onnx(file: Path) -> tuple[Callable[[Tensor], SimCC], tuple[int, int]]:
    """Open a released or exported pose model, on the CPU.

    Args:
        file: An ``.onnx`` with one image in and the logits of x and y out.

    Returns:
        Crops ``(B, 3, height, width)`` → logits, and width and height of its input.

    Raises:
        InputError: The file cannot be read, or is no such model.
    """
    import onnxruntime

    if not Path(file).is_file():
        raise InputError(f"{file}: no such file")
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each fault
        raise InputError(f"{file}: not an ONNX model: {str(error).splitlines()[0]}") from None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = inputs[0].shape if len(inputs) == 1 else []
    sized = len(shape) == 4 and all(isinstance(n, int) for n in shape[2:])
    if not sized or len(outputs) != 2:
        raise InputError(f"{file}: not a SimCC model (one image in, logits of x and of y out)")

    def run(images: Tensor) -> SimCC:
        rows = [session.run(None, {inputs[0].name: np.asarray(x)[None]}) for x in images.cpu()]
        x, y = (torch.from_numpy(np.concatenate(part)) for part in zip(*rows, strict=True))
        return SimCC(x, y)

    return run, (int(shape[3]), int(shape[2]))


def kinds_of(points: int) -> KeypointSet:
    """The key points of a model that says only how many it has.

    Args:
        points: K.
    """
    known = {len(kinds.names): kinds for kinds in (WHOLEBODY, BODY)}
    return known.get(points) or by_names([str(n) for n in range(points)], [])
