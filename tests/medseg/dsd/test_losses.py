from __future__ import annotations

import math

import pytest
import torch
from monai.losses import DiceCELoss
from torch.nn import functional as F

from cohobate.core.errors import InputError
from cohobate.medseg.dsd.losses import dice_ce, distillation, prepare

CASES = ["loss_a", "loss_b", "loss_c_T1_nobg"]


def logits_of(record, names, dtype=torch.float32):
    return {n: record[f"logits_{n}"].to(dtype).requires_grad_() for n in names}


def terms_of(record, z):
    target = prepare(record["label"], z["main"])
    options = {
        "temperature": float(record["T"]),
        "include_background": bool(record["include_background_kl"]),
    }
    return (
        torch.stack([dice_ce(z[n], target) for n in ("main", "dec4", "dec3", "dec2", "dec1")]),
        distillation([z[n] for n in ("dec4", "dec3", "dec2")], z["dec1"], **options),
        distillation([z[n] for n in ("enc1", "enc2", "enc3")], z["enc4"], **options),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_values_of_the_official_code(recorded, names, case, dtype):
    record = recorded(case)
    found = terms_of(record, logits_of(record, names, dtype))
    for terms, key in zip(found, ("dicece_terms", "kl_dec_terms", "kl_enc_terms"), strict=True):
        assert terms.dtype == dtype
        torch.testing.assert_close(terms.detach().double(), record[key], rtol=1e-5, atol=0)
    total = sum(terms.sum() for terms in found)
    assert total.item() == pytest.approx(float(record["loss_total"]), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_official_code(recorded, names, case):
    record = recorded(case)
    z = logits_of(record, names)
    supervision, decoder, encoder = terms_of(record, z)
    kl = decoder.sum() + encoder.sum()
    grads = torch.autograd.grad(kl, list(z.values()), retain_graph=True, allow_unused=True)
    for name, grad in zip(names, grads, strict=True):
        if name == "main":
            assert grad is None
            assert not record["gradkl_main"].any()
            continue
        torch.testing.assert_close(grad, record[f"gradkl_{name}"], rtol=0, atol=1e-5)
    assert grads[names.index("dec1")].abs().max() > 1e-4  # teachers learn too
    assert grads[names.index("enc4")].abs().max() > 1e-4
    (kl + supervision.sum()).backward()
    for name in names:
        torch.testing.assert_close(z[name].grad, record[f"grad_{name}"], rtol=0, atol=1e-5)


def oracle_dice_ce(z, label):
    """The equations, one sample and class at a time."""
    batch, classes = z.shape[:2]
    dice, ce = [], []
    for b in range(batch):
        p = z[b].exp() / z[b].exp().sum(0, keepdim=True)
        for k in range(classes):
            y = (label[b] == k).to(z.dtype)
            ratio = (2 * (p[k] * y).sum() + 1e-5) / (p[k].sum() + y.sum() + 1e-5)
            dice.append(1 - ratio)
            ce.append(-(p[k].log() * y).sum())
    return torch.stack(dice).mean() + torch.stack(ce).sum() / label.numel()


@pytest.mark.parametrize("size", [(5,), (3, 4), (3, 4, 2)])
def test_dice_ce_is_its_equation(size):
    torch.manual_seed(0)
    z = (3 * torch.randn(2, 4, *size, dtype=torch.float64)).requires_grad_()
    label = torch.randint(0, 3, (2, *size))  # class 3 is absent
    found, expected = dice_ce(z, prepare(label, z)), oracle_dice_ce(z, label)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (found, expected)))


def test_dice_ce_is_monais():
    torch.manual_seed(0)
    z = torch.randn(2, 8, 17, 16, 15)
    label = torch.randint(0, 8, (2, 1, 17, 16, 15))
    found = []
    for loss in (
        lambda z: dice_ce(z, prepare(label, z)),
        DiceCELoss(to_onehot_y=True, softmax=True),
    ):
        leaf = z.clone().requires_grad_()
        value = loss(leaf) if loss.__class__.__name__ == "function" else loss(leaf, label)
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-10)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    z = [torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    target = prepare(torch.randint(0, 3, (2, 2, 3)), z[0])
    assert torch.autograd.gradcheck(lambda x: dice_ce(x, target), z[0])
    weights = torch.tensor([0.3, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: (distillation(x[:2], x[2]) * weights).sum(), z)


def test_the_graph_can_be_used_twice():
    z = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = dice_ce(z, prepare(torch.zeros(1, 4, 4), z))
    first = torch.autograd.grad(loss, z, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, z)[0], first)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("background", [True, False])
def test_distillation_is_its_equation(temperature, background):
    torch.manual_seed(0)
    s, t = (torch.randn(2, 4, 3, 2, dtype=torch.float64) for _ in range(2))
    first = 0 if background else 1
    q, p = ((x[:, first:] / temperature).exp() for x in (s, t))
    q, p = q / q.sum(1, keepdim=True), p / p.sum(1, keepdim=True)
    expected = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    found = distillation([s, t], t, temperature=temperature, include_background=background)
    torch.testing.assert_close(found, torch.stack([expected, torch.zeros_like(expected)]))


def test_a_detached_teacher_gets_no_gradient():
    s, t = (torch.randn(1, 3, 4, 4, requires_grad=True) for _ in range(2))
    distillation([s], t, detach_teacher=True).sum().backward()
    assert t.grad is None
    assert s.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("channel", [True, False])
def test_labels_of_any_kind_give_the_same_loss(dtype, channel):
    torch.manual_seed(0)
    z = torch.randn(2, 3, 4, 5, 3)
    label = torch.randint(0, 3, (2, 4, 5, 3))
    expected = dice_ce(z, prepare(label, z))
    given = (label[:, None] if channel else label).to(dtype)
    assert torch.equal(dice_ce(z, prepare(given, z)), expected)


def test_a_missing_class_is_finite():
    z = torch.randn(1, 4, 5, 5, requires_grad=True)
    loss = dice_ce(z, prepare(torch.zeros(1, 5, 5), z))
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    torch.manual_seed(0)
    wide = [80 * torch.randn(1, 4, 6, 6).clamp(-1, 1) for _ in range(2)]
    z = [x.to(dtype).requires_grad_() for x in wide]
    label = torch.randint(0, 4, (1, 6, 6))
    with torch.autocast("cpu", dtype=dtype):
        kl = distillation([z[0]], z[1])
        dce = dice_ce(z[0], prepare(label, z[0]))
    (kl.sum() + dce).backward()
    assert all(x.grad.isfinite().all() and x.grad.dtype == dtype for x in z)
    exact = [x.detach().float() for x in z]
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(kl.float(), distillation(exact[:1], exact[1]), rtol=rounding, atol=0)
    reference = dice_ce(exact[0], prepare(label, exact[0]))
    torch.testing.assert_close(dce.float(), reference, rtol=rounding, atol=0)


def test_sums_over_large_volumes_keep_their_digits():
    z = torch.zeros(1, 2, 160, 160, 160)  # 4 million voxels in one class
    found = dice_ce(z, prepare(torch.zeros(1, 160, 160, 160, dtype=torch.uint8), z)).item()
    count = 160**3
    dice = [1 - (count + 1e-5) / (1.5 * count + 1e-5), 1 - 1e-5 / (0.5 * count + 1e-5)]
    assert found == pytest.approx(sum(dice) / 2 + math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("label", "fault"),
    [
        (torch.full((1, 1, 4, 4), 3), r"label \(1, 1, 4, 4\): value 3 is not one of the 3 classes"),
        (torch.full((1, 4, 4), -1), r"label \(1, 4, 4\): value -1 is not one of the 3 classes"),
        (torch.full((1, 4, 4), 0.5), r"label \(1, 4, 4\): value 0.5 is not a whole number"),
        (torch.zeros(1, 4, 5), r"label \(1, 4, 5\) does not fit logits \(1, 3, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4), r"label \(2, 1, 4, 4\) does not fit logits"),
    ],
)
def test_wrong_labels_are_named(label, fault):
    with pytest.raises(InputError, match=fault):
        prepare(label, torch.zeros(1, 3, 4, 4))


def test_cross_entropy_part_survives_certain_mistakes():
    """A probability that underflows must not make the loss infinite."""
    z = torch.tensor([[[[200.0]], [[0.0]]]], requires_grad=True)
    loss = dice_ce(z, prepare(torch.ones(1, 1, 1), z))
    loss.backward()
    assert loss.item() == pytest.approx(200 + 1.0, rel=1e-4)
    expected = F.softmax(z.detach(), 1) - torch.tensor([0.0, 1.0])[None, :, None, None]
    torch.testing.assert_close(z.grad, expected)
