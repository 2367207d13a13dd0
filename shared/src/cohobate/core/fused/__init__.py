"""Linear layer and divergence in one pass, without ever holding the full logits of both models."""

from cohobate.core.fused.api import linear_divergence
from cohobate.core.fused.spec import Probabilities, TopK

__all__ = ["Probabilities", "TopK", "linear_divergence"]
