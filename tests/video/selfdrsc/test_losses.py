from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cohobate.video.perceptual import VGGFeatures
from cohobate.video.selfdrsc import losses
from cohobate.video.timing import row_times

Golden = Callable[[str], dict[str, Any]]
STAGES = [
    "selfsup_stage1_s50", "selfsup_stage1_s50_aligned", "selfsup_stage1_s60",
    "selfsup_stage2_s70", "selfsup_stage2_s70_aligned",
]  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_reconstructions_loss_and_gradients_of_the_official_code(golden: Golden, name: str) -> None:
    z = golden(name)
    flows = torch.stack([z[f"flow_{a}{b}"] for a, b in losses.PAIRS], 1).requires_grad_()
    frames = z["gs"].requires_grad_()
    levels = [z[f"net_flow_{k}"].requires_grad_() for k in range(4)]
    margin, height = int(z["diff_patch"]) // 2, int(z["crop_h"])
    times = losses.centre(row_times(int(z["H_full"]), int(z["top"]), height), margin)
    target = torch.tensor([int(z["index"]) / 8])
    made = losses.reconstruct(
        frames, flows, times.expand(len(frames), -1, -1, -1), target.expand(len(frames)),
        official_warp=not bool(z["align_corners"]),
    )  # fmt: skip
    for k, key in enumerate(("rs_t2b", "rs_b2t", "rs_t2b_mid", "rs_b2t_mid")):
        torch.testing.assert_close(made.images[:, k], z[key], rtol=1e-4, atol=1e-5)
    inputs = losses.centre(z["rs_input"], margin)
    terms = losses.self_supervised(made, inputs, None)
    if "teacher_gs" in z:
        terms |= losses.self_distillation(frames, z["teacher_gs"], None)
    smooth = 0.1 * sum(losses.variation(flow) for flow in levels)
    total = sum(terms.values()) + smooth
    assert isinstance(total, Tensor)
    assert sum(terms.values()).item() == pytest.approx(float(z["loss_charbonnier"]), rel=1e-4)
    assert smooth.item() == pytest.approx(float(z["loss_variation"]), rel=1e-4)
    assert total.item() == pytest.approx(float(z["loss_total"]), rel=1e-4)
    total.backward()
    grads = {"grad_gs": frames.grad, "grad_flow_02": flows.grad[:, 0],
             "grad_flow_01": flows.grad[:, 2], "grad_net_flow_0": levels[0].grad}  # fmt: skip
    for key, found in grads.items():
        assert (found - z[key]).norm() < 1e-4 * z[key].norm(), key
        # single pixels where x is nearly y: there the Charbonnier bends within 3e-5
        assert (found - z[key]).abs().max() < 5e-4 * z[key].abs().max(), key


def test_single_losses_of_the_official_code(golden: Golden) -> None:
    z = golden("losses_s12")
    found = losses.charbonnier(z["x"], z["y"])
    assert found.item() == pytest.approx(float(z["charbonnier"]), rel=1e-4)
    same = losses.charbonnier(z["x"], z["x"])
    assert same.item() == pytest.approx(float(z["charbonnier_eq"]), rel=1e-4)
    assert losses.variation(z["flow"]).item() == pytest.approx(float(z["variation"]), rel=1e-4)


def test_perceptual_loss_of_the_official_code(
    golden: Golden, hash_fill: Callable[[nn.Module], nn.Module]
) -> None:
    z = golden("perceptual_s11")
    features = hash_fill(VGGFeatures())
    prediction = z["pred"].requires_grad_()
    loss = losses.perceptual(prediction, z["target"], features)
    assert loss.item() == pytest.approx(float(z["loss"]), rel=1e-4)
    loss.backward()
    scale = z["grad_pred"].abs().max().item()
    torch.testing.assert_close(prediction.grad, z["grad_pred"], rtol=1e-4, atol=1e-4 * scale)


def test_charbonnier_counts_valid_pixels_only() -> None:
    x, valid = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([1.0, 0.0, 1.0])
    assert losses.charbonnier(x, torch.zeros(3), valid).item() == pytest.approx(2.0)
    assert losses.charbonnier(x, torch.zeros(3), torch.zeros(3)).item() == 0.0


def test_charbonnier_keeps_the_inputs_type() -> None:
    x = torch.rand(8, dtype=torch.bfloat16)
    assert losses.charbonnier(x, x).dtype == torch.bfloat16


def test_losses_pass_gradcheck() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(2, 1, 3, 4, 5, dtype=torch.double).unbind(0)
    x.requires_grad_()
    # single precision inside: coarse steps and tolerance
    check = {"eps": 1e-3, "atol": 1e-3}
    assert torch.autograd.gradcheck(lambda x: losses.charbonnier(x, y), x, **check)
    assert torch.autograd.gradcheck(losses.variation, x[:, :2].detach().requires_grad_(), **check)


def pan(height: int, width: int, speed: float) -> Callable[[Tensor], Tensor]:
    """A scene that moves to the right: its picture at the time of each row, ``(1, 3, H, W)``."""
    phase = torch.tensor([0.0, 1.0, 2.0])[:, None, None]

    def at(time: Tensor) -> Tensor:
        x = torch.arange(width) - speed * time.reshape(-1, 1).expand(height, 1)
        y = torch.arange(height)[:, None].expand(height, width)
        return (0.5 + 0.25 * torch.sin(0.35 * x + phase) + 0.2 * torch.cos(0.3 * y + phase))[None]

    return at


@pytest.mark.parametrize("target", [0.25, 0.5])
def test_true_frames_and_flows_reconstruct_both_inputs(target: float) -> None:
    height, width, speed = 32, 40, 5.0
    scene, t = pan(height, width, speed), torch.tensor([target])
    frames = torch.stack([scene(torch.full((height,), s)) for s in (0.0, target, 1.0)], 1)
    moments = (0.0, target, 1.0)
    flows = torch.stack(
        [torch.tensor([speed * (moments[b] - moments[a]), 0.0]) for a, b in losses.PAIRS]
    )[None, :, :, None, None].expand(1, 6, 2, height, width)
    times = row_times(height)
    truth = torch.stack([scene(times[0, d, :, 0]) for d in range(2)], 1)
    made = losses.reconstruct(frames, flows, times, t, boundary="normalised")
    error = (made.images - torch.cat((truth, truth), 1)).abs() * made.valid
    assert error.max() < 0.02
    dark = losses.reconstruct(frames, flows, times, t, boundary="zero")
    assert (dark.images - torch.cat((truth, truth), 1)).abs().max() > 0.1


def test_pixels_that_left_the_image_are_left_out_only_when_normalised() -> None:
    images = torch.zeros(1, 4, 3, 2, 2)
    valid = torch.ones(1, 4, 1, 2, 2)
    valid[..., 0] = 0
    images[..., 0] = 1
    inputs = torch.zeros(1, 2, 3, 2, 2)
    made = losses.Reconstruction(images, valid)
    zero = losses.self_supervised(made, inputs, nn.Identity())
    left_out = losses.self_supervised(made, inputs, nn.Identity(), boundary="normalised")
    assert zero["reconstruction"].item() == pytest.approx(2.0, abs=1e-3)
    assert zero["perceptual"].item() == pytest.approx(2.0)
    assert left_out["reconstruction"].item() == pytest.approx(0.0, abs=1e-3)
    assert left_out["perceptual"].item() == 0.0


def test_self_distillation_of_equal_frames_is_near_zero_and_reaches_only_the_student() -> None:
    teacher = torch.rand(1, 3, 3, 16, 16, requires_grad=True)
    student = losses.centre(teacher.detach().clone(), 4).requires_grad_()
    terms = losses.self_distillation(student, teacher, None)
    assert terms["distil"].item() == pytest.approx(1e-9**0.5, rel=1e-3)
    (terms["distil"] + losses.self_distillation(student + 1, teacher, None)["distil"]).backward()
    assert teacher.grad is None
    assert student.grad is not None
