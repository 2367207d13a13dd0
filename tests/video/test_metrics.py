from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.video.metrics import frame_scores, load_lpips, psnr


@pytest.mark.parametrize("name", ["metrics_s16", "metrics_s17"])
@pytest.mark.parametrize("border", [0, 20])
def test_psnr_and_ssim_of_the_official_code(
    golden: Callable[[str], dict[str, Any]], name: str, border: int
) -> None:
    z = golden(name)
    one, other = (z[key].permute(2, 0, 1)[None].double() / 255 for key in ("pred", "target"))
    found = frame_scores(one, other, border=border, ring=1)
    assert found["psnr"].item() == pytest.approx(float(z[f"psnr_border{border}"]), rel=1e-5)
    assert found["ssim"].item() == pytest.approx(float(z[f"ssim_border{border}"]), rel=1e-4)


def test_an_error_on_the_border_counts_there() -> None:
    truth = torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    worse = truth.clone()
    worse[..., :4, :] = 0
    found, right = frame_scores(worse, truth), frame_scores(truth, truth)
    assert found["psnr_inside"] == right["psnr_inside"] == right["psnr"] == 100
    assert found["psnr_rows"] < found["psnr_ring"] < found["psnr"] < 100
    assert found["ssim_rows"] < found["ssim_ring"] < 1


def test_ends_and_middle_are_those_frames() -> None:
    truth = torch.zeros(3, 3, 16, 16)
    off = truth + torch.tensor([0.1, 0.2, 0.3])[:, None, None, None]
    each = psnr(255 * off, truth)
    found = frame_scores(off, truth)
    assert found["psnr_middle"].item() == pytest.approx(each[1].item(), rel=1e-3)
    assert found["psnr_ends"].item() == pytest.approx(each[[0, 2]].mean().item(), rel=1e-2)


def test_lpips_takes_a_local_file(tmp_path: Path) -> None:
    from torchvision.models import alexnet

    torch.manual_seed(0)
    weights = alexnet(weights=None).state_dict()
    torch.save(weights, tmp_path / "alexnet.pth")
    judge = load_lpips(tmp_path / "alexnet.pth")
    taken = judge.net.state_dict()
    assert torch.equal(taken["slice1.0.weight"], weights["features.0.weight"])
    assert torch.equal(taken["slice5.10.bias"], weights["features.10.bias"])
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert judge(x, x).abs().max() == 0
    assert judge(x, -x).item() > 0
    torch.save({"a": x}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth: no weights for"):
        load_lpips(tmp_path / "other.pth")
