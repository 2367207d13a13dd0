from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cohobate.video.warp import backward_warp, intermediate_flows, masked_warp, splat

Golden = Callable[[str], dict[str, Any]]


@pytest.mark.parametrize("name", ["backward_warp_s2", "backward_warp_s4"])
def test_backward_warps_of_the_official_code(golden: Golden, name: str) -> None:
    z = golden(name)
    image, flow = z["image"].requires_grad_(), z["flow"].requires_grad_()
    out = backward_warp(image, flow)
    torch.testing.assert_close(out, z["net_warp"], rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    torch.testing.assert_close(image.grad, z["grad_image"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flow.grad, z["grad_flow"], rtol=1e-4, atol=1e-5)
    for mode in ("official", "aligned"):
        masked, _ = masked_warp(image, flow, official=mode == "official")
        torch.testing.assert_close(masked, z[f"masked_warp_{mode}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cfr_s5", "cfr_s8"])
def test_flow_reversal_of_the_official_code(golden: Golden, name: str) -> None:
    z = golden(name)
    forward, backward = z["flow_01"].requires_grad_(), z["flow_10"].requires_grad_()
    sums, weights = splat(z["splat_input"], forward)
    torch.testing.assert_close(sums, z["splat_sum"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.expand_as(sums), z["splat_norm"], rtol=1e-4, atol=1e-5)
    found = intermediate_flows(forward, backward, z["t"])
    torch.testing.assert_close(found.first, z["flow_t0"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.second, z["flow_t1"], rtol=1e-4, atol=1e-5)
    (found.first.square() + 2 * found.second.square()).mean().backward()
    torch.testing.assert_close(forward.grad, z["grad_flow_01"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(backward.grad, z["grad_flow_10"], rtol=1e-4, atol=1e-6)


def test_splat_against_a_loop() -> None:
    torch.manual_seed(0)
    values, flow = torch.rand(1, 2, 5, 6), 3 * torch.randn(1, 2, 5, 6)
    want = torch.zeros(3, 5, 6, dtype=torch.double)
    for y in range(5):
        for x in range(6):
            px, py = x + flow[0, 0, y, x].double(), y + flow[0, 1, y, x].double()
            for column in (px.floor(), px.floor() + 1):
                for row in (py.floor(), py.floor() + 1):
                    if 0 <= column < 6 and 0 <= row < 5:
                        w = torch.exp(-((px - column) ** 2) - (py - row) ** 2)
                        want[:2, int(row), int(column)] += w * values[0, :, y, x]
                        want[2, int(row), int(column)] += w
    sums, weights = splat(values, flow)
    torch.testing.assert_close(
        torch.cat((sums, weights), 1)[0].double(), want, rtol=1e-5, atol=1e-6
    )


def test_several_flows_at_once_are_the_single_warps() -> None:
    torch.manual_seed(0)
    image, flows = torch.rand(2, 3, 7, 9), 2 * torch.randn(2, 6, 7, 9)
    single = [backward_warp(image, flow) for flow in flows.split(2, 1)]
    torch.testing.assert_close(backward_warp(image, flows), torch.cat(single, 1))


def test_zero_flow_is_the_identity_unless_official() -> None:
    image, none = torch.rand(1, 3, 8, 10), torch.zeros(1, 2, 8, 10)
    out, inside = masked_warp(image, none)
    torch.testing.assert_close(out, image)
    assert inside.min() == 1
    official, inside = masked_warp(image, none, official=True)
    assert (inside[..., 1:-1, 1:-1] == 1).all()
    assert official[..., 0, :].abs().max() == 0
    assert not torch.allclose(official[..., 1:-1, 1:-1], image[..., 1:-1, 1:-1], atol=1e-3)


def test_half_precision_images_are_sampled_at_single_precision_places() -> None:
    image = torch.arange(4000.0).view(1, 1, 1, 4000).bfloat16()
    out = backward_warp(image, torch.zeros(1, 2, 1, 4000))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, image)
    assert splat(image, torch.zeros(1, 2, 1, 4000, dtype=torch.bfloat16))[0].dtype == torch.float32
