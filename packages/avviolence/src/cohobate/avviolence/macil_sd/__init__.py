"""MACIL-SD: contrast of sound and picture and a weight merge, from yes/no labels."""

from cohobate.avviolence.macil_sd.checkpoint import load_official, save_official
from cohobate.avviolence.macil_sd.losses import (
    bag_logits,
    contrast_semi_bags,
    contrast_weight,
    merge_,
    merge_coefficient,
)
from cohobate.avviolence.macil_sd.method import MACILSD
from cohobate.avviolence.macil_sd.network import AudioVisualNet, VisualNet

__all__ = [
    "MACILSD",
    "AudioVisualNet",
    "VisualNet",
    "bag_logits",
    "contrast_semi_bags",
    "contrast_weight",
    "load_official",
    "merge_",
    "merge_coefficient",
    "save_official",
]
