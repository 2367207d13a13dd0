"""Losses of ESP-MedSAM: masks, patches, and the embeddings of student and teacher."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cohobate.core.errors import InputError
from cohobate.core.losses import mse


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """``0.8 · Dice + 0.2 · Focal`` of the mask, both over the whole batch.

    ``Dice = 1 − (2 Σ p y + 1) / (Σ p + Σ y + 1)``; ``Focal = 0.8 (1 − exp(−b))² b`` with b the
    mean binary cross-entropy of all pixels.

    Args:
        logits: ``(B, 1, H, W)``.
        target: 0 or 1, of the same shape.

    Returns:
        A scalar of the logits' type.

    Raises:
        InputError: Shapes differ.

    References:
        Xu et al., arXiv 2407.14153, L_seg; the form is that of the authors' UN-SAM.

    Differences:
        The focal modulation is of the mean cross-entropy and not of each pixel's, and α = 0.8 also
        weighs the background, as in the authors' code.

    Example:
        >>> import torch
        >>> round(mask_loss(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).item(), 4)
        0.2563
    """
    if logits.shape != target.shape:
        raise InputError(f"target {tuple(target.shape)}: not the shape of {tuple(logits.shape)}")
    dtype = logits.dtype
    z, y = _wide(logits), _wide(target)
    p = z.sigmoid()
    dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    b = F.binary_cross_entropy_with_logits(z, y)
    focal = 0.8 * (1 - (-b).exp()) ** 2 * b
    return (0.8 * dice + 0.2 * focal).to(dtype)


def patch_target(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Which patches contain any foreground.

    Args:
        mask: 0 or 1, ``(B, 1, H, W)``.
        size: Patches down and across, h and w; H / h and W / w are whole.

    Returns:
        0 or 1, ``(B, 1, h, w)``, of a floating type.

    Example:
        >>> import torch
        >>> one = torch.zeros(1, 1, 64, 64)
        >>> one[0, 0, 40, 3] = 1
        >>> patch_target(one, (2, 2))[0, 0].tolist()
        [[0.0, 0.0], [1.0, 0.0]]
    """
    height, width = mask.shape[2:]
    if height % size[0] or width % size[1]:
        raise InputError(f"mask {tuple(mask.shape)}: is no whole number of {size} patches")
    return F.max_pool2d(_wide(mask), (height // size[0], width // size[1]))


def patch_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """``L_SPPG``: mean binary cross-entropy of the patches.

    Args:
        logits: ``(B, 1, h, w)``.
        mask: 0 or 1, ``(B, 1, H, W)``; a patch with any foreground is positive.

    Returns:
        A scalar of the logits' type.

    References:
        Xu et al., arXiv 2407.14153, L_SPPG.

    Example:
        >>> import torch
        >>> round(patch_loss(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 32, 32)).item(), 4)
        0.6931
    """
    target = patch_target(mask, (logits.shape[2], logits.shape[3]))
    return F.binary_cross_entropy_with_logits(_wide(logits), target).to(logits.dtype)


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``L_MA`` and ``L_MC``: mean squared difference of the embeddings.

    Args:
        student: ``(B, E, h, w)``.
        teacher: Of the same shape; it gets no gradient.

    Returns:
        A scalar of the student's type.

    Raises:
        InputError: Shapes differ.

    References:
        Xu et al., arXiv 2407.14153, L_MA (common knowledge) and L_MC (a modality's).

    Example:
        >>> import torch
        >>> embedding_loss(torch.zeros(1, 2, 1, 1), torch.full((1, 2, 1, 1), 3.0)).item()
        9.0
    """
    return mse(student, teacher.detach())


def _wide(x: Tensor) -> Tensor:
    """Float32, or float64 when it is that."""
    return x if x.is_floating_point() and x.element_size() > 4 else x.float()
