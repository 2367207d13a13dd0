"""Losses of all stages: recorded values and gradients, identities, limits."""

from __future__ import annotations

import math

import pytest
import torch
from rdkit import Chem
from rdkit.Chem import AllChem
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from cohobate.docking.aurobind import losses
from cohobate.docking.aurobind.diffusion import random_rotations
from cohobate.docking.data.features import automorphisms, collate

EXACT = {"rtol": 1e-8, "atol": 1e-8}


def lists(rows: int = 3, size: int = 6, dtype: torch.dtype = torch.float64):
    rng = torch.Generator().manual_seed(0)
    score, label = (torch.randn(rows, size, generator=rng, dtype=dtype) for _ in range(2))
    mask = torch.arange(size) < torch.tensor([[size], [4], [2]])[:rows]
    return score.requires_grad_(), label, mask


@pytest.mark.parametrize("number", [0, 1])
def test_the_structure_loss(recorded, number):
    r = recorded(f"af3_structure_loss_{number}")
    x, mask, weight = r["x"].requires_grad_(), r["atom_mask"], r["atom_weight"]
    aligned = losses.align(r["x_gt"], x, weight * mask)
    assert_close(aligned, r["aligned_gt"], rtol=1e-7, atol=1e-7)
    mse = losses.pose_mse(x, aligned, mask, weight)
    smooth = losses.smooth_lddt(x, r["x_gt"], mask)
    assert_close(mse, r["mse"], **EXACT)
    assert_close(smooth, r["smooth_lddt"], **EXACT)
    scale = losses.edm_weight(r["t"], float(r["sigma_data"]))
    assert_close(scale, r["edm_weight"], **EXACT)
    total = (scale * mse + smooth).mean()
    assert_close(total, r["total"], **EXACT)
    for value, name in ((mse.sum(), "mse"), (smooth.sum(), "smooth_lddt"), (total, "total")):
        (grad,) = torch.autograd.grad(value, x, retain_graph=True)
        assert_close(grad, r[f"grad_{name}"], rtol=1e-7, atol=1e-8)


def test_alignment_never_mirrors():
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one = torch.ones(2, 5, dtype=torch.float64)
    turn = random_rotations(2, torch.Generator().manual_seed(2)).double()
    assert_close(losses.align(x @ turn.mT + 3, x, one), x, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(losses.align(-x, x, one), x, atol=0.1)


def test_equivalent_atoms_take_the_nearest_places():
    molecule = Chem.MolFromSmiles("CC(C)(C)c1ccc(C(F)(F)F)cc1")
    AllChem.Compute2DCoords(molecule)
    small = Chem.MolFromSmiles("CCO")
    AllChem.Compute2DCoords(small)
    orders = [automorphisms(m) for m in (molecule, small)]
    assert [len(o) for o in orders] == [72, 1]  # 3! turns and swaps of each group, and the ring's
    batch = collate(
        [
            {
                "same": torch.from_numpy(o),
                "element": torch.zeros(o.shape[1]),
                "residue": torch.zeros(1),
            }
            for o in orders
        ]
    )
    true = torch.randn(2, molecule.GetNumAtoms(), 3, dtype=torch.float64)
    mask = torch.ones(true.shape[:2], dtype=torch.float64)
    mask[1, 3:] = 0
    swapped = true.clone()
    swapped[0] = true[0, torch.from_numpy(orders[0][41])]
    close = (swapped + 1e-3 * torch.randn_like(true)).requires_grad_()
    found = losses.nearest_order(close, true, mask, batch["same"])
    assert_close(found, swapped, rtol=0, atol=0)
    assert not found.requires_grad
    every = [
        (close[0] - true[0, torch.from_numpy(order)]).square().sum().item() for order in orders[0]
    ]
    assert (close[0] - found[0]).square().sum().item() == pytest.approx(min(every))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_plackett_luce_as_recorded(recorded, number):
    r = recorded(f"plackett_luce_{number}")
    tau = float(r["tau"])
    for weight, loss, grad in (
        (None, "loss", "grad_y_pred"), (r["confidence"], "loss_weighted", "grad_weighted")
    ):  # fmt: skip
        score = r["y_pred"].clone().requires_grad_()
        found = losses.plackett_luce(score, r["y_exp"], r["mask"], tau=tau, confidence=weight)
        assert_close(found, r[loss], **EXACT)
        found.backward()
        assert_close(score.grad, r[grad], **EXACT)


def test_plackett_luce_identities():
    score, label, mask = lists()
    loss = losses.plackett_luce(score, label, mask)
    shift = torch.tensor([[3.0], [-7.0], [100.0]], dtype=torch.float64)
    assert_close(losses.plackett_luce(score + shift, label, mask), loss, rtol=1e-9, atol=1e-9)
    (grad,) = torch.autograd.grad(loss, score)
    assert_close(grad.sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (grad[~mask] == 0).all()
    whole = torch.ones(1, 5, dtype=torch.bool)
    constant = losses.plackett_luce(torch.full((1, 5), 2.5), torch.rand(1, 5), whole)
    assert constant.item() == pytest.approx(math.log(math.factorial(5)), rel=1e-5)


def test_a_list_of_one_contributes_nothing():
    score, label, mask = lists(2)
    alone = mask.clone()
    alone[1, 1:] = False
    found = losses.plackett_luce(score, label, alone)
    assert_close(found, losses.plackett_luce(score[:1], label[:1], mask[:1]))
    (grad,) = torch.autograd.grad(found, score)
    assert (grad[1] == 0).all()


def test_a_list_of_two_is_logistic():
    score = torch.tensor([[0.3, 0.5]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = losses.plackett_luce(score, torch.tensor([[7.0, 6.0]]), mask, tau=0.1)
    assert_close(found, F.softplus(-(score[0, 0] - score[0, 1]) / 0.1))


def test_extreme_scores_stay_finite():
    score = torch.tensor([[1e3, -1e3, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    found = losses.plackett_luce(score, torch.tensor([[1.0, 2.0, 0.0]]), mask, tau=0.1)
    found.backward()
    assert found.item() == pytest.approx(2e4)
    assert score.grad.isfinite().all()


def test_ties_follow_the_given_order():
    score = torch.tensor([[0.0, 1.0]])
    label, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    first = losses.plackett_luce(score, label, mask, ties=torch.tensor([[1.0, 0.0]]))
    second = losses.plackett_luce(score, label, mask, ties=torch.tensor([[0.0, 1.0]]))
    assert_close(first, losses.plackett_luce(score, label, mask))
    assert first > second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plackett_luce_keeps_the_type(dtype):
    score, label, mask = lists()
    found = losses.plackett_luce(score.to(dtype), label.to(dtype), mask)
    assert found.dtype == dtype
    assert found.isfinite()


def test_gradients():
    score, label, mask = lists(2, 4)
    assert gradcheck(lambda s: losses.plackett_luce(s, label, mask, tau=0.7), score)
    reference = torch.zeros_like(label)
    assert gradcheck(lambda s: losses.pairwise_dpo(s, reference, label, mask), score)
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    y, one = 1.3 * x.detach(), torch.ones(1, 4, dtype=torch.float64)
    assert gradcheck(lambda p: losses.smooth_lddt(p, y, one, y[:, :2], one[:, :2]), x)
    assert gradcheck(lambda p: losses.bond_loss(p, y * 1.1, torch.ones(1, 4, 4)), x)


def test_pairwise_dpo_against_a_loop():
    score, label, mask = lists()
    reference = label.flip(1)
    terms = []
    for b in range(3):
        for w in range(6):
            for loser in range(6):
                if mask[b, w] and mask[b, loser] and label[b, w] - label[b, loser] > 0.3:
                    gain = score[b, w] - score[b, loser]
                    gain = gain - (reference[b, w] - reference[b, loser])
                    terms.append(-torch.log(torch.sigmoid(2.0 * gain)))
    found = losses.pairwise_dpo(score, reference, label, mask, beta=2.0)
    assert_close(found, torch.stack(terms).mean())


def test_fine_tuning_weighs_errors_and_bounds_slopes():
    inputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    fitness = inputs.square().sum(1)
    label, sigma = fitness.detach() - torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])
    assert losses.sft(fitness, label, sigma).item() == pytest.approx((1 + 9 / 4) / 2)
    slopes = (4 * 5 + 4 * 25) / 2  # ‖2x‖², mean over the batch
    found = losses.sft(fitness, label, sigma, (inputs,), smoothness=0.1)
    assert found.item() == pytest.approx((1 + 9 / 4) / 2 + 0.1 * slopes)
    found.backward()
    assert inputs.grad.isfinite().all()


def test_the_teacher_gets_no_gradient():
    student, teacher = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    (losses.hidden(student, teacher) + losses.score(student[:, 0], teacher[:, 0])).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_lddt_of_atoms_counts_thresholds():
    target = torch.zeros(1, 1, 3)
    fixed = torch.tensor([[[3.0, 0, 0]]])
    for moved, wanted in ((0.2, 1.0), (0.7, 0.75), (1.5, 0.5), (3.0, 0.25), (5.0, 0.0)):
        x = torch.tensor([[[-moved, 0.0, 0.0]]])
        assert losses.lddt_of_atoms(x, target, fixed, torch.ones(1, 1)).item() == wanted
