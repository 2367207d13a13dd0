"""Divergences between teacher and student distributions.

With p = softmax(teacher/T) and q = softmax(student/T) over the class axis, all of these sum over
classes, average over valid items (see ``cohobate.core.losses.reduce``) and multiply by T² unless
``t_squared=False``; T² keeps the size of the gradient independent of T. Gradients flow to both
arguments: detach the teacher yourself if it must not learn.

Arguments common to all:
    student: Logits, (B, C, *spatial) or any shape with the classes on axis ``class_dim``.
    teacher: Logits of the same shape.
    temperature: T > 0.
    t_squared: Whether to multiply by T².
    class_dim: Axis of the classes; -1 for (..., C).
    weight: Mask or weights that broadcast to the shape without the class axis.
    num_items: What the weighted sum is divided by; default is the number of non-zero weights.
    reduction: ``"none"`` gives the weighted divergence of every item.

All compute in float32 (float64 for float64) and return the student's type. They raise
``InputError`` when shapes differ, the weight does not broadcast, or an option is out of range.
"""

from __future__ import annotations

from typing import TypedDict, Unpack

from torch import Tensor

from cohobate.core.losses.divergences import divergence
from cohobate.core.losses.reduce import Reduction


class Options(TypedDict, total=False):
    """The arguments common to all divergences; the module's docstring explains them."""

    temperature: float
    t_squared: bool
    class_dim: int
    weight: Tensor | None
    num_items: int | float | Tensor | None
    reduction: Reduction


def forward_kl(student: Tensor, teacher: Tensor, **options: Unpack[Options]) -> Tensor:
    """Kullback–Leibler divergence T² Σ_c p_c (log p_c − log q_c), the usual distillation term.

    Args:
        student: Logits z_s.
        teacher: Logits z_t of the same shape.
        **options: See the module.

    References:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        arXiv:1503.02531, section 2.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(forward_kl(s, t).item(), 4), round(forward_kl(s, t, temperature=2.0).item(), 4)
        (0.1109, 0.1212)
    """
    return divergence(student, teacher, "forward_kl", **options)


def reverse_kl(student: Tensor, teacher: Tensor, **options: Unpack[Options]) -> Tensor:
    """Reverse Kullback–Leibler divergence T² Σ_c q_c (log q_c − log p_c): mode seeking.

    Args:
        student: Logits z_s.
        teacher: Logits z_t of the same shape.
        **options: See the module.

    References:
        Gu, Dong, Wei, Huang, "MiniLLM: Knowledge Distillation of Large Language Models",
        ICLR 2024, arXiv:2306.08543, equation 2.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(reverse_kl(s, t).item(), 4)
        0.1201
    """
    return divergence(student, teacher, "reverse_kl", **options)


def jeffreys(student: Tensor, teacher: Tensor, **options: Unpack[Options]) -> Tensor:
    """Jeffreys divergence, the sum of forward and reverse: T² Σ_c (p_c − q_c)(log p_c − log q_c).

    Args:
        student: Logits z_s.
        teacher: Logits z_t of the same shape.
        **options: See the module.

    References:
        Jeffreys, "An invariant form for the prior probability in estimation problems",
        Proceedings of the Royal Society A 186, 1946.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(jeffreys(s, t).item(), 4)
        0.2311
    """
    return divergence(student, teacher, "jeffreys", **options)


def jensen_shannon(
    student: Tensor, teacher: Tensor, *, beta: float = 0.5, **options: Unpack[Options]
) -> Tensor:
    """Generalised Jensen–Shannon divergence T² [β KL(p‖m) + (1−β) KL(q‖m)], m = βp + (1−β)q.

    Args:
        student: Logits z_s.
        teacher: Logits z_t of the same shape.
        beta: β in (0, 1). Divided by β it tends to the forward KL as β → 0, divided by 1−β to the
            reverse KL as β → 1.
        **options: See the module.

    References:
        Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
        Mistakes", ICLR 2024, arXiv:2306.13649, equation 1.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(jensen_shannon(s, t).item(), 4)
        0.0285
    """
    return divergence(student, teacher, "jensen_shannon", beta=beta, **options)


def skewed_kl(
    student: Tensor, teacher: Tensor, *, alpha: float = 0.1, **options: Unpack[Options]
) -> Tensor:
    """Skewed KL divergence T² KL(p ‖ αp + (1−α)q): a forward KL with bounded gradients.

    Args:
        student: Logits z_s.
        teacher: Logits z_t of the same shape.
        alpha: α in [0, 1), the share of the teacher in the mixture; 0 is the forward KL.
        **options: See the module.

    References:
        Ko, Kim, Chen, Yun, "DistiLLM: Towards Streamlined Distillation for Large Language
        Models", ICML 2024, arXiv:2402.03898, section 3.1.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(skewed_kl(s, t).item(), 4)
        0.0906
    """
    return divergence(student, teacher, "skewed_kl", beta=alpha, **options)


def skewed_reverse_kl(
    student: Tensor, teacher: Tensor, *, alpha: float = 0.1, **options: Unpack[Options]
) -> Tensor:
    """Skewed reverse KL divergence T² KL(q ‖ αq + (1−α)p).

    Args:
        student: Logits z_s.
        teacher: Logits z_t of the same shape.
        alpha: α in [0, 1), the share of the student in the mixture; 0 is the reverse KL.
        **options: See the module.

    References:
        Ko, Kim, Chen, Yun, "DistiLLM: Towards Streamlined Distillation for Large Language
        Models", ICML 2024, arXiv:2402.03898, section 3.1.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(skewed_reverse_kl(s, t).item(), 4)
        0.095
    """
    return divergence(student, teacher, "skewed_reverse_kl", beta=alpha, **options)


def total_variation(student: Tensor, teacher: Tensor, **options: Unpack[Options]) -> Tensor:
    """Total variation distance T² ½ Σ_c |p_c − q_c|.

    Args:
        student: Logits z_s.
        teacher: Logits z_t of the same shape.
        **options: See the module.

    References:
        Wen, Li, Du, Mou, "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
        ACL 2023, arXiv:2307.15190, section 3.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(total_variation(s, t).item(), 4)
        0.2311
    """
    return divergence(student, teacher, "total_variation", **options)
