"""Candidate selection: the worked example, and that nothing but the candidates matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.medseg.tsddnet.selection import Decision, Selection, choose, eligible, iou

D = torch.tensor([[[12.0, 12, 52, 52], [10, 10, 30, 30], [8, 8, 48, 52]]])
S = torch.tensor([[0.9, 0.3, 0.02]])
DRAWN, NONE = torch.tensor([[10.0, 10, 50, 50]]), torch.full((1, 4), float("nan"))


def run(p, drawn=DRAWN, p_drawn=0.78, boxes=D, scores=S, **options):
    rule = Selection(**options)
    candidates = eligible(boxes, scores, drawn, rule)
    probability = torch.tensor(p) if not isinstance(p, torch.Tensor) else p
    first = torch.full((len(drawn),), p_drawn)
    return choose(boxes, scores, probability, candidates, drawn, first, rule)


def test_the_overlaps_of_the_worked_example():
    assert iou(D[0], DRAWN).tolist() == pytest.approx([0.822, 0.25, 0.826], abs=5e-4)


def test_a_better_detection_replaces_the_drawn_box():
    found = run([[0.80, 0.99, 0.75]])
    assert found.boxes.tolist() == [[12, 12, 52, 52]]
    assert found.decisions == [Decision.REPLACED]
    assert (found.old.item(), found.new.item()) == pytest.approx((0.78, 0.80))


def test_a_worse_detection_does_not():
    found = run([[0.77, 0.99, 0.75]])
    assert found.boxes.tolist() == [[10, 10, 50, 50]]
    assert found.decisions == [Decision.KEPT]


def test_an_image_without_a_box_gets_the_most_believed_one():
    found = run([[0.80, 0.99, 0.75]], NONE)
    assert found.boxes.tolist() == [[10, 10, 30, 30]]
    assert found.decisions == [Decision.ACCEPTED]
    assert found.old.isnan().all()


def test_delta_and_tau_cls_must_be_reached():
    assert run([[0.80, 0.1, 0.1]], delta=0.03).decisions == [Decision.KEPT]
    assert run([[0.80, 0.1, 0.1]], delta=0.01).decisions == [Decision.REPLACED]
    assert run([[0.49, 0.3, 0.9]], NONE).decisions == [Decision.REJECTED]
    rejected = run([[0.49, 0.3, 0.9]], NONE)
    assert rejected.boxes.isnan().all()
    assert rejected.new.item() == pytest.approx(0.49)


def test_no_candidate_at_all():
    nothing = torch.full((1, 3), -1.0)
    assert run([[0.9, 0.9, 0.9]], NONE, scores=nothing).decisions == [Decision.NOTHING]
    kept = run([[0.9, 0.9, 0.9]], scores=nothing)
    assert kept.decisions == [Decision.KEPT]
    assert kept.new.isnan().all()


@pytest.mark.parametrize(
    ("scope", "full", "partial"),
    [
        ("all", Decision.REPLACED, Decision.ACCEPTED),
        ("full", Decision.REPLACED, Decision.REJECTED),
        ("partial", Decision.KEPT, Decision.ACCEPTED),
        ("none", Decision.KEPT, Decision.REJECTED),
    ],
)
def test_the_scope(scope, full, partial):
    p = [[0.80, 0.99, 0.75]]
    assert run(p, scope=scope).decisions == [full]
    assert run(p, NONE, scope=scope).decisions == [partial]


def test_equal_probabilities_take_the_higher_score():
    boxes = torch.tensor([[[12.0, 12, 52, 52], [11, 11, 51, 51], [8, 8, 48, 52]]])
    scores = torch.tensor([[0.3, 0.6, 0.1]])
    found = run([[0.9, 0.9, 0.9]], boxes=boxes, scores=scores)
    assert found.boxes.tolist() == [[11, 11, 51, 51]]
    # and the drawn box keeps its place against an equal
    assert run([[0.78, 0.78, 0.78]], boxes=boxes).decisions == [Decision.KEPT]


def random_case(seed: int, images: int = 6, count: int = 12):
    g = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 30, (images, count, 2), generator=g).float()
    boxes = torch.cat([low, low + torch.randint(5, 30, (images, count, 2), generator=g)], -1)
    # few values, so that there are ties
    scores = torch.randint(0, 4, (images, count), generator=g) / 4
    p = torch.randint(0, 4, (images, count), generator=g) / 4
    drawn = boxes[:, 0] + 1.0
    drawn[::2] = float("nan")
    return boxes, scores, p, drawn


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [3, 20])
def test_order_and_batching_do_not_matter(seed, limit):
    boxes, scores, p, drawn = random_case(seed)
    options = {"candidates": limit, "tau_iou": 0.1, "tau_cls": 0.2}
    want = run(p, drawn, 0.3, boxes, scores, **options)
    turn = torch.stack([torch.randperm(boxes.shape[1]) for _ in boxes])
    moved = run(
        p.gather(1, turn), drawn, 0.3, boxes.gather(1, turn[..., None].expand(-1, -1, 4)),
        scores.gather(1, turn), **options,
    )  # fmt: skip
    assert torch.equal(want.boxes.nan_to_num(-1), moved.boxes.nan_to_num(-1))
    for i in range(len(boxes)):
        one = slice(i, i + 1)
        alone = run(p[one], drawn[one], 0.3, boxes[one], scores[one], **options)
        assert torch.equal(alone.boxes.nan_to_num(-1), want.boxes[one].nan_to_num(-1))
        assert alone.decisions == want.decisions[one]


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_that_of_a_slow_search(seed):
    boxes, scores, p, drawn = random_case(seed)
    rule = Selection(candidates=4, tau_iou=0.3, tau_det=0.3, tau_cls=0.5)
    found = choose(
        boxes, scores, p, eligible(boxes, scores, drawn, rule), drawn, torch.full((6,), 0.4), rule
    )
    for i in range(6):
        has_box = bool(drawn[i].isfinite().all())
        pool = [
            (scores[i, j].item(), boxes[i, j].tolist(), p[i, j].item())
            for j in range(boxes.shape[1])
            if (iou(boxes[i, j], drawn[i]) >= 0.3 if has_box else scores[i, j] >= 0.3)
        ]
        pool = sorted(pool, key=lambda c: (c[0], c[1]), reverse=True)[:4]
        best = max(pool, key=lambda c: (c[2], c[0], c[1]), default=None)
        take = best is not None and (best[2] > 0.4 if has_box else best[2] >= 0.5)
        want = torch.tensor(best[1]) if take else drawn[i]
        assert torch.equal(found.boxes[i].nan_to_num(-1), want.nan_to_num(-1))


def test_degenerate_detections_are_no_candidates():
    boxes = torch.tensor([[[5.0, 5, 5, 9], [0, 0, 0, 0], [9, 9, 4, 4], [float("nan"), 0, 9, 9]]])
    assert not eligible(boxes, torch.full((1, 4), 0.9), NONE, Selection()).any()


def test_iou_is_torchvisions():
    from torchvision.ops import box_iou

    boxes, *_ = random_case(9)
    a, b = boxes[0], boxes[1]
    np.testing.assert_allclose(iou(a[:, None], b[None]), box_iou(a, b), rtol=1e-6)


@pytest.mark.parametrize(
    ("option", "value"), [("tau_iou", 1.5), ("tau_cls", -0.1), ("delta", -0.1), ("candidates", 0)]
)
def test_options_out_of_range(option, value):
    with pytest.raises(InputError, match=option):
        Selection(**{option: value})
