from __future__ import annotations

import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.detection.boxes import pad_targets
from cohobate.detection.d_fine.criterion import Criterion, Outputs, total_by_kind

WEIGHTS = {"vfl": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}


def outputs_of(record, leaves, prefix, others):
    layers = int(record["params"][3])
    names = [f"{prefix}layer{n}" for n in range(layers)] + [f"{prefix}{n}" for n in others]

    def stack(kind, of):
        for name in of:
            leaves[f"{name}_{kind}"] = record[f"in_{name}_{kind}"].clone().requires_grad_()
        return torch.stack([leaves[f"{name}_{kind}"] for name in of])

    edges = stack("pred_corners", names[:layers])
    return Outputs(
        stack("pred_logits", names),
        stack("pred_boxes", names),
        edges.unflatten(-1, (4, -1)),
        record["dn_ref_points" if prefix else "ref_points"],
        tuple({"pre": "pre", "enc": "enc_0"}[n] for n in others),
    )


def denoising_of(record, leaves, targets):
    outputs = outputs_of(record, leaves, "dn_", ["pre"])
    groups = int(record["dn_num_group"])
    match = torch.full(outputs.logits.shape[1:3], -1)
    rows = record["dn_positive_idx"].split(record["dn_positive_counts"].tolist())
    for row, places, count in zip(match, rows, targets.counts, strict=True):
        row[places] = torch.arange(count).repeat(groups)
    return outputs, match, groups


@pytest.mark.parametrize(("name", "number"), [("criterion_0", 20), ("criterion_1", 38)])
def test_all_terms_and_gradients_of_the_official_code(recorded, targets_of, match_of, name, number):
    record, leaves = recorded(name), {}
    targets = targets_of(record)
    up, scale = record["params"][5:].tolist()
    criterion = Criterion(up=up, reg_scale=scale)
    outputs = outputs_of(record, leaves, "", ["pre", "enc"])
    noised = denoising_of(record, leaves, targets) if "dn_num_group" in record else None
    matched = criterion.match(outputs, targets, noised)
    terms = {**criterion.task(matched, targets), **criterion.distill(matched)}
    found = {f"loss_{k}": v * WEIGHTS[k.partition("_")[0]] for k, v in terms.items()}
    wanted = {k.removeprefix("out_"): v for k, v in record.items() if k.startswith("out_loss_")}
    assert set(found) == set(wanted)
    assert len(found) == number
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)
    total = torch.stack(list(found.values())).sum()
    torch.testing.assert_close(total, record["out_total"], rtol=1e-5, atol=1e-5)
    union = match_of(record, "union", outputs.logits.shape[2])
    assert torch.equal(matched[0].shared[0], union)
    total.backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(
            leaf.grad, record[f"grad_{key}"], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


def made(images=2, queries=6, classes=3, layers=3, bins=8, dtype=torch.float32):
    torch.manual_seed(0)
    logits = torch.randn(layers + 2, images, queries, classes, dtype=dtype)
    boxes = torch.rand(layers + 2, images, queries, 4, dtype=dtype) * 0.3 + 0.3
    edges = torch.randn(layers, images, queries, 4, bins + 1, dtype=dtype)
    leaves = [x.requires_grad_() for x in (logits, boxes, edges)]
    reference = torch.rand(images, queries, 4, dtype=dtype) * 0.3 + 0.3
    return Outputs(*leaves, reference, ("pre", "enc_0")), leaves


def objects(*counts):
    torch.manual_seed(1)
    labels = [torch.arange(n) % 3 for n in counts]
    return pad_targets(labels, [torch.rand(n, 4) * 0.3 + 0.3 for n in counts])


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (2, 0)])
@pytest.mark.parametrize("kind", ["go_lsd", "localization", "logits", "none"])
def test_images_without_objects_give_finite_losses_and_gradients(counts, kind):
    outputs, leaves = made()
    targets, criterion = objects(*counts), Criterion(kind)
    matched = criterion.match(outputs, targets)
    terms = total_by_kind({**criterion.task(matched, targets), **criterion.distill(matched)})
    torch.stack(list(terms.values())).sum().backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_a_label_out_of_range_is_named():
    outputs, _ = made()
    targets = pad_targets([torch.tensor([3]), torch.tensor([0])], [torch.rand(1, 4)] * 2)
    with pytest.raises(InputError, match="label 3 is not below the number of classes, 3"):
        Criterion().match(outputs, targets)


def test_half_precision_is_computed_in_float32():
    outputs, _ = made()
    half = Outputs(
        *(x.bfloat16() for x in outputs[:3]), outputs.reference.bfloat16(), outputs.others
    )
    exact = Outputs(*(x.float() for x in half[:4]), outputs.others)
    targets, criterion = objects(2, 3), Criterion()
    found = []
    for given in (half, exact):
        with torch.autocast("cpu", torch.bfloat16):
            matched = criterion.match(given, targets)
            found.append({**criterion.task(matched, targets), **criterion.distill(matched)})
    assert all(v.dtype == torch.float32 for v in found[0].values())
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key])


def test_a_box_turned_inside_out_is_no_assertion():
    outputs, leaves = made()
    turned = outputs._replace(boxes=outputs.boxes * torch.tensor([1.0, 1.0, -1.0, 1.0]))
    targets, criterion = objects(2, 2), Criterion()
    terms = criterion.task(criterion.match(turned, targets), targets)
    torch.stack(list(terms.values())).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves if leaf.grad is not None)


def test_without_the_union_each_output_keeps_its_own_match():
    outputs, _ = made(queries=12)
    targets = objects(3, 4)
    matched = Criterion("none").match(outputs, targets)[0]
    assert torch.equal(matched.shared, matched.own)
    assert matched.num_pairs == 7
    shared = Criterion("go_lsd").match(outputs, targets)[0]
    assert shared.num_pairs > 7
    assert torch.equal(shared.own, matched.own)


def test_localization_distillation_against_the_equation():
    outputs, _ = made(dtype=torch.float64)
    targets, criterion = objects(2, 3), Criterion("localization", temperature=2.0)
    matched = criterion.match(outputs, targets)
    terms = criterion.distill(matched)
    assert list(terms) == ["ld_aux_0", "ld_aux_1"]
    image, query = (matched[0].own[2] >= 0).nonzero(as_tuple=True)
    p = (outputs.edges[2, image, query] / 2).softmax(-1)
    for layer in range(2):
        q = (outputs.edges[layer, image, query] / 2).softmax(-1)
        wanted = 4 * (p * (p.log() - q.log())).sum(-1).mean()
        torch.testing.assert_close(terms[f"ld_aux_{layer}"], wanted)


def test_logit_mimicking_against_the_equation():
    outputs, _ = made(dtype=torch.float64)
    targets, criterion = objects(2, 3), Criterion("logits", temperature=2.0)
    terms = criterion.distill(criterion.match(outputs, targets))
    p = (outputs.logits[2] / 2).sigmoid()
    for layer in range(2):
        q = (outputs.logits[layer] / 2).sigmoid()
        kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        torch.testing.assert_close(terms[f"kd_aux_{layer}"], 4 * kl.sum() / 5)
