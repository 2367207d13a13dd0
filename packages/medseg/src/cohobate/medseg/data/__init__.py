"""Labelled volumes: NIfTI folders and the embedded data set."""

from cohobate.medseg.data.module import SegmentationData, Split
from cohobate.medseg.data.preprocess import Preprocess
from cohobate.medseg.data.volumes import Augment, Batch, Sample

__all__ = ["Augment", "Batch", "Preprocess", "Sample", "SegmentationData", "Split"]
