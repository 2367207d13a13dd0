from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cohobate.video.timing import encoding, row_maps, row_times


def test_maps_of_the_official_code_where_they_are_finite(
    golden: Callable[[str], dict[str, Any]],
) -> None:
    compared = 0
    for key, want in golden("time_maps_s1").items():
        kind, height, reference, reverse = key.split("_")
        rows, direction = int(height[1:]), int(reverse[3:])
        t = torch.tensor([float(reference[1:]) / (rows - 1)])
        tau = row_times(rows)[:, direction : direction + 1]
        if kind == "dist":
            found = (tau[0, 0] - t).expand_as(want)
        else:
            found = torch.cat(row_maps(tau, t)[1:], 1)[0].expand_as(want)
        assert found.isfinite().all()
        finite = want.isfinite()
        torch.testing.assert_close(found[finite], want[finite], rtol=1e-4, atol=1e-5, msg=key)
        compared += int(finite.any())
    assert compared == 24


@pytest.mark.parametrize("t", [0.0, 1e-6, 0.3, 1.0])
def test_every_time_gives_finite_maps_in_range(t: float) -> None:
    for direction in range(2):
        maps = row_maps(row_times(17)[:, direction : direction + 1], torch.tensor([t]))
        for part in maps:
            assert part.isfinite().all()
            assert part.min() >= 0
            assert part.max() <= 1
    assert encoding(row_times(17), torch.tensor([t])).abs().max() <= 1


def test_maps_of_a_crop_are_the_crop_of_the_maps() -> None:
    whole, t = row_times(40), torch.tensor([0.3, 0.8])
    crop = row_times(40, torch.tensor([0, 11]), 13)
    for sample, top in enumerate((0, 11)):
        torch.testing.assert_close(crop[sample], whole[0, :, top : top + 13])
    found = encoding(crop, t)[1]
    torch.testing.assert_close(found, encoding(whole, t[1:])[0, :, 11:24])


def test_rows_past_the_frame_go_on_in_time() -> None:
    times = row_times(5, 0, 7)[0, :, :, 0]
    torch.testing.assert_close(times[0, 4:], torch.tensor([1.0, 1.25, 1.5]))
    torch.testing.assert_close(times[1, 4:], torch.tensor([0.0, -0.25, -0.5]))
