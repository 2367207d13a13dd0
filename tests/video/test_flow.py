from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.video.flow import LucasKanade, PWCNet, correlation, make_flow
from cohobate.video.warp import backward_warp


def picture(seed: int = 0, height: int = 48, width: int = 64) -> Tensor:
    """Smooth texture."""
    noise = torch.rand(1, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("mode", ["official", "aligned"])
def test_pwc_gives_the_flow_of_the_official_code(
    mode: str,
    hash_fill: Callable[[nn.Module], nn.Module],
    golden: Callable[[str], dict[str, Any]],
) -> None:
    layout, z = golden("pwc_state_dict_layout"), golden("pwc_flow_s23")
    network = hash_fill(PWCNet(official_warp=mode == "official"))
    own = [(k, ",".join(map(str, v.shape))) for k, v in network.state_dict().items()]
    assert own == list(zip(layout["names"], layout["shapes"], strict=True))
    assert sum(p.numel() for p in network.parameters()) == 9_374_274
    frames = z["frames_u8"].float() / 255
    with torch.no_grad():
        flow = network(frames[:, 0], frames[:, 1])
    torch.testing.assert_close(flow, z[f"flow_{mode}"], rtol=1e-3, atol=1e-3)


def test_pairs_are_the_single_flows(hash_fill: Callable[[nn.Module], nn.Module]) -> None:
    frames = torch.stack([picture(seed) for seed in range(3)], 1)
    for network in (hash_fill(PWCNet()), LucasKanade()):
        with torch.no_grad():
            both = network.pairs(frames, ((0, 2), (1, 0)))
            torch.testing.assert_close(both[:, 0], network(frames[:, 0], frames[:, 2]))
            torch.testing.assert_close(both[:, 1], network(frames[:, 1], frames[:, 0]))


def test_correlation_against_a_loop() -> None:
    one, other = torch.randn(2, 1, 5, 6, 7).double().unbind(0)
    found = correlation(one, other)
    for c in (0, 13, 40, 80):
        dx, dy = c % 9 - 4, c // 9 - 4
        for y in range(6):
            for x in range(7):
                inside = 0 <= y + dy < 6 and 0 <= x + dx < 7
                want = (one[0, :, y, x] * other[0, :, y + dy, x + dx]).mean() if inside else 0.0
                assert found[0, c, y, x].item() == pytest.approx(float(want))


@pytest.mark.parametrize(("dx", "dy"), [(0.0, 0.0), (1.5, 0.0), (-4.0, 2.0)])
def test_lucas_kanade_finds_a_shift(dx: float, dy: float) -> None:
    first = picture()
    shift = torch.tensor([-dx, -dy])[None, :, None, None].expand(1, 2, 48, 64)
    flow = LucasKanade()(first, backward_warp(first, shift))[0, :, 8:-8, 8:-8]
    assert flow[0].median().item() == pytest.approx(dx, abs=0.15)
    assert flow[1].median().item() == pytest.approx(dy, abs=0.15)


def test_lucas_kanade_passes_gradients_on_and_is_calm_without_texture() -> None:
    frames = torch.stack([picture(0), picture(1)], 1).requires_grad_()
    LucasKanade().pairs(frames, ((0, 1),)).square().mean().backward()
    assert frames.grad is not None
    assert frames.grad.isfinite().all()
    assert frames.grad.abs().max() > 0
    assert LucasKanade()(torch.zeros(1, 3, 9, 10), torch.zeros(1, 3, 9, 10)).abs().max() == 0


def test_raft_takes_any_size_from_a_local_file(tmp_path: Path) -> None:
    from torchvision.models.optical_flow import raft_small

    torch.save(raft_small(weights=None).state_dict(), tmp_path / "raft.pth")
    network = make_flow("raft", tmp_path / "raft.pth").eval()
    with torch.no_grad():
        assert network.pairs(torch.rand(1, 2, 3, 40, 36), ((0, 1),)).shape == (1, 1, 2, 40, 36)


def test_the_released_pwc_file_lacks_a_prefix(tmp_path: Path) -> None:
    source = PWCNet()
    torch.save(source.moduleNetwork.state_dict(), tmp_path / "network-default.pytorch")
    loaded = make_flow("pwc", tmp_path / "network-default.pytorch")
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: no weights for"):
        make_flow("pwc", tmp_path / "a.pth")
    with pytest.raises(InputError, match="has no weights"):
        make_flow("lucas-kanade", tmp_path / "a.pth")
    with pytest.raises(InputError, match="needs a file"):
        make_flow("raft")
