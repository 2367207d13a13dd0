"""Fitness aligned structural modeling enables scalable virtual screening (arXiv:2508.02137)."""

from cohobate.docking.aurobind.diffusion import Noise
from cohobate.docking.aurobind.losses import pairwise_dpo, plackett_luce, sft, smooth_lddt
from cohobate.docking.aurobind.method import AuroBind
from cohobate.docking.aurobind.structure import Keep
from cohobate.docking.aurobind.student import FastStudent, ReleasedStudent

__all__ = [
    "AuroBind", "FastStudent", "Keep", "Noise", "ReleasedStudent",
    "pairwise_dpo", "plackett_luce", "sft", "smooth_lddt",
]  # fmt: skip
