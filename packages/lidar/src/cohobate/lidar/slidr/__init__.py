"""SLidR: image-to-lidar self-supervised distillation by superpixels (arXiv 2203.16258)."""

from cohobate.lidar.slidr.losses import (
    lovasz_softmax,
    pixel_contrast,
    segmentation_loss,
    superpixel_contrast,
)
from cohobate.lidar.slidr.method import Pretrain
from cohobate.lidar.slidr.segment import Segment

__all__ = [
    "Pretrain",
    "Segment",
    "lovasz_softmax",
    "pixel_contrast",
    "segmentation_loss",
    "superpixel_contrast",
]
