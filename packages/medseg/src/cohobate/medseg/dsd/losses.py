"""Losses of dual self-distillation: Dice + cross-entropy, and the KL divergence within each side.

Both work at every voxel of the input, for nine outputs at once, so what the outputs share (the
label) is computed once and each output keeps a single buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.core.errors import InputError
from cohobate.core.losses.kl import forward_kl

SMOOTH = 1e-5  # added to both sides of the Dice ratio


class Target(NamedTuple):
    """A label as `dice_ce` takes it, prepared once for all outputs.

    Attributes:
        label: Class of each voxel, ``(B, S₁, V/S₁)`` int64.
        volume: Number of voxels of each class, ``(B, K)``.
    """

    label: Tensor
    volume: Tensor


def prepare(label: Tensor, like: Tensor) -> Target:
    """Check a label and bring it into the form `dice_ce` takes.

    Args:
        label: Class ids ``(B, 1, *S)`` or ``(B, *S)`` of any dtype, whole numbers from 0 to K - 1.
        like: Logits ``(B, K, *S)`` it belongs to.

    Raises:
        InputError: The shapes do not fit or, on the CPU, a value is not a class. (On an
            accelerator looking at the values would stall it; data modules check when they read.)

    Example:
        >>> prepare(torch.tensor([[[0, 2], [2, 1]]]), torch.zeros(1, 3, 2, 2)).volume
        tensor([[1., 1., 2.]])
    """
    batch, classes, *size = like.shape
    if tuple(label.shape) not in ((batch, 1, *size), (batch, *size)):
        raise InputError(f"label {tuple(label.shape)} does not fit logits {tuple(like.shape)}")
    if label.device.type == "cpu":
        check_label(label, classes)
    index = label.reshape(batch, size[0], -1).long()
    ones = torch.ones((), device=like.device).expand(index.shape)
    return Target(index, _sum_by_class(ones, index, classes))


def check_label(label: Tensor, num_classes: int, name: str = "label") -> None:
    """Raise unless a label holds only whole numbers from 0 to K - 1.

    Args:
        label: Class ids of any shape.
        num_classes: K.
        name: What the message calls it, a tensor or a file.

    Raises:
        InputError: With the offending value.
    """
    if label.is_floating_point() and not torch.equal(label, label.round()):
        value = label[label != label.round()][0].item()
        raise InputError(f"{name} {tuple(label.shape)}: value {value:g} is not a whole number")
    low, high = (value.item() for value in label.aminmax())
    if low < 0 or high >= num_classes:
        raise InputError(
            f"{name} {tuple(label.shape)}: value {low if low < 0 else high:g} is not one of the "
            f"{num_classes} classes 0 to {num_classes - 1}"
        )


def dice_ce(logits: Tensor, target: Target) -> Tensor:
    """Soft Dice loss plus cross-entropy, both with weight 1 and with the background (DCE).

    ``DCE(z, y) = mean over samples and classes of 1 - (2 Σ p y + ε) / (Σ p + Σ y + ε)
    - mean over samples and voxels of log p_y`` with p = softmax z and ε = 1e-5.

    Args:
        logits: z of shape ``(B, K, *S)``; computed in float32 at least.
        target: The label, from `prepare`.

    Returns:
        A scalar.

    References:
        Banerjee et al., "Volumetric medical image segmentation through dual self-distillation in
        U-shaped networks", 2025, arXiv 2306.03271, supervision loss; values and gradients are those
        of MONAI's ``DiceCELoss(to_onehot_y=True, softmax=True)``.

    Example:
        >>> z = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]])
        >>> y = torch.tensor([[[0, 1]]])
        >>> print(f"{dice_ce(z, prepare(y, z)):.4f}")
        0.4153
    """
    loss: Tensor = _DiceCE.apply(logits, target.label, target.volume)
    return loss


class _DiceCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, volume: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            flat = _wide(logits).flatten(2)
            batch, classes, voxels = flat.shape
            label = index.view(batch, 1, voxels)
            log_p = flat.log_softmax(1)
            log_p_y = log_p.gather(1, label)
            p, p_y = log_p.exp_(), log_p_y.exp()
            overlap = _sum_by_class(p_y.view(index.shape), index, classes)
            ratio = 2 * overlap + SMOOTH
            total = p.sum(2) + volume.to(p.dtype) + SMOOTH
            ctx.save_for_backward(p, p_y, index, ratio, total)
            ctx.like = logits
            return ((1 - ratio / total).mean() - log_p_y.mean()).to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        p, p_y, index, ratio, total = ctx.saved_tensors
        batch, classes, voxels = p.shape
        label = index.view(batch, 1, voxels)
        ce = grad.to(p.dtype) / (batch * voxels)
        dice = grad.to(p.dtype) / (batch * classes)
        to_p = dice * ratio / total.square()  # d loss / d p, where the voxel is not of the class
        at_y = (-2 * dice / total)[:, :, None].expand_as(p).gather(1, label) * p_y
        mean = torch.bmm(to_p[:, None], p).add_(at_y)  # Σ_c p_c · d loss / d p_c
        out = (to_p[:, :, None] + ce).sub(mean).mul_(p).scatter_add_(1, label, at_y - ce)
        return out.view(ctx.like.shape).to(ctx.like.dtype), None, None


def distillation(
    students: Sequence[Tensor],
    teacher: Tensor,
    *,
    temperature: float = 3.0,
    include_background: bool = True,
    detach_teacher: bool = False,
) -> Tensor:
    """KL divergence from one teacher output to each student output of the same network.

    ``KLpix(s ← t) = T² · mean over samples and voxels of Σ_c p_c(t) [log p_c(t) - log p_c(s)]``,
    ``p(z) = softmax(z / T)``. The gradient reaches the teacher too, as in the official code, unless
    it is detached.

    Args:
        students: Logits ``(B, K, *S)`` of each student.
        teacher: Logits ``(B, K, *S)``: D₁ for the decoder, E_Z for the encoder.
        temperature: T.
        include_background: False drops class 0 from both sides before the softmax.
        detach_teacher: Stop the gradient to the teacher.

    Returns:
        One term per student, ``(len(students),)``.

    References:
        arXiv 2306.03271, decoder and encoder distillation losses.

    Example:
        >>> s = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
        >>> t = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]])
        >>> print(f"{distillation([s], t).item():.4f}")
        0.4992
    """
    first = 0 if include_background else 1
    teacher = teacher.detach() if detach_teacher else teacher
    terms = [
        forward_kl(s[:, first:], teacher[:, first:], temperature=temperature, class_dim=1)
        for s in students
    ]
    return torch.stack(terms)


def _sum_by_class(values: Tensor, index: Tensor, classes: int) -> Tensor:
    """Sum ``(B, S₁, R)`` values by class → ``(B, K)``; slab by slab, which keeps float32 exact."""
    sums = values.new_zeros(*index.shape[:2], classes)
    return sums.scatter_add_(2, index, values).sum(1)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
