"""Metrics of click prediction: AUC (exact and binned), GAUC, log loss, calibration, RelaImpr."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torchmetrics import Metric

BINS = 10_000
"""Bins of the streaming AUC: a state of 160 kB, an error below 1e-3."""


def calibrate(probability: Tensor, sample_rate: float) -> Tensor:
    """Undo the subsampling of negatives: ``p / (p + (1 - p) / w)``.

    Args:
        probability: predicted on the subsampled data.
        sample_rate: share of the negatives that was kept (w), in (0, 1].

    Example:
        >>> calibrate(torch.tensor([0.5, 0.9]), 0.1)
        tensor([0.0909, 0.4737])
    """
    return probability / (probability + (1 - probability) / sample_rate)


def _undefined(what: str) -> Tensor:
    warnings.warn(f"{what} is undefined: the labels have one class only", stacklevel=3)
    return torch.tensor(float("nan"), dtype=torch.float64)


def _average_ranks(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks from 1 inside each group, ties sharing their mean.

    Args:
        scores: (N,).
        group: (N,) int64 from 0.

    Returns:
        The order (N,) by group and score, and the rank of each row in that order, float64.
    """
    order = torch.argsort(scores, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    s, g = scores[order], group[order]
    index = torch.arange(len(s), device=s.device)
    new = torch.ones_like(s, dtype=torch.bool)
    new[1:] = (s[1:] != s[:-1]) | (g[1:] != g[:-1])
    tie = new.cumsum(0) - 1
    count = torch.bincount(tie)
    first = index[new]
    start = torch.searchsorted(g, g)  # first row of the group
    middle = first.double() + (count.double() - 1) / 2
    return order, middle[tie] - start + 1


def auc(scores: Tensor, labels: Tensor) -> Tensor:
    """Probability that a random positive is ranked above a random negative, ties one half.

    Args:
        scores: (N,) any monotone score.
        labels: (N,) 0 or 1.

    Returns:
        A float64 scalar; NaN with a warning when the labels have one class.

    Example:
        >>> auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1])).item()
        0.875
    """
    labels = labels.double()
    positive = labels.sum()
    negative = len(labels) - positive
    if positive == 0 or negative == 0:
        return _undefined("AUC")
    order, rank = _average_ranks(scores, torch.zeros_like(labels, dtype=torch.long))
    total = (rank * labels[order]).sum()
    return (total - positive * (positive + 1) / 2) / (positive * negative)


def gauc(scores: Tensor, labels: Tensor, users: Tensor) -> Tensor:
    """AUC inside each user, averaged with the user's number of rows as weight.

    Users whose labels have one class are left out of both sums.

    Args:
        scores: (N,).
        labels: (N,) 0 or 1.
        users: (N,) int64.

    Returns:
        A float64 scalar; NaN with a warning when no user has both classes.
    """
    group = users.unique(return_inverse=True)[1]
    order, rank = _average_ranks(scores, group)
    y, g = labels[order].double(), group[order]
    size = torch.bincount(g).double()
    positive = torch.bincount(g, y)
    negative = size - positive
    total = torch.bincount(g, rank * y)
    kept = (positive > 0) & (negative > 0)
    if not kept.any():
        return _undefined("GAUC")
    each = (total - positive * (positive + 1) / 2)[kept] / (positive * negative)[kept]
    return (each * size[kept]).sum() / size[kept].sum()


def binned_auc(histogram: Tensor) -> Tensor:
    """AUC of counts (2, bins) of negatives and positives by score; a bin is one tie.

    Args:
        histogram: row 0 negatives, row 1 positives, bins in rising order of the score.
    """
    negative, positive = histogram.double()
    if negative.sum() == 0 or positive.sum() == 0:
        return _undefined("AUC")
    below = negative.cumsum(0) - negative / 2
    return (positive * below).sum() / (positive.sum() * negative.sum())


def log_loss(probability: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log likelihood; probabilities are clipped to [1e-7, 1 - 1e-7].

    Args:
        probability: (N,).
        labels: (N,) 0 or 1.
    """
    p, y = probability.double().clamp(1e-7, 1 - 1e-7), labels.double()
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


def relative_improvement(value: float, base: float) -> float:
    """RelaImpr: gain over chance relative to the base model's, ``(a - .5) / (b - .5) - 1``.

    Example:
        >>> round(relative_improvement(0.62, 0.60), 3)
        0.2
    """
    return (value - 0.5) / (base - 0.5) - 1


def reliability(probability: Tensor, labels: Tensor, bins: int = 20) -> Tensor:
    """Table (bins, 3) of a calibration plot: rows, mean prediction, mean label of each bin.

    Args:
        probability: (N,).
        labels: (N,) 0 or 1.
        bins: bins of equal width over [0, 1].
    """
    p, y = probability.double(), labels.double()
    index = (p * bins).long().clamp(0, bins - 1)
    count = torch.bincount(index, minlength=bins).double()
    means = [torch.bincount(index, w, minlength=bins) / count for w in (p, y)]
    return torch.stack([count, *means], 1)


def expected_calibration_error(probability: Tensor, labels: Tensor, bins: int = 20) -> Tensor:
    """ECE: difference of mean prediction and mean label per bin, weighted by rows."""
    count, p, y = reliability(probability, labels, bins).unbind(1)
    return (count * (p - y)).nan_to_num().abs().sum() / count.sum()


class ClickMetrics(Metric):
    """All metrics over an epoch and over all processes.

    Args:
        exact: keep every score for exact AUC and GAUC; else bin the scores (constant memory, no
            GAUC).
        sample_rate: share of the negatives in the data; log loss and calibration are computed on
            the corrected probability.
    """

    full_state_update = False

    def __init__(self, *, exact: bool = True, sample_rate: float = 1.0) -> None:
        super().__init__()
        self.exact, self.sample_rate = exact, sample_rate
        self.scores: list[Tensor]
        self.labels: list[Tensor]
        self.users: list[Tensor]
        self.histogram: Tensor
        self.sums: Tensor
        if exact:
            for name in ("scores", "labels", "users"):
                self.add_state(name, [], dist_reduce_fx="cat")
        else:
            histogram = torch.zeros(2, BINS, dtype=torch.float64)
            self.add_state("histogram", histogram, dist_reduce_fx="sum")
            self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, users: Tensor) -> None:
        """Add a batch: logits, labels and users, each (B,)."""
        logits, labels = logits.detach().float(), labels.detach()
        if self.exact:
            self.scores.append(logits)
            self.labels.append(labels)
            self.users.append(users)
            return
        p = torch.sigmoid(logits.double())
        index = (p * BINS).long().clamp(0, BINS - 1) + BINS * labels.long()
        self.histogram += torch.bincount(index, minlength=2 * BINS).view(2, BINS)
        p = calibrate(p, self.sample_rate)
        n = torch.tensor(float(len(p)), dtype=torch.float64, device=p.device)
        self.sums += torch.stack([n, log_loss(p, labels) * n, p.sum(), labels.double().sum()])

    def compute(self) -> dict[str, Tensor]:
        """Return ``auc``, ``gauc`` (exact only), ``log_loss``, ``calibration``, ``ece`` (exact)."""
        if not self.exact:
            n, loss, predicted, clicked = self.sums
            return {
                "auc": binned_auc(self.histogram),
                "log_loss": loss / n,
                "calibration": predicted / clicked,
            }
        scores, labels, users = (
            torch.cat(x) if isinstance(x, list) else x
            for x in (self.scores, self.labels, self.users)
        )
        p = calibrate(torch.sigmoid(scores.double()), self.sample_rate)
        return {
            "auc": auc(scores, labels),
            "gauc": gauc(scores, labels, users),
            "log_loss": log_loss(p, labels),
            "calibration": p.mean() / labels.double().mean(),
            "ece": expected_calibration_error(p, labels),
        }
