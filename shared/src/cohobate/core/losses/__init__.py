"""Distillation losses: pure functions of student, teacher and target.

All follow one rule for masks, weights and counts (``cohobate.core.losses.reduce``), compute in
float32 (float64 for float64) and return the student's type.
"""

from cohobate.core.losses.contrast import gather_rows, info_nce, region_info_nce
from cohobate.core.losses.divergences import KINDS, Kind, divergence
from cohobate.core.losses.feature import (
    attention_map,
    attention_transfer,
    cosine,
    hint,
    mse,
    smooth_l1,
)
from cohobate.core.losses.kl import (
    forward_kl,
    jeffreys,
    jensen_shannon,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
    total_variation,
)
from cohobate.core.losses.reduce import global_items, reduce_items
from cohobate.core.losses.regions import segment_mean
from cohobate.core.losses.relation import attention_relation, gram_relation, value_relation
from cohobate.core.losses.soft_targets import (
    cross_entropy,
    kd_loss,
    smooth_labels,
    soft_cross_entropy,
)

__all__ = [
    "KINDS",
    "Kind",
    "attention_map",
    "attention_relation",
    "attention_transfer",
    "cosine",
    "cross_entropy",
    "divergence",
    "forward_kl",
    "gather_rows",
    "global_items",
    "gram_relation",
    "hint",
    "info_nce",
    "jeffreys",
    "jensen_shannon",
    "kd_loss",
    "mse",
    "reduce_items",
    "region_info_nce",
    "reverse_kl",
    "segment_mean",
    "skewed_kl",
    "skewed_reverse_kl",
    "smooth_l1",
    "smooth_labels",
    "soft_cross_entropy",
    "total_variation",
    "value_relation",
]
