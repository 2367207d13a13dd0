"""OKS average precision by parts with faster-coco-eval, and how far points are off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from cohobate.detection.dwpose.keypoints import KeypointSet
from cohobate.detection.dwpose.people import People

STATS = ("ap", "ap50", "ap75", "ap_m", "ap_l", "ar", "ar50", "ar75", "ar_m", "ar_l")
_SURE = 0.2  # lowest score of a point that counts for its person's
_SAME = 0.9  # OKS from which two detections are one person
_NEAR = 0.05  # of the box's longer side: right in PCK
_EPS = np.spacing(1)


def average_precision(
    truth: People, photo: np.ndarray, points: np.ndarray, scores: np.ndarray, sigmas: np.ndarray,
    areas: np.ndarray,
) -> dict[str, float]:  # fmt: skip
    """COCO's key point AP and AR.

    People without an annotated point are ignored, detections without a positive point left out, at
    most 20 a picture count.

    Args:
        truth: The annotated people.
        photo: ``(n,)`` place of each detection's picture.
        points: ``(n, K, 3)`` x, y in its pixels and score.
        scores: ``(n,)`` of the detections.
        sigmas: ``(K,)`` of the points.
        areas: ``(n,)`` of the detections, which decide whether one that found nobody counts among
            the medium or the large; `extents` of the body, whatever the part.

    Returns:
        AP and AR over 0.50:0.95, at 0.50, at 0.75, of medium and of large people; NaN where there
        is nobody.

    References:
        Lin et al., COCO, arXiv 1405.0312; Jin et al., COCO-WholeBody, arXiv 2007.11858.
    """
    rows = [
        {
            "id": n + 1, "image_id": int(truth.photo[n]) + 1, "category_id": 1,
            "keypoints": truth.points[n].ravel().tolist(), "area": float(truth.areas[n]),
            "num_keypoints": int((truth.points[n, :, 2] > 0).sum()),
            "bbox": truth.boxes[n].tolist(), "iscrowd": int(truth.crowd[n]),
        }
        for n in range(len(truth))
    ]  # fmt: skip
    if not any(r["num_keypoints"] for r in rows):
        return dict.fromkeys(STATS, float("nan"))
    found: list[dict[str, Any]] = [
        {
            "image_id": int(photo[n]) + 1, "category_id": 1, "score": float(scores[n]),
            "keypoints": points[n].ravel().tolist(),
        }
        for n in np.flatnonzero((points[..., 2] > 0).any(1))
    ]  # fmt: skip
    if not found:
        return dict.fromkeys(STATS, 0.0)
    images = [
        {"id": n + 1, "width": p.width, "height": p.height} for n, p in enumerate(truth.photos)
    ]
    kind = {"id": 1, "name": "person"}
    coco = COCO({"images": images, "annotations": rows, "categories": [kind]})
    results = coco.loadRes(found)
    kept = areas[(points[..., 2] > 0).any(1)]
    for one, area in zip(results.dataset["annotations"], kept.tolist(), strict=True):
        one["area"] = area  # the library takes that of the part
    evaluation = COCOeval_faster(coco, results, iouType="keypoints", kpt_oks_sigmas=list(sigmas))
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = [float(v) for v in evaluation.stats[: len(STATS)]]
    return {n: v if v >= 0 else float("nan") for n, v in zip(STATS, values, strict=True)}


def extents(points: np.ndarray, kinds: KeypointSet) -> np.ndarray:
    """Areas ``(n,)`` of the rectangles around people's body points, or all where no part is so.

    Args:
        points: ``(n, K, 2 or more)``.
        kinds: The key points.
    """
    spots = points[:, kinds.parts.get("body", list(range(points.shape[1]))), :2]
    return np.ptp(spots, axis=1).prod(-1) if len(spots) else np.zeros(0)


def oks(found: np.ndarray, truth: np.ndarray, areas: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Object keypoint similarity of people one by one; the shapes broadcast.

    Args:
        found: ``(..., K, 2)``.
        truth: ``(..., K, 3)`` x, y, v; points with v = 0 are left out.
        areas: ``(...)`` of the people.
        sigmas: ``(K,)``.

    Returns:
        ``(...)`` in [0, 1], NaN for people without a point.

    Example:
        >>> truth = np.array([[[0.0, 0, 2], [10, 0, 2]]])
        >>> found = oks(truth[..., :2] + 1, truth, np.array([100.0]), np.array([0.1, 0.1]))
        >>> round(float(found[0]), 4)
        0.7788
    """
    squared = ((found - truth[..., :2]) ** 2).sum(-1)
    close = np.exp(-squared / ((2 * sigmas) ** 2 * 2 * (areas[..., None] + _EPS)))
    seen = truth[..., 2] > 0
    count = seen.sum(-1)
    total = (close * seen).sum(-1)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def keep_distinct(
    points: np.ndarray, scores: np.ndarray, areas: np.ndarray, sigmas: np.ndarray
) -> np.ndarray:
    """Non-maximum suppression by OKS among the people of one picture.

    Args:
        points: ``(n, K, 2 or more)``.
        scores: ``(n,)``.
        areas: ``(n,)``.
        sigmas: ``(K,)``.

    Returns:
        Places of those that stay, the surest first.
    """
    order = np.argsort(-scores, kind="stable")
    spots, area = points[order, :, :2], areas[order]
    every = np.concatenate([spots, np.ones((*spots.shape[:2], 1))], -1)
    alike = oks(spots[None], every[:, None], (area[:, None] + area[None]) / 2, sigmas) > _SAME
    kept: list[int] = []
    for n in range(len(order)):  # whether one goes depends on whether a surer one stayed
        if not alike[kept, n].any():
            kept.append(n)
    return order[kept]


class PoseScores:
    """Everything about the found points of a set, collected by batches.

    Args:
        truth: The annotated people.
        boxed: Whose boxes are looked at: some of the same people, or detections, whose points are
            none.
        kinds: The key points.
    """

    def __init__(self, truth: People, boxed: People, kinds: KeypointSet) -> None:
        self.truth, self.boxed, self.kinds = truth, boxed, kinds
        self._rows: list[np.ndarray] = []
        self._points: list[np.ndarray] = []

    def add(self, rows: np.ndarray, points: np.ndarray) -> None:
        """Take a batch.

        Args:
            rows: ``(B,)`` places among the boxed people.
            points: ``(B, K, 3)`` x, y in pixels of the picture, and score.
        """
        self._rows.append(rows)
        self._points.append(points)

    def summary(self, parts: bool = True) -> dict[str, float]:
        """All scores.

        ``ap``, ``ar`` … of all points, ``ap_<part>``, ``ar_<part>``, and what needs no ranking:
        ``oks``, the mean over people, ``pck``, the share of points within 0.05 of the box's longer
        side, and ``error``, their mean distance in shares of it. The last three are NaN where the
        boxes are not annotated.

        Args:
            parts: Whether to score the parts by themselves.
        """
        shape = (0, len(self.kinds.names), 3)
        rows = np.concatenate(self._rows) if self._rows else np.zeros(0, np.int64)
        points = np.concatenate(self._points) if self._points else np.zeros(shape)
        photo, found, sure = rows, points, np.zeros(0)
        if len(rows):
            photo, found, sure = self._ranked(rows, points)
        sigmas, areas = np.array(self.kinds.sigmas), extents(found, self.kinds)
        scores = average_precision(self.truth, photo, found, sure, sigmas, areas)
        if parts:
            for name, places in self.kinds.parts.items():
                if name == "wholebody":
                    continue
                part = replace(self.truth, points=self.truth.points[:, places])
                one = average_precision(part, photo, found[:, places], sure, sigmas[places], areas)
                scores |= {f"ap_{name}": one["ap"], f"ar_{name}": one["ar"]}
        return scores | self._distances(rows, points, sigmas)

    def _ranked(
        self, rows: np.ndarray, points: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Score the people, leave out doubles: pictures, points, scores."""
        sure = points[..., 2] > _SURE
        count = sure.sum(1)
        mean = (points[..., 2] * sure).sum(1) / np.maximum(count, 1)
        score = self.boxed.scores[rows] * np.where(count > 0, mean, 0.0)
        photo = self.boxed.photo[rows]
        area = self.boxed.boxes[rows, 2] * self.boxed.boxes[rows, 3] * 1.25**2
        sigmas = np.array(self.kinds.sigmas)
        kept = []
        for n in np.unique(photo):
            here = np.flatnonzero(photo == n)
            kept.append(here[keep_distinct(points[here], score[here], area[here], sigmas)])
        order = np.concatenate(kept)
        return photo[order], points[order], score[order]

    def _distances(
        self, rows: np.ndarray, points: np.ndarray, sigmas: np.ndarray
    ) -> dict[str, float]:
        truth = self.boxed.take(rows)
        side = truth.boxes[:, 2:].max(1)
        away = np.linalg.norm(points[..., :2] - truth.points[..., :2], axis=-1) / side[:, None]
        away = away[truth.points[..., 2] > 0]
        similar = oks(points[..., :2], truth.points, truth.areas, sigmas)
        similar = similar[~np.isnan(similar)]
        if not len(away):
            return dict.fromkeys(("oks", "pck", "error"), float("nan"))
        return {
            "oks": float(similar.mean()), "pck": float((away < _NEAR).mean()),
            "error": float(away.mean()),
        }  # fmt: skip
