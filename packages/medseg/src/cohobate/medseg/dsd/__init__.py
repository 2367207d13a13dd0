"""Dual self-distillation of U-shaped segmentation networks (arXiv 2306.03271)."""

from cohobate.medseg.dsd.losses import dice_ce, distillation, prepare
from cohobate.medseg.dsd.method import DSD
from cohobate.medseg.dsd.network import Head, Outputs, SelfDistilled

__all__ = ["DSD", "Head", "Outputs", "SelfDistilled", "dice_ce", "distillation", "prepare"]
