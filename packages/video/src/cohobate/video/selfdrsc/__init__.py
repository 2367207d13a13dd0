"""SelfDRSC: dual reversed rolling-shutter correction from the pairs themselves."""

from cohobate.video.selfdrsc.checkpoint import load_official, save_official
from cohobate.video.selfdrsc.losses import (
    charbonnier,
    distort,
    perceptual,
    reconstruct,
    self_distillation,
    self_supervised,
    variation,
)
from cohobate.video.selfdrsc.method import SelfDRSC
from cohobate.video.selfdrsc.network import CorrectionNet, preset
from cohobate.video.selfdrsc.predict import frames_at

__all__ = [
    "CorrectionNet",
    "SelfDRSC",
    "charbonnier",
    "distort",
    "frames_at",
    "load_official",
    "perceptual",
    "preset",
    "reconstruct",
    "save_official",
    "self_distillation",
    "self_supervised",
    "variation",
]
