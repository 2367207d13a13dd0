"""PSNR, SSIM and LPIPS of frames, overall and on the border, by torchmetrics."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.functional.image.lpips import _LPIPS

from cohobate.core.io import fitting_weights, load_weights

_REACH = 5  # of the window of SSIM
_MOST = 100.0  # dB; equal images have no finite PSNR


def eight_bit(frames: Tensor) -> Tensor:
    """Frames in [0, 1] as whole numbers from 0 to 255, float64."""
    return (frames.double() * 255).round().clamp(0, 255)


def psnr(prediction: Tensor, truth: Tensor) -> Tensor:
    """PSNR of each frame in dB over all its colours, at most 100.

    Args:
        prediction: ``(N, ...)``, 0 to 255.
        truth: The same.

    Returns:
        ``(N,)``.
    """
    found = peak_signal_noise_ratio(
        prediction.flatten(1), truth.flatten(1), data_range=255.0, reduction="none", dim=1
    )
    return found.clamp_max(_MOST)


def ssim(prediction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM of each frame: Gaussian window of 11 pixels, sigma 1.5, mean over the valid region.

    Args:
        prediction: ``(N, 3, H, W)``, 0 to 255.
        truth: The same.

    Returns:
        ``(N,)``, and the map of all pixels ``(N, 3, H, W)``.
    """
    found = structural_similarity_index_measure(
        prediction, truth, data_range=255.0, reduction="none", return_full_image=True
    )
    full = found[1]
    valid = full[..., _REACH:-_REACH, _REACH:-_REACH]
    return valid.flatten(1).mean(1), full


def frame_scores(
    prediction: Tensor, truth: Tensor, *, border: int = 0, ring: int = 6
) -> dict[str, Tensor]:
    """All scores of the frames of one pair.

    Args:
        prediction: Frames at evenly spaced times, ``(N, 3, H, W)`` in [0, 1].
        truth: The same.
        border: Pixels cut off each side first, as published scores on RS-GOPRO do (20).
        ring: Width of the border that is scored by itself.

    Returns:
        ``psnr`` and ``ssim``, means over the frames; ``psnr_ends`` of the first and last;
        ``psnr_middle`` of the middle one; ``psnr_ring``, ``ssim_ring`` and ``psnr_inside`` of the
        pixels within and beyond ``ring`` of an edge; ``psnr_rows``, ``ssim_rows`` of the topmost
        and lowest ``ring`` rows.
    """
    if border:
        cut = (..., slice(border, -border), slice(border, -border))
        prediction, truth = prediction[cut], truth[cut]
    prediction, truth = eight_bit(prediction), eight_bit(truth)
    height, width = truth.shape[-2:]
    rows = torch.zeros(height, width, dtype=torch.bool, device=truth.device)
    rows[:ring] = rows[max(height - ring, 0) :] = True
    edge = rows.clone()
    edge[:, :ring] = edge[:, max(width - ring, 0) :] = True
    each = psnr(prediction, truth)
    similar, similarities = ssim(prediction, truth)
    scores = {
        "psnr": each.mean(),
        "ssim": similar.mean(),
        "psnr_ends": each[[0, -1]].mean(),
        "psnr_middle": each[len(each) // 2],
        "psnr_ring": psnr(prediction[..., edge], truth[..., edge]).mean(),
        "ssim_ring": similarities[..., edge].mean(),
        "psnr_rows": psnr(prediction[..., rows], truth[..., rows]).mean(),
        "ssim_rows": similarities[..., rows].mean(),
    }
    if not edge.all():
        scores["psnr_inside"] = psnr(prediction[..., ~edge], truth[..., ~edge]).mean()
    return {name: value.float() for name, value in scores.items()}


def load_lpips(weights: Path) -> nn.Module:
    """LPIPS on AlexNet from a local file; the linear heads come with torchmetrics.

    Args:
        weights: torchvision's file of ``alexnet`` (ImageNet).

    Returns:
        A module of two batches of images ``(N, 3, H, W)`` in [-1, 1] that gives ``(N, 1, 1, 1)``.

    Raises:
        InputError: The file does not fit.
    """
    judge = _LPIPS(net="alex", pnet_rand=True)
    given = load_weights(weights)
    # The backbone is cut in slices, but layers keep their numbers.
    names = {name: "features." + name.split(".", 1)[1] for name in judge.net.state_dict()}
    found = {name: given[other] for name, other in names.items() if other in given}
    judge.net.load_state_dict(fitting_weights(judge.net, found, weights))
    return judge.requires_grad_(False).eval()
