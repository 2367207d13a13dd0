"""How well scores find violent frames and violent videos."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from cohobate.avviolence.data.features import SNIPPET_FRAMES


def video_scores(logits: np.ndarray) -> np.ndarray:
    """Score of each snippet: the mean over crops of the sigmoid.

    Args:
        logits: ``(C, T)``.

    Returns:
        ``(T,)``.
    """
    scores: np.ndarray = (1 / (1 + np.exp(-logits.astype(np.float64)))).mean(0)
    return scores


def frame_metrics(scores: list[np.ndarray], truths: list[np.ndarray]) -> dict[str, float]:
    """Frame metrics over all videos pooled; each snippet's score counts for its 16 frames.

    Args:
        scores: Snippet scores of each video, ``(T,)``.
        truths: Frame truth of each video, ``(16 T,)`` of 0 and 1.

    Returns:
        ``ap``: area under the precision-recall curve by the trapezoid rule, as the XD-Violence
        papers report it; ``ap_step``: average precision without interpolation, which is a little
        lower or higher; ``auc``: area under the ROC curve; ``video_auc``: mean of the ROC areas of
        the videos that have both kinds of frames. What the truth does not define is left out.

    Raises:
        ValueError: A video's truth does not fit its scores.

    Example:
        >>> truth = np.repeat([0.0, 1.0, 0.0], 16)
        >>> frame_metrics([np.array([0.1, 0.9, 0.2])], [truth])["ap"]
        1.0
    """
    for score, truth in zip(scores, truths, strict=True):
        if len(truth) != SNIPPET_FRAMES * len(score):
            raise ValueError(f"{len(truth)} frames of truth for {len(score)} snippets")
    frames = [score.repeat(SNIPPET_FRAMES) for score in scores]
    score, truth = np.concatenate(frames), np.concatenate(truths)
    found = {}
    if truth.any():
        precision, recall, _ = precision_recall_curve(truth, score)
        found["ap"] = float(auc(recall, precision))
        found["ap_step"] = float(average_precision_score(truth, score))
        if not truth.all():
            found["auc"] = float(roc_auc_score(truth, score))
    both = [(t, s) for t, s in zip(truths, frames, strict=True) if t.any() and not t.all()]
    if both:
        found["video_auc"] = float(np.mean([roc_auc_score(t, s) for t, s in both]))
    return found


def bag_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well whole videos are told apart, which needs no marked frames.

    Args:
        probabilities: Probability that each video is violent, ``(N,)``.
        labels: 0 or 1, ``(N,)``.

    Returns:
        ``bag_loss``: mean binary cross-entropy; ``bag_ap``: average precision, where a video is
        violent.
    """
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    found = {"bag_loss": float(-np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p)))}
    if labels.any():
        found["bag_ap"] = float(average_precision_score(labels, p))
    return found
