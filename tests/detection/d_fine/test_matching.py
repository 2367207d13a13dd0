from __future__ import annotations

import torch

from cohobate.detection.boxes import pad_targets
from cohobate.detection.d_fine.denoising import Denoising, Draws
from cohobate.detection.d_fine.matching import MatchCost, hungarian, union


def test_matches_of_the_official_code(cases, targets_of, match_of):
    for case in cases("matcher"):
        targets = targets_of(case)
        cost = MatchCost()(case["pred_logits"][None], case["pred_boxes"][None], targets)
        found = hungarian(cost, targets)[0]
        assert torch.equal(found, match_of(case, "match", found.shape[1]))


def test_unions_of_the_official_code(cases, match_of):
    for case in cases("union"):
        layers = [f"layer{n}" for n in range(int(case["num_layers"]))]
        queries = 1 + max(int(case[f"{n}_query"].max()) for n in [*layers, "union"])
        match = torch.stack([match_of(case, name, queries) for name in layers])
        found = union(match, int(match.max()) + 1)
        assert torch.equal(found, match_of(case, "union", queries))


def test_of_two_objects_given_equally_often_the_lower_one_is_taken():
    match = torch.tensor([[[2, -1]], [[1, -1]], [[1, 0]], [[2, -1]]])
    assert union(match, 3).tolist() == [[1, 0]]


def test_a_cost_that_is_no_number_does_not_stop_the_match():
    targets = pad_targets([torch.tensor([0])], [torch.tensor([[0.5, 0.5, 0.1, 0.1]])])
    boxes = torch.full((1, 1, 3, 4), torch.nan)
    cost = MatchCost()(torch.zeros(1, 1, 3, 2), boxes, targets)
    assert (cost == 1).all()
    assert (hungarian(cost, targets) >= 0).sum() == 1


def test_denoising_queries_of_the_official_code(cases, targets_of):
    for case in cases("denoising"):
        classes, queries, budget, label_noise, box_noise = case["params"].tolist()
        targets = targets_of(case)
        make = Denoising(int(budget), label_noise, box_noise)
        draws = Draws(*(case[f"draw_{n}"] for n in ("label_u", "new_label", "sign", "part")))
        found = make(targets, int(classes), int(queries), draws)
        assert found is not None
        content = case["embed"][found.labels]
        torch.testing.assert_close(content, case["out_content"])
        torch.testing.assert_close(found.boxes, case["out_bbox_unact"], rtol=1e-5, atol=1e-6)
        assert torch.equal(found.blocked, case["out_attn_mask"].bool())
        assert found.groups == int(case["num_group"])
        assert found.labels.shape[1] == int(case["num_dn_queries"])
        rows = case["positive_idx"].split(case["positive_counts"].tolist())
        for match, places, count in zip(found.match, rows, targets.counts, strict=True):
            assert torch.equal((match >= 0).nonzero()[:, 0], places)
            assert torch.equal(match[places], torch.arange(count).repeat(found.groups))


def test_denoising_draws_are_those_of_the_official_code(cases, targets_of):
    case = cases("denoising")[0]
    classes, _, budget, label_noise, box_noise = case["params"].tolist()
    torch.manual_seed(int(case["seed"]))
    found = Denoising(int(budget), label_noise, box_noise).draw(targets_of(case), int(classes))
    for name, values in zip(("label_u", "new_label", "sign", "part"), found, strict=True):
        torch.testing.assert_close(values.double(), case[f"draw_{name}"].double())


def test_no_object_no_denoising():
    empty = pad_targets([torch.zeros(0).long()] * 2, [torch.zeros(0, 4)] * 2)
    assert Denoising()(empty, 3, 10) is None
    assert Denoising(budget=0)(pad_targets([torch.tensor([0])], [torch.rand(1, 4)]), 3, 9) is None


def test_many_objects_still_get_one_group():
    full = pad_targets([torch.zeros(150).long()], [torch.rand(150, 4)])
    found = Denoising(budget=100)(full, 3, 10)
    assert found is not None
    assert found.groups == 1
    assert found.labels.shape == (1, 300)
