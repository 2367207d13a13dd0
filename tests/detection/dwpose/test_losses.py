from __future__ import annotations

import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.detection.dwpose import SimCC, feature_loss, simcc_distillation, simcc_loss

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def logits(record, dtype=torch.float32):
    found = SimCC(*(record[f"pred_{axis}"].to(dtype).requires_grad_() for axis in "xy"))
    return found, SimCC(record["gt_x"].to(dtype), record["gt_y"].to(dtype))


@pytest.mark.parametrize("case", range(3))
def test_task_loss_of_the_official_code(cases, case):
    record = cases("losses")[case]
    student, target = logits(record)
    options = {"beta": float(record["beta"]), "label_softmax": bool(record["label_softmax"])}
    loss = simcc_loss(student, target, record["weight"], **options)
    torch.testing.assert_close(loss, record["kpt_loss"], **CLOSE)
    for axis, grad in zip("xy", torch.autograd.grad(loss, student), strict=True):
        torch.testing.assert_close(grad, record[f"kpt_grad_{axis}"], **CLOSE)


@pytest.mark.parametrize("case", range(3))
def test_logit_loss_of_the_official_code(cases, case):
    record = cases("losses")[case]
    student, _ = logits(record)
    teacher = SimCC(record["teacher_x"].requires_grad_(), record["teacher_y"].requires_grad_())
    loss = simcc_distillation(student, teacher, beta=float(record["beta"]))
    torch.testing.assert_close(loss, record["kd_loss"], **CLOSE)
    for axis, grad in zip("xy", torch.autograd.grad(loss, student, retain_graph=True), strict=True):
        torch.testing.assert_close(grad, record[f"kd_grad_{axis}"], **CLOSE)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None, None)


@pytest.mark.parametrize("case", range(2))
def test_feature_loss_of_the_official_code(cases, case):
    record = cases("feature_loss")[case]
    student = record["student"].requires_grad_()
    wanted, features = [student], student
    if "align_weight" in record:
        wanted.append(record["align_weight"].requires_grad_())
        features = torch.nn.functional.conv2d(student, wanted[1], record["align_bias"])
    loss = feature_loss(features, record["teacher"], alpha=float(record["alpha"]))
    torch.testing.assert_close(loss, record["loss"], **CLOSE)
    grads = torch.autograd.grad(loss, wanted)
    for grad, name in zip(grads, ("grad_student", "grad_align_weight"), strict=False):
        torch.testing.assert_close(grad, record[name], **CLOSE)


def oracle(student, target, weight, beta):
    """The card's formula by loops, in float64."""
    total = 0.0
    for s, g in zip(student, target, strict=True):
        for b in range(s.shape[0]):
            for k in range(s.shape[1]):
                p = torch.softmax(beta * g[b, k].double(), 0)
                q = torch.log_softmax(beta * s[b, k].double(), 0)
                total += float(weight[b, k]) * float((p * (p.log() - q)).mean())
    return total / student.x.shape[1]


@pytest.mark.parametrize("beta", [1.0, 10.0])
@pytest.mark.parametrize("seen", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_task_loss_against_loops(dtype, seen, beta):
    draw = torch.Generator().manual_seed(1)
    student = SimCC(*(torch.randn(3, 4, n, generator=draw).to(dtype) for n in (6, 8)))
    target = SimCC(*(torch.rand(3, 4, n, generator=draw).to(dtype) for n in (6, 8)))
    weight = (torch.rand(3, 4, generator=draw) < seen).float()
    loss = simcc_loss(student, target, weight, beta=beta)
    assert loss.dtype == dtype
    wanted = oracle(student, target, weight, beta)
    assert float(loss) == pytest.approx(wanted, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_reference_batch_size_makes_the_loss_independent_of_the_batch():
    draw = torch.Generator().manual_seed(2)
    student = SimCC(torch.randn(1, 3, 8, generator=draw), torch.randn(1, 3, 8, generator=draw))
    target = SimCC(torch.rand(1, 3, 8, generator=draw), torch.rand(1, 3, 8, generator=draw))
    weight = torch.ones(1, 3)
    one = simcc_loss(student, target, weight, reference_batch_size=64)
    four = simcc_loss(
        *(SimCC(*(axis.repeat(4, 1, 1) for axis in s)) for s in (student, target)),
        weight.repeat(4, 1), reference_batch_size=64,
    )  # fmt: skip
    torch.testing.assert_close(one, four)
    plain = simcc_loss(student, target, weight)
    torch.testing.assert_close(one, plain * 64)


def test_gradcheck():
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randn(2, 2, 4, generator=draw, dtype=torch.float64) for _ in range(4)]
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    inputs = tuple(row.clone().requires_grad_() for row in rows[:2])
    other = SimCC(*rows[2:])
    assert torch.autograd.gradcheck(lambda x, y: simcc_loss(SimCC(x, y), other, weight), inputs)
    assert torch.autograd.gradcheck(lambda x, y: simcc_distillation(SimCC(x, y), other), inputs)
    features = torch.randn(2, 3, 2, 2, generator=draw, dtype=torch.float64)
    shifted = (features + 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: feature_loss(x, features, alpha=0.5), (shifted,))


def test_shapes_that_do_not_fit_are_named():
    one = SimCC(torch.zeros(1, 2, 4), torch.zeros(1, 2, 6))
    other = SimCC(torch.zeros(1, 2, 4), torch.zeros(1, 2, 5))
    with pytest.raises(InputError, match=r"SimCC y: .*\(1, 2, 6\).*\(1, 2, 5\)"):
        simcc_distillation(one, other)
    with pytest.raises(InputError, match=r"weight: shape \(1, 3\), needs \(1, 2\)"):
        simcc_loss(one, one, torch.ones(1, 3))
    with pytest.raises(InputError, match="features"):
        feature_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, 3))
