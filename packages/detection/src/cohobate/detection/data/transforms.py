"""Augmentation by torchvision, as a pure function of a seed; sizes of multi-scale batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from cohobate.detection.boxes import to_cxcywh


@dataclass(frozen=True)
class Augment:
    """What is done to training images until the stop epoch; flips go on to the end.

    Args:
        distort: Probability of changing brightness, contrast, saturation and hue.
        zoom_out: Probability of placing the image on a larger black canvas.
        largest: Side of that canvas, at most, in sides of the image.
        crop: Probability of a crop that keeps an object by a drawn IoU.
        flip: Probability of a horizontal flip.
    """

    distort: float = 0.5
    zoom_out: float = 0.5
    largest: float = 4.0
    crop: float = 0.8
    flip: float = 0.5

    def strong(self) -> v2.Transform:
        """The three that stop."""
        return v2.Compose(
            [
                v2.RandomPhotometricDistort(p=self.distort),
                v2.RandomZoomOut(fill=0, side_range=(1.0, self.largest), p=self.zoom_out),
                v2.RandomApply([v2.RandomIoUCrop()], p=self.crop),
                v2.SanitizeBoundingBoxes(min_size=1),
            ]
        )


class ToInput:
    """An image with its boxes to what the network takes.

    Args:
        size: Side of the square input.
        augment: None for evaluation.
    """

    def __init__(self, size: int, augment: Augment | None = None) -> None:
        any_strong = augment and (augment.distort or augment.zoom_out or augment.crop)
        self._strong = augment.strong() if augment and any_strong else None
        flip = [v2.RandomHorizontalFlip(augment.flip)] if augment else []
        last = [v2.Resize((size, size), antialias=True), v2.SanitizeBoundingBoxes(min_size=1)]
        self._plain = v2.Compose(flip + (last if augment else last[:1]))

    def __call__(
        self, pixels: Tensor, boxes: Tensor, labels: Tensor, seed: int, *, strong: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Transform one image.

        Args:
            pixels: ``(3, H, W)`` uint8.
            boxes: ``(n, 4)`` xyxy in pixels.
            labels: ``(n,)``.
            seed: All that is random follows from it.
            strong: Whether the augmentations that stop are on.

        Returns:
            Image ``(3, size, size)`` float32 in [0, 1], boxes normalised cxcywh, labels.
        """
        canvas = (pixels.shape[-2], pixels.shape[-1])
        sample = {
            "image": tv_tensors.Image(pixels),
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas),  # type: ignore[call-overload]
            "labels": labels,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            if strong and self._strong is not None:
                sample = self._strong(sample)
            sample = self._plain(sample)
        image = sample["image"].as_subclass(Tensor).float() / 255
        height, width = image.shape[-2:]
        scale = torch.tensor([width, height, width, height])
        return image, to_cxcywh(sample["boxes"].as_subclass(Tensor) / scale), sample["labels"]


def multiscale_sizes(base: int, repeat: int) -> list[int]:
    """Sides that a multi-scale batch is drawn from: ¾ to 1¼ of the base in steps of 32.

    Args:
        base: The base side.
        repeat: How often it stands in the list.

    Example:
        >>> multiscale_sizes(128, 2)
        [96, 128, 128, 160]
    """
    low, high = (int(base * share / 32) * 32 for share in (0.75, 1.25))
    steps = (base - low) // 32
    return [
        *(low + 32 * n for n in range(steps)),
        *[base] * repeat,
        *(high - 32 * n for n in range(steps)),
    ]
