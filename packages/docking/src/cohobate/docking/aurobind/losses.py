"""The losses of every stage: structure, self-distillation, fitness, preference, student.

References:
    AuroBind, arXiv 2508.02137. Where it gives no formula of its own (structure), Abramson et al.,
    Accurate structure prediction of biomolecular interactions with AlphaFold 3, Nature 2024,
    supplement 3.7 and 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_LDDT = (0.5, 1.0, 2.0, 4.0)


# --- stage 1 and 2: structure ----------------------------------------------------------------


def align(moving: Tensor, fixed: Tensor, weight: Tensor) -> Tensor:
    """Move points rigidly onto others: the weighted Kabsch fit.

    Args:
        moving: Coordinates (B, A, 3), Å.
        fixed: Coordinates (B, A, 3) to fit on, Å.
        weight: Weight of each atom (B, A); 0 leaves it out.

    Returns:
        ``moving`` in the frame of ``fixed`` (B, A, 3), without gradient. Never a mirror image.

    Example:
        >>> fixed = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]]])
        >>> turned = fixed[..., [1, 2, 0]] + 5
        >>> bool((align(turned, fixed, torch.ones(1, 4)) - fixed).abs().max() < 1e-5)
        True
    """
    with torch.no_grad():
        share = (weight / weight.sum(1, keepdim=True).clamp(min=1e-12))[..., None]
        from_centre = (share * moving).sum(1, keepdim=True)
        to_centre = (share * fixed).sum(1, keepdim=True)
        a, b = moving - from_centre, fixed - to_centre
        left, _, right = torch.linalg.svd((share * a).mT @ b)
        sign = torch.ones_like(left[..., 0])
        sign[..., -1] = torch.linalg.det(left @ right).sign()
        rotation = (left * sign[..., None, :]) @ right
        return a @ rotation + to_centre


def nearest_order(x: Tensor, target: Tensor, mask: Tensor, orders: Tensor) -> Tensor:
    """The target with equivalent atoms exchanged so that it lies nearest to the prediction.

    Args:
        x: Predicted coordinates (B, A, 3), Å; no gradient flows through the choice.
        target: True coordinates (B, A, 3), Å.
        mask: Which atoms are resolved (B, A).
        orders: Orders of the atoms that are the same molecule (B, K, A).

    Returns:
        (B, A, 3), Å.

    Example:
        >>> x = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
        >>> nearest_order(x, x.flip(1), torch.ones(1, 2), torch.tensor([[[0, 1], [1, 0]]])).equal(x)
        True
    """
    with torch.no_grad():
        here = mask[..., None]
        # |x - y|² over the orders differs in x · y alone, a matrix product for each sample.
        like = (x * here) @ (target * here).mT
        places = orders.mT  # (B, A, K)
        best = like.gather(2, places).sum(1).argmax(1)
        chosen = orders[torch.arange(len(orders), device=orders.device), best]
    return target.gather(1, chosen[..., None].expand_as(target))


def pose_mse(x: Tensor, target: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted squared error of the atoms, for each sample: ``1/3 Σ w m |x̂ - x|² / Σ m``.

    Args:
        x: Predicted coordinates (B, A, 3), Å.
        target: True coordinates (B, A, 3) in the same frame, Å.
        mask: Which atoms are resolved (B, A).
        weight: Weight of each atom (B, A), ``1 + 10 [ligand]`` in AlphaFold 3; default 1.

    Returns:
        (B,), Å².

    Example:
        >>> pose_mse(torch.ones(1, 2, 3), torch.zeros(1, 2, 3), torch.ones(1, 2)).item()
        1.0
    """
    squared = (x - target).square().sum(-1) * mask
    if weight is not None:
        squared = squared * weight
    return squared.sum(-1) / mask.sum(-1).clamp(min=1) / 3


def smooth_lddt(
    x: Tensor,
    target: Tensor,
    mask: Tensor,
    fixed: Tensor | None = None,
    fixed_mask: Tensor | None = None,
    cutoff: float = 15.0,
) -> Tensor:
    """One minus the smooth lDDT, for each sample, over pairs of atoms nearer than ``cutoff``.

    Args:
        x: Predicted coordinates (B, A, 3), Å.
        target: True coordinates (B, A, 3), Å.
        mask: Which atoms are resolved (B, A).
        fixed: Points of a rigid pocket (B, P, 3) whose pairs with the atoms count too.
        fixed_mask: Which of them there are (B, P).
        cutoff: Å, on the true distance.

    Returns:
        (B,), between 0 and 1.

    Example:
        >>> x = torch.tensor([[[0.0, 0, 0], [3, 0, 0]]])
        >>> round(smooth_lddt(x, x, torch.ones(1, 2)).item(), 4)
        0.1959
    """
    near_x, near_t, pair = [_distances(x, x)], [_distances(target, target)], []
    other = mask[:, :, None] * mask[:, None, :]
    pair.append(other * (1 - torch.eye(x.shape[1], dtype=x.dtype, device=x.device)))
    if fixed is not None and fixed_mask is not None:
        near_x.append(_distances(x, fixed))
        near_t.append(_distances(target, fixed))
        pair.append(mask[:, :, None] * fixed_mask[:, None, :].to(mask))
    found, true, valid = (torch.cat(part, -1) for part in (near_x, near_t, pair))
    valid = valid * (true < cutoff)
    error = (found - true).abs()
    close = torch.stack([torch.sigmoid(t - error) for t in _LDDT]).mean(0)
    return 1 - (valid * close).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def bond_loss(x: Tensor, target: Tensor, bonds: Tensor) -> Tensor:
    """Mean squared error of the bond lengths, for each sample.

    Args:
        x: Predicted coordinates (B, A, 3), Å.
        target: True coordinates (B, A, 3), Å.
        bonds: 1 where two atoms are bonded (B, A, A), symmetric.

    Returns:
        (B,), Å².

    Differences:
        AlphaFold 3 counts polymer-ligand bonds only; here every bond of the ligand.

    Example:
        >>> x = torch.tensor([[[0.0, 0, 0], [2, 0, 0]]])
        >>> bond_loss(x, x / 2, 1 - torch.eye(2)[None]).item()
        1.0
    """
    error = (_distances(x, x) - _distances(target, target)).square() * bonds
    return error.sum((1, 2)) / bonds.sum((1, 2)).clamp(min=1)


def edm_weight(t: Tensor, sigma_data: float) -> Tensor:
    """Weight of a noise level: ``(t² + σ_d²) / (t σ_d)²``.

    Args:
        t: Noise levels, Å.
        sigma_data: Spread of the data, Å.

    Example:
        >>> edm_weight(torch.tensor(16.0), 16.0).item()
        0.0078125
    """
    return (t.square() + sigma_data**2) / (t * sigma_data).square()


def distogram(logits: Tensor, distance: Tensor, pair: Tensor, low: float, high: float) -> Tensor:
    """Cross-entropy of binned distances, mean over valid pairs.

    Args:
        logits: (B, N, N, bins).
        distance: (B, N, N), Å.
        pair: Which pairs count (B, N, N).
        low: Upper edge of the first bin, Å.
        high: Lower edge of the last bin, Å.

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> round(distogram(torch.zeros(1, 1, 1, 64), one, one, 2.0, 22.0).item(), 4)
        4.1589
    """
    edges = torch.linspace(low, high, logits.shape[-1] - 1, device=logits.device)
    return binned(logits, torch.bucketize(distance, edges.to(distance)), pair)


def binned(logits: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of bins, mean over what the mask keeps; float32 inside.

    Args:
        logits: (..., bins).
        index: True bin (...).
        mask: (...).

    Example:
        >>> zero = torch.zeros(1, dtype=torch.long)
        >>> round(binned(torch.zeros(1, 2), zero, torch.ones(1)).item(), 4)
        0.6931
    """
    lost = F.cross_entropy(logits.float().flatten(0, -2), index.flatten(), reduction="none")
    kept = mask.flatten().float()
    return ((lost * kept).sum() / kept.sum().clamp(min=1)).to(logits.dtype)


def lddt_of_atoms(
    x: Tensor, target: Tensor, fixed: Tensor, fixed_mask: Tensor, cutoff: float = 15.0
) -> Tensor:
    """The lDDT of each ligand atom against the protein: what pLDDT predicts.

    Args:
        x: Predicted coordinates (B, A, 3), Å.
        target: True coordinates (B, A, 3), Å.
        fixed: Points of the protein (B, P, 3), Å.
        fixed_mask: (B, P).
        cutoff: Å, on the true distance.

    Returns:
        (B, A) between 0 and 1.

    Example:
        >>> x, p = torch.zeros(1, 1, 3), torch.ones(1, 1, 3)
        >>> lddt_of_atoms(x, x, p, torch.ones(1, 1)).item()
        1.0
    """
    true = torch.cdist(target, fixed)
    valid = fixed_mask[:, None, :] * (true < cutoff)
    error = (torch.cdist(x, fixed) - true).abs()
    kept = torch.stack([(error < t).to(x.dtype) for t in _LDDT]).mean(0)
    return (valid * kept).sum(-1) / valid.sum(-1).clamp(min=1)


# --- stage 3: fitness ------------------------------------------------------------------------


def sft(
    fitness: Tensor,
    label: Tensor,
    scale: Tensor | None = None,
    inputs: tuple[Tensor, ...] = (),
    smoothness: float = 0.0,
) -> Tensor:
    """Squared error in units of the measurement's error, and the gradient's squared norm.

    ``1/B Σ ((ŷ - y) / σ)² + λ · mean over the batch of ‖∇ŷ‖²``.

    Args:
        fitness: ŷ (B,), pK.
        label: y (B,), pK.
        scale: σ (B,), the error of each measurement; default 1.
        inputs: The frozen trunk's output, what the gradient is taken of.
        smoothness: λ.

    References:
        AuroBind, supervised fine-tuning. The paper defines neither σ nor what ∇ refers to.

    Example:
        >>> sft(torch.tensor([6.0]), torch.tensor([8.0])).item()
        4.0
    """
    error = fitness - label
    loss = (error if scale is None else error / scale).square().mean()
    if smoothness == 0.0 or not inputs:
        return loss
    slopes = torch.autograd.grad(fitness.sum(), inputs, create_graph=True)
    norms = torch.stack([slope.flatten(1).square().sum(1) for slope in slopes]).sum(0)
    return loss + smoothness * norms.mean()


def plackett_luce(
    fitness: Tensor,
    label: Tensor,
    mask: Tensor,
    *,
    tau: float = 0.1,
    confidence: Tensor | None = None,
    ties: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of the measured order, for lists of one protein each.

    With r the valid items by falling label,
    ``L = - Σ_k c_{r_k} log [exp(ŷ_{r_k}/τ) / Σ_{j>=k} exp(ŷ_{r_j}/τ)]``, mean over the lists with
    at least two items. In float32 at least.

    Args:
        fitness: ŷ (B, K).
        label: y (B, K).
        mask: Which items there are (B, K).
        tau: τ.
        confidence: c (B, K), a weight for each term; default 1.
        ties: Numbers (B, K) that order equal labels, largest first; by default their place.

    Returns:
        Scalar.

    References:
        AuroBind, preference optimisation. The paper calls it DPO, but it has neither a reference
        policy nor pairs; the weights by confidence are described there without a formula.

    Example:
        >>> one = torch.ones(1, 3, dtype=torch.bool)
        >>> round(plackett_luce(torch.zeros(1, 3), torch.rand(1, 3), one).item(), 4)  # log 3!
        1.7918
    """
    wide = fitness if fitness.dtype == torch.float64 else fitness.float()
    order = torch.arange(label.shape[1], device=label.device).expand(label.shape)
    if ties is not None:
        order = ties.argsort(dim=1, descending=True, stable=True)
    last = torch.finfo(label.dtype).min
    key = label.masked_fill(~mask, last).gather(1, order)
    order = order.gather(1, key.argsort(dim=1, descending=True, stable=True))
    scores, valid = (wide / tau).gather(1, order), mask.gather(1, order)
    # Padding stands last, and must not reach the sums from behind.
    shut = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
    terms = shut.flip(1).logcumsumexp(1).flip(1) - scores
    terms = terms.masked_fill(~valid, 0.0)
    if confidence is not None:
        terms = terms * confidence.gather(1, order)
    lists = mask.sum(1) >= 2
    each = terms.sum(1) * lists
    return (each.sum() / lists.sum().clamp(min=1)).to(fitness.dtype)


def pairwise_dpo(
    fitness: Tensor,
    reference: Tensor,
    label: Tensor,
    mask: Tensor,
    *,
    beta: float = 1.0,
    margin: float = 0.3,
) -> Tensor:
    """Direct preference optimisation over pairs, with the fitness as the implicit reward.

    ``-log σ(β [(ŷ_w - ŷ_l) - (ŷ_w^ref - ŷ_l^ref)])``, mean over the pairs whose labels differ by
    more than ``margin``.

    Args:
        fitness: ŷ (B, K).
        reference: ŷ of the frozen model that fine-tuning gave (B, K).
        label: y (B, K).
        mask: (B, K).
        beta: β.
        margin: pK.

    References:
        Rafailov et al., arXiv 2305.18290, equation 7. Not in AuroBind, whose "DPO" is
        `plackett_luce`.

    Example:
        >>> one = torch.ones(1, 2, dtype=torch.bool)
        >>> zero = torch.zeros(1, 2)
        >>> round(pairwise_dpo(zero, zero, torch.tensor([[7.0, 6.0]]), one).item(), 4)
        0.6931
    """
    gain = fitness - reference
    pairs = (label[:, :, None] - label[:, None, :] > margin) & mask[:, :, None] & mask[:, None, :]
    each = F.softplus(-beta * (gain[:, :, None] - gain[:, None, :])) * pairs
    return each.sum() / pairs.sum().clamp(min=1)


# --- stage 4: student ------------------------------------------------------------------------


def hidden(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance from the teacher's hidden state: mean squared over channels and batch.

    Args:
        student: H_S (B, C).
        teacher: H_T (B, C), without gradient.

    References:
        AuroBind, AuroFast: ``α ‖H_S - H_T‖²``; the exponent survives only in part.

    Example:
        >>> hidden(torch.ones(1, 4), torch.zeros(1, 4)).item()
        1.0
    """
    return (student - teacher.detach()).square().mean()


def score(student: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """Distance from the wanted fitness: ``β |ŷ_S - y_T|``, mean over valid items.

    Args:
        student: ŷ_S (B,).
        wanted: y_T (B,), the teacher's or the measured fitness.
        mask: Which have one (B,).

    Example:
        >>> score(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 9.0]), torch.tensor([1, 0])).item()
        2.0
    """
    error = (student - wanted.detach()).abs()
    if mask is None:
        return error.mean()
    return (error * mask).sum() / mask.sum().clamp(min=1)


def rows_of(of: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (L, K) of each list in a flat batch, and which there are, from their ids (B,)."""
    sizes = of.bincount()
    mask = torch.arange(int(sizes.max()), device=of.device) < sizes[:, None]
    rows = torch.zeros(mask.shape, dtype=torch.long, device=of.device)
    rows[mask] = torch.arange(len(of), device=of.device)
    return rows, mask


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances (B, A, P); smooth at zero."""
    return ((a[:, :, None] - b[:, None]).square().sum(-1) + 1e-8).sqrt()
