"""Metrics against scikit-learn, torchmetrics, and a slow all-point average precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.detection import MeanAveragePrecision

from cohobate.medseg.tsddnet.metrics import Scores, average_precision, diagnosis, localisation
from cohobate.medseg.tsddnet.network import Detections
from cohobate.medseg.tsddnet.selection import iou


def case(seed: int, images: int = 20, count: int = 6):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(images, 2, generator=g) * 40
    truth = torch.cat([low, low + 10 + 20 * torch.rand(images, 2, generator=g)], 1)
    boxes = truth[:, None] + 3 * torch.randn(images, count, 4, generator=g).clamp(-1.5, 1.5)
    scores = torch.rand(images, count, generator=g)
    scores[torch.rand(images, count, generator=g) < 0.2] = -1.0  # padding
    return Detections(boxes, scores), truth


def slow_ap(found: Detections, truth: torch.Tensor, threshold: float) -> float:
    """All-point interpolation, written as a loop."""
    pairs = sorted(
        [(found.scores[i, j].item(), i, j) for i, j in (found.scores >= 0).nonzero().tolist()],
        key=lambda p: -p[0],
    )
    taken, hits = set(), []
    for _, i, j in pairs:
        hit = i not in taken and iou(found.boxes[i, j], truth[i]).item() >= threshold
        hits.append(hit)
        if hit:
            taken.add(i)
    true = np.cumsum(hits)
    precision = true / np.arange(1, len(hits) + 1)
    recall = true / len(truth)
    area, last = 0.0, 0.0
    for r in np.unique(recall[recall > 0]):
        area += (r - last) * precision[recall >= r].max()
        last = r
    return area


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_the_area_under_the_curve(seed):
    found, truth = case(seed)
    got = average_precision(found, truth)
    assert got["ap50"] == pytest.approx(slow_ap(found, truth, 0.5), abs=1e-6)
    each = [slow_ap(found, truth, t) for t in np.linspace(0.5, 0.95, 10)]
    assert got["ap"] == pytest.approx(np.mean(each), abs=1e-6)


def test_average_precision_is_torchmetrics_at_the_same_recalls():
    found, truth = case(7)
    dense = [(k + 0.5) / len(truth) for k in range(len(truth))]
    reference = MeanAveragePrecision(rec_thresholds=dense, backend="faster_coco_eval")
    label = torch.ones(1, dtype=torch.long)
    for boxes, scores, one in zip(*found, truth, strict=True):
        real = scores >= 0
        reference.update(
            [{"boxes": boxes[real], "scores": scores[real], "labels": label.expand(real.sum())}],
            [{"boxes": one[None], "labels": label}],
        )
    want = reference.compute()
    got = average_precision(found, truth)
    assert (got["ap50"], got["ap"]) == pytest.approx((want["map_50"].item(), want["map"].item()))


@pytest.mark.parametrize("seed", range(3))
def test_diagnosis_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    label, p = rng.integers(0, 2, 50), rng.random(50).astype(np.float32)
    hard = p > 0.5
    want = {
        "accuracy": sk.accuracy_score(label, hard),
        "sensitivity": sk.recall_score(label, hard),
        "specificity": sk.recall_score(label, hard, pos_label=0),
        "precision": sk.precision_score(label, hard),
        "f1": sk.f1_score(label, hard),
        "auc": sk.roc_auc_score(label, p),
    }
    got = diagnosis(torch.from_numpy(p), torch.from_numpy(label))
    assert got == pytest.approx(want, abs=1e-6)


def test_one_class_has_no_auc():
    assert "auc" not in diagnosis(torch.tensor([0.1, 0.2]), torch.tensor([0, 0]))


def test_corloc_counts_overlaps_of_a_half():
    truth = torch.tensor([[0.0, 0, 10, 10]]).repeat(4, 1)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4], [20, 20, 30, 30]])
    assert localisation(boxes, truth) == {"miou": pytest.approx(1.9 / 4), "corloc": 0.5}


def test_images_without_a_true_box_are_diagnosed_only():
    scores, (found, truth) = Scores(), case(1, images=4)
    truth[1] = float("nan")
    p = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])
    scores.add(found, found.boxes[:, 0], p, truth, torch.tensor([1, 0, 1, 1]))
    summary = scores.summary()
    keep = torch.tensor([0, 2, 3])
    assert summary["miou"] == pytest.approx(localisation(found.boxes[keep, 0], truth[keep])["miou"])
    assert summary["accuracy"] == 0.75
    assert "ap50" not in scores.summary(precision=False)
