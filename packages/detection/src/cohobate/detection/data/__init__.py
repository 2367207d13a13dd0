"""Annotated images: COCO, VOC and YOLO folders, and an embedded synthetic set."""

from cohobate.detection.data.annotations import Annotated, Category, Picture
from cohobate.detection.data.module import Batch, DetectionData
from cohobate.detection.data.transforms import Augment, multiscale_sizes

__all__ = ["Annotated", "Augment", "Batch", "Category", "DetectionData", "Picture",
           "multiscale_sizes"]  # fmt: skip
