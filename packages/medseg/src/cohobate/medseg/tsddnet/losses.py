"""Losses of the joint stage: the fused head teaches the two branches it is made of.

The paper's abstract says that the fused model is trained by self-distillation and gives no
formula. This one follows "Be your own teacher": with the fused head's logits z_F and features f_F
as teacher, stop-gradient sg, and branches i ∈ {A, B} ::

    L_cls = CE(z_F, y)
          + Σ_i [(1 − a) CE(z_i, y) + a T² KL(softmax(sg z_F / T) ‖ softmax(z_i / T))]
          + c Σ_i ‖f_i − sg f_F‖² / dim

References:
    Wang et al., "TSDDNet", arXiv:2306.06982 (abstract); Zhang et al., "Be Your Own Teacher",
    ICCV 2019, arXiv:1905.08094, equations 3 to 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cohobate.core.losses import forward_kl
from cohobate.core.losses.feature import mse


def branch_ce(branches: Sequence[Tensor], target: Tensor) -> Tensor:
    """Σ_i CE(z_i, y), mean over images.

    Args:
        branches: Logits (B, K) of each branch.
        target: Classes (B,).

    Example:
        >>> round(branch_ce([torch.zeros(1, 2)] * 2, torch.tensor([1])).item(), 4)
        1.3863
    """
    return torch.stack([F.cross_entropy(z.float(), target) for z in branches]).sum()


def branch_kl(branches: Sequence[Tensor], fused: Tensor, *, temperature: float = 3.0) -> Tensor:
    """Σ_i T² KL(softmax(sg z_F / T) ‖ softmax(z_i / T)), summed over classes, mean over images.

    Args:
        branches: Logits (B, K) of each branch, the students.
        fused: Logits z_F (B, K) of the fused head, the teacher; no gradient flows to it.
        temperature: T.

    Raises:
        InputError: Shapes differ or the temperature is not positive.

    Example:
        >>> z = torch.tensor([[0.0, 1.0]])
        >>> round(branch_kl([torch.zeros(1, 2), z], z, temperature=1.0).item(), 4)
        0.1109
    """
    teacher = fused.detach()
    return torch.stack([forward_kl(z, teacher, temperature=temperature) for z in branches]).sum()


def branch_hint(branches: Sequence[Tensor], fused: Tensor) -> Tensor:
    """Σ_i ‖f_i − sg f_F‖² / dim, mean over images.

    Args:
        branches: Features (B, dim) of each branch, the students.
        fused: Features f_F (B, dim) of the fused head, the teacher; no gradient flows to it.

    Raises:
        InputError: Shapes differ.

    Example:
        >>> branch_hint([torch.tensor([[1.0, 2.0]])], torch.zeros(1, 2)).item()
        2.5
    """
    teacher = fused.detach()
    return torch.stack([mse(f, teacher) for f in branches]).sum()
