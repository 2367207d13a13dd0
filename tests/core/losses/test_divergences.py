"""Divergences against a float64 oracle written from the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from cohobate.core.errors import InputError
from cohobate.core.losses import KINDS, divergence, forward_kl, kl

BETA = 0.3


def kl_rows(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def oracle(kind, student, teacher, temperature=1.0, class_dim=1):
    """Divergence of every item, in float64, from the textbook formulas."""
    z_s, z_t = (np.moveaxis(np.float64(z), class_dim, -1) / temperature for z in (student, teacher))
    q, p = np.exp(log_softmax(z_s, -1)), np.exp(log_softmax(z_t, -1))
    if kind == "forward_kl":
        return kl_rows(p, q)
    if kind == "reverse_kl":
        return kl_rows(q, p)
    if kind == "jeffreys":
        return kl_rows(p, q) + kl_rows(q, p)
    if kind == "jensen_shannon":
        m = BETA * p + (1 - BETA) * q
        return BETA * kl_rows(p, m) + (1 - BETA) * kl_rows(q, m)
    if kind == "skewed_kl":
        return kl_rows(p, BETA * p + (1 - BETA) * q)
    if kind == "skewed_reverse_kl":
        return kl_rows(q, BETA * q + (1 - BETA) * p)
    return 0.5 * np.abs(p - q).sum(-1)


def logits(shape, dtype=torch.float64, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return z.requires_grad_(requires_grad)


# one shape per memory layout the evaluation distinguishes
LAYOUTS = {
    "maps": ((2, 5, 3, 4, 2), 1, False),
    "rows": ((3, 4, 7), -1, False),
    "wide rows": ((6, 40), -1, False),
    "middle": ((2, 3, 33, 5), 2, False),
    "channels last": ((2, 5, 3, 4), 1, True),
}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("mask", ["none", "bool", "weights"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_value_is_the_oracles(kind, dtype, tolerance, mask, temperature):
    for layout in LAYOUTS:
        check_value(kind, dtype, tolerance, mask, temperature, layout)


def check_value(kind, dtype, tolerance, mask, temperature, layout):
    shape, class_dim, last = LAYOUTS[layout]
    student, teacher = logits(shape, dtype, 1), logits(shape, dtype, 2)
    if last:
        student = student.to(memory_format=torch.channels_last)
    items = oracle(kind, student.double(), teacher.double(), temperature, class_dim)
    weight = None
    if mask != "none":
        weight = torch.rand(items.shape, generator=torch.Generator().manual_seed(3))
        weight = weight > 0.4 if mask == "bool" else weight * (weight > 0.4)
    w = np.ones(items.shape) if weight is None else weight.double().numpy()
    expected = temperature**2 * (w * items).sum() / (w != 0).sum()
    loss = divergence(
        student,
        teacher,
        kind,
        beta=BETA,
        temperature=temperature,
        class_dim=class_dim,
        weight=weight,
    )
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_student_and_teacher(kind, layout):
    shape, class_dim, last = LAYOUTS[layout]
    student, teacher = logits(shape, seed=1), logits(shape, seed=2)
    if last:
        student = student.to(memory_format=torch.channels_last)
    weight = torch.rand([n for d, n in enumerate(shape) if d != class_dim % len(shape)])
    weight = weight.double() * (weight > 0.3)

    def loss(s, t):
        return divergence(
            s, t, kind, beta=BETA, temperature=2.0, class_dim=class_dim, weight=weight
        )

    inputs = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences_of_every_entry(kind):
    student = logits((2, 3, 2), seed=1, requires_grad=True)
    teacher = logits((2, 3, 2), seed=2, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, t: divergence(s, t, kind, beta=BETA, reduction="none"), (student, teacher)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wants", [(True, False), (False, True), (True, True)])
def test_gradient_flows_only_where_asked(kind, wants):
    student = logits((4, 5), seed=1, requires_grad=wants[0])
    teacher = logits((4, 5), seed=2, requires_grad=wants[1])
    divergence(student, teacher, kind).backward()
    assert [z.grad is not None for z in (student, teacher)] == list(wants)
    for z in (student, teacher):
        if z.grad is not None:
            assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_many_blocks_equal_one(kind, monkeypatch):
    student, teacher = logits((2, 5, 31), torch.float32, 1), logits((2, 5, 31), torch.float32, 2)

    def run():
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss = divergence(s, t, kind, beta=BETA, reduction="none")
        loss.square().sum().backward()
        return loss.detach(), s.grad, t.grad

    whole = run()
    monkeypatch.setattr("cohobate.core.losses.divergences._CPU_BLOCK", 35)  # 7 items at a time
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_all_masked_is_zero_with_a_graph(kind):
    student, teacher = logits((3, 4), requires_grad=True), logits((3, 4), seed=1)
    loss = divergence(student, teacher, kind, weight=torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(3, 4, dtype=torch.float64))


def test_no_items_is_zero_with_a_graph():
    student = torch.zeros(0, 4, requires_grad=True)
    loss = forward_kl(student, torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_items_left_out_may_hold_anything(kind):
    student, teacher = logits((3, 4)), logits((3, 4), seed=1)
    student[1], teacher[1] = torch.nan, torch.inf
    student.requires_grad_()
    keep = torch.tensor([True, False, True])
    loss = divergence(student, teacher, kind, weight=keep)
    loss.backward()
    part = divergence(student.detach()[keep], teacher[keep], kind)
    assert loss.item() == pytest.approx(part.item(), rel=1e-12)
    assert student.grad.isfinite().all()
    assert student.grad[1].count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_parts_with_the_global_count_add_up(kind):
    student, teacher = logits((10, 6)), logits((10, 6), seed=1)
    weight = torch.tensor([1, 0, 2, 1, 1, 0, 0, 0.5, 1, 1], dtype=torch.float64)
    whole = divergence(student, teacher, kind, weight=weight)
    parts = sum(
        divergence(student[i], teacher[i], kind, weight=weight[i], num_items=7)
        for i in (slice(0, 3), slice(3, 10))
    )
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_give_zero_and_shifts_do_not_matter(kind):
    student = logits((4, 5), requires_grad=True)
    loss = divergence(student, student.detach() + 7, kind)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert student.grad.abs().max() < 1e-14 or kind == "total_variation"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_logits_stay_finite_under_autocast(kind, dtype):
    student = torch.tensor([[80.0, -80.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-80.0, 80.0, 0.0]], dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = divergence(student, teacher, kind)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    if kind == "forward_kl":
        assert loss.item() == pytest.approx(160, rel=1e-2)


def test_temperature_squared_is_explicit():
    student, teacher = logits((3, 4)), logits((3, 4), seed=1)
    with_t2 = forward_kl(student, teacher, temperature=3.0)
    without = forward_kl(student, teacher, temperature=3.0, t_squared=False)
    assert with_t2.item() == pytest.approx(9 * without.item(), rel=1e-12)


def test_named_functions_are_the_kinds():
    student, teacher = logits((3, 4)), logits((3, 4), seed=1)
    for kind in KINDS:
        mixing = {"jensen_shannon": {"beta": BETA}, "skewed": {"alpha": BETA}}
        options = mixing.get(kind, mixing["skewed"] if kind.startswith("skewed") else {})
        named = getattr(kl, kind)(student, teacher, **options)
        assert named.item() == pytest.approx(oracle(kind, student, teacher).mean(), rel=1e-12)


def test_limits_of_the_mixing_weight():
    student, teacher = logits((3, 4)), logits((3, 4), seed=1)
    forward, reverse = forward_kl(student, teacher), kl.reverse_kl(student, teacher)
    small = kl.jensen_shannon(student, teacher, beta=1e-7) / 1e-7
    large = kl.jensen_shannon(student, teacher, beta=1 - 1e-7) / 1e-7
    assert small.item() == pytest.approx(forward.item(), rel=1e-5)
    assert large.item() == pytest.approx(reverse.item(), rel=1e-5)
    assert kl.skewed_kl(student, teacher, alpha=0.0).item() == pytest.approx(forward.item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_equals_eager(kind, masked):
    weight = torch.tensor([1.0, 0.0, 2.0]) if masked else None
    student, teacher = logits((3, 4), torch.float32), logits((3, 4), torch.float32, 1)
    if masked:
        student[1] = torch.nan

    def loss(s, t):
        return divergence(s, t, kind, beta=BETA, temperature=2.0, weight=weight)

    torch.compiler.reset()
    results = []
    for f in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        s = student.clone().requires_grad_()
        value = f(s, teacher)
        value.backward()
        results.append((value.detach(), s.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": torch.zeros(3, 5)}, "teacher: logits"),
        ({"weight": torch.ones(4)}, "weight: shape"),
        ({"kind": "kld"}, "kind: unknown divergence 'kld'"),
        ({"kind": "jensen_shannon", "beta": 1.0}, "beta: 1.0"),
        ({"kind": "skewed_kl", "beta": -0.1}, "alpha: -0.1"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"class_dim": 2}, "class_dim: 2"),
        ({"num_items": 3, "reduction": "none"}, "num_items"),
    ],
)
def test_bad_input_is_named(arguments, message):
    defaults = {"student": torch.zeros(3, 4), "teacher": torch.zeros(3, 4), "kind": "forward_kl"}
    with pytest.raises(InputError, match=message):
        divergence(**(defaults | arguments))


def test_weights_may_learn():
    student, teacher = logits((3, 4)), logits((3, 4), seed=1)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    forward_kl(student, teacher, weight=weight).backward()
    items = oracle("forward_kl", student, teacher)
    np.testing.assert_allclose(weight.grad.numpy(), items / 3, rtol=1e-12)


def test_closed_form():
    """Against the uniform distribution over C classes the KL is log C minus the entropy."""
    teacher = logits((1, 6))
    log_p = torch.log_softmax(teacher, 1)
    entropy = -(log_p.exp() * log_p).sum().item()
    uniform = torch.zeros(1, 6, dtype=torch.float64)
    assert forward_kl(uniform, teacher).item() == pytest.approx(math.log(6) - entropy, rel=1e-12)
