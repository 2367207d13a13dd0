"""D-FINE: fine-grained distribution refinement and its self-distillation (arXiv 2410.13842)."""

from cohobate.detection.d_fine.criterion import Criterion, Outputs
from cohobate.detection.d_fine.denoising import Denoising
from cohobate.detection.d_fine.losses import (
    bin_targets,
    decode,
    decoupled_distillation_focal,
    expected_offsets,
    fine_grained_localization,
    varifocal,
    weighting,
)
from cohobate.detection.d_fine.matching import MatchCost, hungarian, union
from cohobate.detection.d_fine.method import DFine
from cohobate.detection.d_fine.network import DFineNet, deploy

__all__ = [
    "Criterion",
    "DFine",
    "DFineNet",
    "Denoising",
    "MatchCost",
    "Outputs",
    "bin_targets",
    "decode",
    "decoupled_distillation_focal",
    "deploy",
    "expected_offsets",
    "fine_grained_localization",
    "hungarian",
    "union",
    "varifocal",
    "weighting",
]
