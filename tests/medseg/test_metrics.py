from __future__ import annotations

import math

import pytest
import torch

from cohobate.medseg.metrics import Scores

NAMES = ["background", "liver", "left kidney"]


def cube(start: int, stop: int, value: int = 1) -> torch.Tensor:
    ids = torch.zeros(20, 20, 20, dtype=torch.uint8)
    ids[start:stop, 5:15, 5:15] = value
    return ids


def test_closed_forms_in_mm_and_voxels():
    # the prediction is the label moved by 2 voxels of 3 mm along the first axis
    for in_voxels, unit in ((False, 3.0), (True, 1.0)):
        scores = Scores(NAMES[:2], in_voxels=in_voxels)
        scores.add(cube(4, 14), cube(6, 16), (3.0, 1.0, 1.0))
        found = scores.summary()
        assert found["dice"] == pytest.approx(0.8)
        assert found["dice/liver"] == pytest.approx(0.8)
        assert found["hd95"] == pytest.approx(2 * unit)
        assert 0 < found["msd"] < 2 * unit
        assert found["dice_excluded"] == found["hd95_excluded"] == 0


def test_absent_classes_are_counted_not_averaged():
    scores = Scores(NAMES)
    scores.add(cube(4, 14), cube(4, 14), (1, 1, 1))  # no kidney in either
    scores.add(cube(4, 14), cube(4, 14) + cube(16, 19, 2), (1, 1, 1))  # kidney missed
    found = scores.summary()
    assert found["dice/liver"] == 1.0
    assert found["dice/left_kidney"] == 0.0
    assert found["dice_excluded"] == 1
    assert found["dice"] == pytest.approx(2 / 3)
    assert found["hd95"] == 0.0
    assert found["hd95_excluded"] == 2
    assert math.isnan(found["hd95/left_kidney"])


def test_distances_can_be_left_out():
    scores = Scores(NAMES, distances=False)
    scores.add(cube(4, 14), cube(4, 14), (1, 1, 1))
    assert set(scores.summary()) == {"dice", "dice_excluded", "dice/liver", "dice/left_kidney"}


def test_nothing_scored_is_no_error():
    assert Scores(NAMES).summary() == {}
