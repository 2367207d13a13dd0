from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import directed_hausdorff
from sklearn import metrics as sk

from cohobate.core.errors import InputError
from cohobate.medseg.esp_medsam import embedding_loss, mask_loss, patch_loss, patch_target
from cohobate.medseg.esp_medsam.metrics import Scores, hausdorff, overlap


@pytest.mark.parametrize("name", ["losses_a", "losses_b_empty"])
def test_mask_loss_equals_the_official_codes(recorded, name):
    g = recorded(name)
    logits = g["logits"].requires_grad_()
    loss = mask_loss(logits, g["target"])
    torch.testing.assert_close(loss.double(), g["mask_loss"].double(), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, g["grad_logits"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["losses_a", "losses_b_empty"])
def test_embedding_loss_equals_the_official_codes(recorded, name):
    g = recorded(name)
    student = g["student_emb"].requires_grad_()
    teacher = g["teacher_emb"].requires_grad_()
    loss = embedding_loss(student, teacher)
    torch.testing.assert_close(loss.double(), g["kd_loss"].double(), rtol=1e-5, atol=0)
    loss.backward()
    torch.testing.assert_close(student.grad, g["grad_student"], rtol=1e-5, atol=1e-8)
    assert teacher.grad is None


@pytest.mark.parametrize("name", ["losses_a", "losses_b_empty"])
def test_overlap_equals_the_official_codes(recorded, name):
    g = recorded(name)
    found = overlap(
        (g["logits"].sigmoid() >= 0.5).flatten()[None], (g["target"] > 0).flatten()[None]
    )
    assert found["dice"].item() == pytest.approx(float(g["dice"]), rel=1e-6)
    assert found["iou"].item() == pytest.approx(float(g["iou"]), rel=1e-6)


def test_patch_loss_and_target_equal_the_official_codes(recorded):
    g = recorded("sppg")
    assert torch.equal(patch_target(g["mask"], (4, 4)), g["patch_target"])
    loss = patch_loss(g["patch_logits"], g["mask"])
    torch.testing.assert_close(loss.double(), g["patch_bce"].double(), rtol=1e-5, atol=0)


def test_the_patch_target_of_an_empty_mask_and_of_one_pixel():
    mask = torch.zeros(1, 1, 128, 160)
    assert patch_target(mask, (4, 5)).sum() == 0
    mask[0, 0, 63, 64] = 1
    target = patch_target(mask, (4, 5))
    assert target.sum() == 1
    assert target[0, 0, 1, 2] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_compute_wide_and_return_the_inputs_type(dtype):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 64, 64, generator=rng).to(dtype)
    target = (torch.rand(2, 1, 64, 64, generator=rng) > 0.7).to(dtype)
    wide = mask_loss(logits.double(), target.double())
    loss = mask_loss(logits, target)
    assert loss.dtype == dtype
    torch.testing.assert_close(
        loss.double(), wide, rtol=1e-2 if dtype.itemsize < 4 else 1e-5, atol=0
    )


def test_the_mask_loss_is_the_formula():
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(3, 1, 4, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    y = (torch.rand(3, 1, 4, 5, generator=rng) > 0.5).double()
    p = 1 / (1 + torch.exp(-z))
    b = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    expected = 0.8 * dice + 0.2 * 0.8 * (1 - torch.exp(-b)) ** 2 * b
    torch.testing.assert_close(mask_loss(z, y), expected)
    assert torch.autograd.gradcheck(lambda x: mask_loss(x, y), z)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_an_empty_mask_gives_finite_numbers(scale):
    logits = torch.full((1, 1, 64, 64), -scale, requires_grad=True)
    empty = torch.zeros(1, 1, 64, 64)
    loss = mask_loss(logits, empty) + patch_loss(logits[:, :, ::32, ::32], empty)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    found = overlap(logits >= 0, empty > 0)
    assert found["dice"].item() == 1
    assert found["iou"].item() == 1


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"target \(1, 1, 2, 2\): not the shape"):
        mask_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2))
    with pytest.raises(InputError, match="no whole number"):
        patch_loss(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 64, 64))
    with pytest.raises(InputError, match="do not match"):
        embedding_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3))


def test_scores_leave_out_and_count_what_has_no_distance():
    prediction = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    target = torch.zeros_like(prediction)
    prediction[0, 0, 2:5, 2:5] = target[0, 0, 2:5, 2:9] = True
    target[1, 0, 3, 3] = True
    scores = Scores()
    scores.add(prediction, target, ["a", "a", "b"], distances=True)
    found = scores.summary()
    assert found["hausdorff"] == 4
    assert found["hausdorff_excluded"] == 2
    assert found["dice"] == pytest.approx(((2 * 9 + 1) / (9 + 21 + 1) + 1 / 2 + 1) / 3)
    assert found["dice/b"] == 1
    precision, recall = found["precision"], found["recall"]
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert torch.isnan(hausdorff(prediction, target)[1:]).all()


def test_metrics_agree_with_monai():
    from monai.metrics import compute_dice, compute_iou

    rng = torch.Generator().manual_seed(0)
    p = torch.rand(4, 1, 64, 64, generator=rng) > 0.4
    g = torch.rand(4, 1, 64, 64, generator=rng) > 0.4
    found = overlap(p, g)
    # MONAI does not smooth; over some thousand pixels 1 counts for little
    dice, iou = compute_dice(p.float(), g.float()), compute_iou(p.float(), g.float())
    torch.testing.assert_close(found["dice"].float(), dice[:, 0], atol=2e-4, rtol=0)
    torch.testing.assert_close(found["iou"].float(), iou[:, 0], atol=4e-4, rtol=0)


def test_overlap_is_scikit_learns_with_one_right_pixel_more():
    """Smoothing by 1 is a foreground pixel that both have, for all but Dice and accuracy."""
    rng = torch.Generator().manual_seed(3)
    p = torch.rand(5, 1, 24, 24, generator=rng) > 0.4
    g = torch.rand(5, 1, 24, 24, generator=rng) > 0.4
    p[3], g[4] = False, False
    found = overlap(p, g)
    pairs = [(a.flatten().numpy(), b.flatten().numpy()) for a, b in zip(p, g, strict=True)]
    want = [sk.accuracy_score(b, a) for a, b in pairs]
    assert found["accuracy"].tolist() == pytest.approx(want, abs=1e-6)
    more = [(np.append(a, True), np.append(b, True)) for a, b in pairs]
    for name, score in (
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
        ("iou", sk.jaccard_score),
    ):
        want = [score(b, a) for a, b in more]
        assert found[name].tolist() == pytest.approx(want, abs=1e-6), name


def test_the_distance_is_scipys():
    rng = torch.Generator().manual_seed(5)
    p, g = (torch.rand(2, 3, 1, 12, 15, generator=rng) > 0.9).unbind()
    want = []
    for a, b in zip(p, g, strict=True):
        one, other = a[0].nonzero().numpy(), b[0].nonzero().numpy()
        want.append(max(directed_hausdorff(one, other)[0], directed_hausdorff(other, one)[0]))
    assert hausdorff(p, g).tolist() == pytest.approx(want, abs=1e-5)
