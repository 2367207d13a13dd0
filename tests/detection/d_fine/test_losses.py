from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cohobate.core.errors import InputError
from cohobate.detection.boxes import overlap, to_xyxy
from cohobate.detection.d_fine.losses import (
    BinTargets,
    bin_targets,
    decode,
    decoupled_distillation_focal,
    expected_offsets,
    fine_grained_localization,
    varifocal,
    weighting,
)


def close(found, wanted, **tolerance):
    torch.testing.assert_close(
        found, wanted.to(found.dtype), **{"rtol": 1e-5, "atol": 1e-6} | tolerance
    )


def test_weighting_of_the_official_code(cases):
    for case in cases("weighting"):
        bins, up, scale = case["params"].tolist()
        close(weighting(int(bins), up, scale), case["W"])


@pytest.mark.parametrize("bins", [3, 31, 2, 0])
def test_an_odd_number_of_bins_is_refused(bins):
    with pytest.raises(InputError, match="even number"):
        weighting(bins)


def test_decoding_of_the_official_code_with_its_gradient(cases):
    for case in cases("decode"):
        bins, up, scale = case["params"].tolist()
        logits = case["logits"].requires_grad_()
        edges = logits.unflatten(-1, (4, int(bins) + 1))
        offsets = expected_offsets(edges, weighting(int(bins), up, scale))
        boxes = decode(case["ref"], offsets, scale)
        close(offsets, case["offsets"])
        close(boxes, case["boxes"])
        (boxes * case["grad_boxes"]).sum().backward()
        close(logits.grad, case["grad_logits"])


def test_bin_targets_of_the_official_code(cases):
    for case in cases("targets"):
        bins, up, scale = case["params"].tolist()
        weights = weighting(int(bins), up, scale)
        found = bin_targets(case["ref_cxcywh"], case["gt_xyxy"], weights, scale)
        assert torch.equal(found.index.flatten(), case["index"].long())
        close(found.right.flatten(), case["w_right"], atol=1e-5)
        close(found.left.flatten(), case["w_left"], atol=1e-5)
    assert any((case["index"] % 1 > 0).any() for case in cases("targets")), "beyond the last bin"


def test_bin_targets_beyond_the_bins_rest_on_the_end_bins():
    weights, centre = weighting(8, 0.5, 4.0), torch.tensor([[0.5, 0.5, 0.1, 0.1]])
    tiny = bin_targets(centre, torch.tensor([[0.9, 0.9, 0.1, 0.1]]), weights, 4.0)
    far = bin_targets(centre, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), weights, 4.0)
    assert (tiny.index == 0).all()
    assert (tiny.left == 1).all()
    assert (tiny.right == 0).all()
    assert (far.index == 7).all()
    assert (far.left == 0).all()
    assert (far.right == 1).all()


def test_a_box_is_found_again_from_its_bins():
    torch.manual_seed(0)
    weights = weighting(32, 0.5, 4.0).double()
    reference = torch.rand(50, 4, dtype=torch.double) * 0.2 + 0.4
    true = reference + (torch.rand(50, 4, dtype=torch.double) - 0.5) * 0.05
    target = bin_targets(reference, to_xyxy(true), weights, 4.0)
    hot = F.one_hot(target.index, 33) * target.left[..., None]
    hot = hot + F.one_hot(target.index + 1, 33) * target.right[..., None]
    offsets = expected_offsets(hot.clamp(min=1e-300).log(), weights)
    close(decode(reference, offsets, 4.0), true, atol=1e-12)


def test_fgl_of_the_official_code_with_its_gradient(cases):
    for case in cases("fgl"):
        logits = case["logits"].requires_grad_()
        target = BinTargets(case["index"].long(), case["w_left"], case["w_right"])
        loss = (fine_grained_localization(logits, target) * case["iou_weight"]).sum()
        loss = loss / case["avg_factor"].float()
        close(loss, case["loss"])
        loss.backward()
        close(logits.grad, case["grad_logits"])


def test_vfl_of_the_official_code_with_its_gradient(cases, targets_of, match_of):
    for case in cases("vfl"):
        targets, logits = targets_of(case), case["pred_logits"].requires_grad_()
        match = match_of(case, "match", logits.shape[1])
        image, query = (match >= 0).nonzero(as_tuple=True)
        target = match[image, query]
        found, true = case["pred_boxes"][image, query], targets.boxes[image, target]
        positive, quality = torch.zeros_like(logits).bool(), torch.zeros_like(logits)
        slot = image, query, targets.labels[image, target]
        positive[slot], quality[slot] = True, overlap(to_xyxy(found), to_xyxy(true))[0]
        loss = varifocal(logits, quality.detach(), positive).sum() / case["num_boxes"].float()
        close(loss, case["loss"])
        loss.backward()
        close(logits.grad, case["grad_logits"])


def ddf_by_hand(student, teacher, matched, weight, counts, t):
    """Equation 8 in float64, an edge at a time."""
    layers, images, queries = weight.shape
    found = []
    for layer in range(layers):
        parts = {True: [], False: []}
        for image in range(images):
            for query in range(queries):
                for edge in range(4):
                    p = (teacher[image, query, edge].detach() / t).softmax(-1)
                    q = (student[layer, image, query, edge] / t).softmax(-1)
                    kl = t**2 * (p * (p.log() - q.log())).sum()
                    parts[bool(matched[image, query])].append(weight[layer, image, query] * kl)
        means = {k: torch.stack(v).mean() if v else 0.0 for k, v in parts.items()}
        km, ku = counts or (len(parts[True]), len(parts[False]))
        found.append((means[True] * km**0.5 + means[False] * ku**0.5) / (km**0.5 + ku**0.5))
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [1.0, 5.0])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("counts", [None, (8, 40)])
def test_ddf_against_the_equation(dtype, t, share, counts):
    torch.manual_seed(3)
    student = torch.randn(2, 2, 3, 4, 9, dtype=dtype, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 9, dtype=dtype, requires_grad=True)
    matched, weight = torch.rand(2, 3) < share, torch.rand(2, 2, 3, dtype=dtype)
    given = None if counts is None else tuple(torch.tensor(n) for n in counts)
    found = decoupled_distillation_focal(student, teacher, matched, weight, given, temperature=t)
    double = student.detach().double().requires_grad_()
    wanted = ddf_by_hand(double, teacher.double(), matched, weight.double(), counts, t)
    close(found, wanted, rtol=1e-4 if dtype == torch.float32 else 1e-9)
    found.sum().backward()
    wanted.sum().backward()
    assert teacher.grad is None
    close(student.grad, double.grad, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-5)


def test_ddf_of_equal_distributions_is_nothing():
    z = torch.randn(2, 3, 4, 9)
    student = z.expand(1, -1, -1, -1, -1).clone().requires_grad_()
    loss = decoupled_distillation_focal(student, z, torch.ones(2, 3).bool(), torch.ones(1, 2, 3))
    loss.sum().backward()
    assert loss.item() == 0.0
    assert student.grad.abs().max() < 1e-6


def test_gradients_by_differences():
    torch.manual_seed(0)
    weights = weighting(4).double()
    z = torch.randn(2, 4, 5, dtype=torch.double, requires_grad=True)
    reference = torch.rand(2, 4, dtype=torch.double) * 0.2 + 0.3
    target = bin_targets(reference, to_xyxy(reference + 0.01), weights)
    assert torch.autograd.gradcheck(lambda x: fine_grained_localization(x, target), z)
    assert torch.autograd.gradcheck(lambda x: decode(reference, expected_offsets(x, weights)), z)


def test_a_negative_side_is_no_fault():
    crossed = torch.tensor([[0.6, 0.6, 0.4, 0.4]], requires_grad=True)
    iou, giou = overlap(crossed, torch.tensor([[0.3, 0.3, 0.7, 0.7]]))
    assert iou.item() == 0.0
    assert -1.0 <= giou.item() <= 1.0
    giou.sum().backward()
    assert crossed.grad.isfinite().all()


def test_overlap_of_empty_boxes_is_finite():
    iou, giou = overlap(torch.zeros(1, 4), torch.zeros(1, 4))
    assert iou.isfinite().all()
    assert giou.isfinite().all()
