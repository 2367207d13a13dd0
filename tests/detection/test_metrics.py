from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cohobate.detection.data import Category, Picture
from cohobate.detection.metrics import CocoScores

CATEGORIES = [Category(7, "a"), Category(90, "b")]


def picture(boxes, labels, **more):
    return Picture(
        "x",
        100,
        100,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        **more,
    )


def scored(*entries):
    scores = CocoScores(CATEGORIES)
    for image, labels, boxes, confidence in entries:
        scores.add(
            image,
            torch.tensor(labels),
            torch.tensor(boxes).reshape(-1, 4),
            torch.tensor(confidence),
        )
    return scores.summary()


def test_perfect_detections():
    image = picture([[10, 10, 50, 50], [60, 60, 90, 90]], [0, 1])
    found = scored((image, [0, 1], [[10.0, 10, 50, 50], [60, 60, 90, 90]], [0.9, 0.8]))
    assert found["ap"] == pytest.approx(1.0)
    assert found["iou"] == pytest.approx(1.0)
    assert math.isnan(found["ap_large"])


def test_the_threshold_of_overlap_counts():
    # IoU 0.6: right at 0.50, 0.55 and 0.60 of the ten thresholds
    found = scored((picture([[0, 0, 10, 10]], [0]), [0], [[0.0, 0, 10, 6.001]], [0.9]))
    assert found["ap50"] == pytest.approx(1.0)
    assert found["ap75"] == pytest.approx(0.0)
    assert found["ap"] == pytest.approx(0.3)
    assert found["iou"] == pytest.approx(0.6, abs=1e-3)


def test_a_wrong_class_is_wrong():
    found = scored((picture([[0, 0, 10, 10]], [0]), [1], [[0.0, 0, 10, 10]], [0.9]))
    assert found["ap"] == 0.0
    assert found["iou"] == 0.0


def test_detections_in_a_crowd_are_not_counted_against_it():
    crowd = {"crowd": np.array([[50, 50, 100, 100]], np.float32), "crowd_labels": np.array([0])}
    image = picture([[0, 0, 10, 10]], [0], **crowd)
    boxes = [[60.0, 60, 70, 70], [0, 0, 10, 10]]
    assert scored((image, [0, 0], boxes, [0.9, 0.8]))["ap"] == pytest.approx(1.0)
    assert scored((picture([[0, 0, 10, 10]], [0]), [0, 0], boxes, [0.9, 0.8]))["ap"] < 0.6


def test_no_objects_and_no_detections():
    nothing = scored((picture([], []), [], [], []))
    assert math.isnan(nothing["ap"])
    assert math.isnan(nothing["iou"])
    missed = scored((picture([[0, 0, 10, 10]], [0]), [], [], []))
    assert missed["ap"] == 0.0
    assert missed["iou"] == 0.0


def test_the_overlap_takes_each_detection_once():
    image = picture([[0, 0, 10, 10], [0, 0, 10, 9]], [0, 0])
    found = scored((image, [0], [[0.0, 0, 10, 10]], [0.9]))
    assert found["iou"] == pytest.approx(0.5)
