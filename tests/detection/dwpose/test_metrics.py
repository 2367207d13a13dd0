from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from cohobate.detection.dwpose import synthetic
from cohobate.detection.dwpose.keypoints import BODY, WHOLEBODY, by_names, to_openpose
from cohobate.detection.dwpose.metrics import (
    STATS,
    PoseScores,
    average_precision,
    extents,
    keep_distinct,
)
from cohobate.detection.dwpose.people import read_people


def test_key_points_of_the_official_code(recorded):
    record = recorded("wholebody_meta")
    assert WHOLEBODY.names == record["names"].tolist()
    assert WHOLEBODY.flip == record["flip_indices"].tolist()
    assert WHOLEBODY.sigmas == pytest.approx(record["sigmas"].tolist())
    assert WHOLEBODY.skeleton == record["skeleton"].tolist()
    halves = record["body_half"].tolist()
    assert WHOLEBODY.upper == [n for n, half in enumerate(halves) if half == "upper"]
    assert WHOLEBODY.lower == [n for n, half in enumerate(halves) if half == "lower"]


def test_openpose_order_of_the_official_code(recorded):
    record = {k: v.numpy() for k, v in recorded("openpose_map").items()}
    points, scores = to_openpose(record["keypoints"], record["scores"])
    np.testing.assert_allclose(points, record["out_keypoints"], rtol=1e-12)
    np.testing.assert_allclose(scores, record["out_scores"], rtol=1e-12)


@pytest.mark.parametrize("part", ["body", "foot", "face", "lefthand", "righthand", "wholebody"])
@pytest.mark.parametrize("case", [0, 1])
def test_average_precision_of_the_official_code(recorded, mini, case, part):
    record = recorded(f"ap_{case}")
    people, kinds = read_people(mini / "wholebody.json", mini / "images")
    assert kinds is WHOLEBODY
    places = WHOLEBODY.parts[part]
    place = {photo.id: n for n, photo in enumerate(people.photos)}
    photo = np.array([place[int(n)] for n in record["pred_image_id"]])
    found = average_precision(
        replace(people, points=people.points[:, places]), photo,
        record["pred_keypoints"].numpy()[:, places], record["pred_score"].numpy(),
        np.array(WHOLEBODY.sigmas)[places], extents(record["pred_keypoints"].numpy(), WHOLEBODY),
    )  # fmt: skip
    for name, wanted in zip(STATS, record[f"stats_{part}"].tolist(), strict=True):
        if wanted == -1:
            assert math.isnan(found[name]), name
        else:
            assert found[name] == pytest.approx(wanted, abs=1e-6), name


def test_doubles_are_one_person():
    draw = np.random.default_rng(0)
    one, other = draw.uniform(0, 100, (2, 17, 2))
    points = np.stack([one, one + 0.1, other])
    kept = keep_distinct(points, np.array([0.5, 0.9, 0.7]), np.full(3, 1e4), np.array(BODY.sigmas))
    assert kept.tolist() == [1, 2]


def test_nobody_found_and_nobody_there():
    people = synthetic.figures(3, 0)
    nothing = PoseScores(people, people, synthetic.KINDS).summary()
    assert nothing["ap"] == 0.0
    hidden = people.points.copy()
    hidden[..., 2] = 0
    blank = replace(people, points=hidden)
    scores = PoseScores(blank, blank, synthetic.KINDS)
    scores.add(np.arange(3), np.ones((3, 33, 3)))
    found = scores.summary()
    assert math.isnan(found["ap"])
    assert math.isnan(found["oks"])


def test_perfect_points():
    people = synthetic.figures(4, 1)
    scores = PoseScores(people, people, synthetic.KINDS)
    points = people.points.copy()
    points[..., 2] = 1.0
    scores.add(np.arange(4), points)
    found = scores.summary()
    for name in ("ap", "ar", "ap_body", "ap_foot", "ap_lefthand", "oks", "pck"):
        assert found[name] == pytest.approx(1.0), name
    assert found["error"] == 0.0


def test_any_names_make_a_set():
    kinds = by_names(["tip", "left wing", "right wing"], [(0, 1), (0, 2)])
    assert kinds.flip == [0, 2, 1]
    assert kinds.parts == {"wholebody": [0, 1, 2]}
    assert by_names(BODY.names, []) is BODY
