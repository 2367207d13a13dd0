from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cohobate.avviolence.metrics import bag_metrics, frame_metrics, video_scores
from cohobate.core.testing import golden


def test_scores_and_both_average_precisions_match_the_official_evaluation(
    golden_folder: Path,
) -> None:
    z = golden(golden_folder / "evaluate_s10.npz")
    scores = [video_scores(z[f"av_logits_{i}"].numpy()) for i in range(int(z["n_videos"]))]
    np.testing.assert_allclose(np.concatenate(scores), z["snippet_scores"], atol=1e-6)
    ends = np.cumsum([16 * len(s) for s in scores])[:-1]
    found = frame_metrics(scores, np.split(z["gt_frames"].numpy(), ends))
    assert found["ap"] == pytest.approx(float(z["ap_trapezoid"]), abs=1e-5)
    assert found["ap_step"] == pytest.approx(float(z["ap_step"]), abs=1e-5)


def test_what_the_truth_does_not_define_is_left_out() -> None:
    assert frame_metrics([np.array([0.2, 0.4])], [np.zeros(32)]) == {}
    assert set(frame_metrics([np.array([0.2])], [np.ones(16)])) == {"ap", "ap_step"}


def test_area_of_videos_is_their_mean() -> None:
    truth = np.repeat([1.0, 0.0], 16)
    right, wrong = np.array([0.9, 0.1]), np.array([0.1, 0.9])
    found = frame_metrics([right, wrong, wrong], [truth, truth, np.zeros(32)])
    assert found["video_auc"] == 0.5


def test_truth_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="31 frames of truth for 2 snippets"):
        frame_metrics([np.array([0.1, 0.2])], [np.zeros(31)])


def test_bag_loss_is_finite_at_certainty() -> None:
    found = bag_metrics(np.array([1.0, 0.5]), np.array([0.0, 1.0]))
    assert found["bag_loss"] == pytest.approx((-np.log(1e-7) - np.log(0.5)) / 2, rel=1e-6)
    assert found["bag_ap"] == 0.5
