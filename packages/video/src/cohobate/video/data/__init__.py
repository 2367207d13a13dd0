"""Dual reversed rolling-shutter pairs: readers, synthesis from clips, media files."""

from cohobate.video.data.module import DualShutterData
from cohobate.video.data.pairs import DualPair
from cohobate.video.data.synthesis import Readout, synthesise

__all__ = ["DualPair", "DualShutterData", "Readout", "synthesise"]
