"""Masks and overlays of image files, and the picture of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F

from cohobate.core.io import save_atomic
from cohobate.core.predict import each_file, files_in
from cohobate.medseg.esp_medsam.network import Network
from cohobate.medseg.esp_medsam.pictures import (
    MEAN,
    SCALE,
    Normalization,
    Pictures,
    image_files,
    prepare,
    read_rgb,
)

_COLOUR = np.array([0, 200, 120])
_EACH = 2  # pictures of a modality in the picture of a run


def segment_files(
    network: Network,
    modality: str,
    inputs: Sequence[Path],
    out: Path,
    size: int,
    normalization: Normalization,
    picture: bool,
) -> list[Path]:
    """Write ``<name>_mask.png`` and ``<name>_overlay.png`` for every image.

    Args:
        network: In eval mode.
        modality: Of all images.
        inputs: Files, or folders whose images are all taken.
        out: Folder for the results.
        size: Side of the network's input.
        normalization: As in training.
        picture: Whether to draw overlays.

    Returns:
        The files written.

    Raises:
        InputError: There is no image, or a file is none; the others are segmented all the same.
    """

    def work(path: Path) -> list[Path]:
        rgb = read_rgb(path)
        mask = segment(network, modality, rgb, size, normalization)
        results = {"mask": 255 * mask.astype(np.uint8)}
        if picture:
            results["overlay"] = overlay(rgb, mask)
        written = [out / f"{path.stem}_{kind}.png" for kind in results]
        for file, pixels in zip(written, results.values(), strict=True):
            with save_atomic(file) as temporary:
                Image.fromarray(pixels).save(temporary, format="png")
        return written

    return each_file(files_in(inputs, image_files, "images"), out, work, "segmenting")


def segment(
    network: Network, modality: str, rgb: np.ndarray, size: int, normalization: Normalization
) -> np.ndarray:
    """The mask of one image in its own size.

    Args:
        network: In eval mode.
        modality: What the image shows.
        rgb: ``(H, W, 3)`` uint8.
        size: Side of the network's input.
        normalization: As in training.

    Returns:
        ``(H, W)`` bool.
    """
    image, (height, width) = prepare(rgb, size, normalization)
    device = next(network.parameters()).device
    with torch.no_grad():
        logits = network(image[None].to(device), modality).masks[..., :height, :width]
    if logits.shape[2:] != rgb.shape[:2]:
        logits = F.interpolate(logits, rgb.shape[:2], mode="bilinear", align_corners=False)
    found: np.ndarray = (logits[0, 0] >= 0).cpu().numpy()
    return found


def overlay(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with the mask in colour and its border in full colour, uint8."""
    inner = mask.copy()
    for axis in (0, 1):
        for step in (1, -1):
            inner &= np.roll(mask, step, axis)
    share = np.where(mask & ~inner, 1.0, np.where(mask, 0.35, 0.0))[..., None]
    return np.rint(rgb * (1 - share) + _COLOUR * share).astype(np.uint8)


def draw_results(network: Network, pictures: Pictures, path: Path, device: torch.device) -> None:
    """Draw image, truth and mask of the first pictures of each modality.

    Args:
        network: In eval mode.
        pictures: To draw from.
        path: PNG to write.
        device: Where the network is.
    """
    chosen: list[int] = []
    for modality in dict.fromkeys(p.modality for p in pictures.pictures):
        there = [i for i, p in enumerate(pictures.pictures) if p.modality == modality]
        chosen += there[:_EACH]
    figure = Figure(figsize=(1.8 * len(chosen) + 0.6, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(chosen), squeeze=False)
    for column, index in enumerate(chosen):
        sample = pictures[index]
        image, name = sample["image"], sample["modality"]
        with torch.no_grad():
            found = network(image[None].to(device), name).masks[0, 0].cpu() >= 0
        scale, mean = (np.array(v) for v in (SCALE[pictures.normalization], MEAN))
        rgb = (image.permute(1, 2, 0).numpy() * scale + mean).clip(0, 255).astype(np.uint8)
        rows = {
            name: rgb,
            "truth": overlay(rgb, sample["mask"][0].numpy() > 0.5),
            "mask": overlay(rgb, found.numpy()),
        }
        for axis, (title, shown) in zip(axes[:, column], rows.items(), strict=True):
            axis.imshow(shown)
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    with save_atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
