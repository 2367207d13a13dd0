"""D-FINE for others: ONNX with everything after the network in it, checked in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.export import onnx_file
from cohobate.detection.d_fine.network import Detections, DFineNet, deploy


def to_onnx(network: DFineNet, size: int, path: Path, *, tolerance: float = 1e-3) -> Path:
    """Write the form for inference: ``images`` and ``sizes`` in, labels, boxes and scores out.

    The batch is open. The file is run on noise in ONNX Runtime and its detections are compared
    with the network's as sets: of two queries with nearly one score either may come first.

    Args:
        network: A trained network.
        size: Side of the square input.
        path: The file.
        tolerance: Largest difference of scores, and of boxes in shares of the image.

    Returns:
        ``path``.

    Raises:
        InputError: The network cannot be put into ONNX, or ONNX Runtime finds something else;
            nothing is written.
    """
    import onnxruntime

    slim = deploy(network).cpu().float()
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, size, size, generator=draw)
    sizes = torch.tensor([[640.0, 480.0], [480.0, 640.0]])
    batch = torch.export.Dim("batch", min=1)
    with onnx_file(
        slim, (images, sizes), path, dynamic_shapes=({0: batch}, {0: batch}),
        input_names=["images", "sizes"], output_names=["labels", "boxes", "scores"],
    ) as file:  # fmt: skip
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for count in (1, 2):
            feed = {"images": images[:count].numpy(), "sizes": sizes[:count].numpy()}
            found = Detections(*(torch.from_numpy(x) for x in session.run(None, feed)))
            with torch.no_grad():
                wanted = slim(images[:count], sizes[:count])
            worst = difference(wanted, found, sizes[:count])
            if not worst <= tolerance:
                raise InputError(
                    f"{path}: ONNX Runtime differs from the network by {worst:.2g} "
                    f"(allowed {tolerance:.2g}); nothing was written"
                )
    return path


def difference(wanted: Detections, found: Detections, sizes: Tensor) -> float:
    """How far the detections of two runs are apart, whatever their order.

    The last of them are left out when their score is that of the cut: which of equals is last is
    chance.

    Args:
        wanted: Detections.
        found: As many, of the same images.
        sizes: Width and height of the images ``(B, 2)``.

    Returns:
        The largest difference of a score, or of a box in shares of its image, to the nearest
        detection of the same class; infinite when a class is missing.
    """
    worst = 0.0
    for image in range(len(sizes)):
        rows = [_rows(d, image, sizes) for d in (wanted, found)]
        for one, other in (rows, rows[::-1]):
            sure = one[one[:, 1] > one[:, 1].min() + 1e-5]
            apart = np.abs(sure[:, None, 1:] - other[None, :, 1:]).max(-1)
            apart[sure[:, None, 0] != other[None, :, 0]] = np.inf
            worst = max(worst, float(apart.min(1).max())) if len(sure) else worst
    return worst


def _rows(found: Detections, image: int, sizes: Tensor) -> np.ndarray:
    """Label, score, box in shares of the image."""
    boxes = found.boxes[image] / sizes[image].repeat(2)
    columns = [found.labels[image][:, None].to(boxes), found.scores[image][:, None], boxes]
    return torch.cat(columns, 1).double().numpy()
