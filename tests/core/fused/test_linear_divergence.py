"""One definition, several evaluations: all equal to float64 in values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.core.fused import Probabilities, TopK, api, chunked, linear_divergence, rows
from cohobate.core.losses import KINDS

SOURCES = ("hidden", "logits", "probabilities", "topk", "none")
OPTIONS = {"beta": 0.3, "ce_weight": 0.7, "softcap": 3.0, "scale": 0.8}
# how a problem of 7 tokens and 11 classes is cut: whole, chunks of 2, tiles of 4 classes
CUTS = ("whole", "chunks", "tiles")


@pytest.fixture(params=CUTS)
def cut(request, monkeypatch):
    if request.param == "chunks":
        monkeypatch.setattr(chunked, "_SMALLEST_CHUNK", 1)
        monkeypatch.setattr(rows, "_CPU_BLOCK", 1)  # one row at a time
        monkeypatch.setattr(api, "CPU_BUDGET", 2 * 11 * 8)
    elif request.param == "tiles":
        monkeypatch.setattr(rows, "_CPU_BLOCK", 3 * 4)  # three rows at a time
        monkeypatch.setattr(api, "CPU_BUDGET", 7 * 4 * 8)  # seven tokens, four classes
    return request.param


def run(case, factor=1.0, **options):
    """Loss and gradients of the student's tensors."""
    for tensor in case.student:
        tensor.grad = None
    loss = linear_divergence(*case.operands(), **case.keywords(), **(OPTIONS | options))
    if loss.dim():
        factor = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)
    (loss * factor).sum().backward()
    return [loss.detach(), *(tensor.grad.clone() for tensor in case.student)]


def masks(n=7):
    return {
        "none": None,
        "bool": torch.arange(n) % 3 != 1,
        "weights": torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 3.0][:n]),
    }


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_definition(case, oracle, kind, source):
    problem = case(source)
    losses = oracle(problem, kind, 0.3, 2.0, 3.0, 0.8, 0.7)
    options = OPTIONS | problem.keywords()
    got = linear_divergence(
        *problem.operands(), kind=kind, tau=2.0, reduction="none", backend="reference", **options
    )
    np.testing.assert_allclose(got.detach().numpy(), losses, rtol=1e-11)
    weight = masks()["weights"]
    mean = linear_divergence(
        *problem.operands(), kind=kind, tau=2.0, weight=weight, backend="reference", **options
    )
    assert mean.item() == pytest.approx((weight.numpy() * losses).sum() / 5, rel=1e-11)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_equals_reference(case, kind, source, cut):
    problem = case(source)
    for tau in (1.0, 2.0):
        for weight in masks().values():
            for reduction in ("mean", "none"):
                options = {"kind": kind, "tau": tau, "weight": weight, "reduction": reduction}
                expected = run(problem, 1.5, backend="reference", **options)
                got = run(problem, 1.5, backend="chunked", **options)
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mask", ["none", "bool", "weights"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
def test_other_types_are_near_float64(case, source, mask, dtype, tolerance, cut):
    problem = case(source, dtype)
    twin = problem.double()
    for kind in KINDS:
        options = {"kind": kind, "tau": 2.0, "weight": masks()[mask]}
        expected = run(twin, backend="reference", **options)
        for got, exact in zip(run(problem, **options), expected, strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(
                got.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item()
            )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(case, source, reduction, cut):
    problem = case(source)
    weight = masks()["weights"]

    def loss(x, w, bias):
        return linear_divergence(
            x, w, problem.x_t, problem.w_t, bias_s=bias, bias_t=problem.bias_t,
            labels=problem.labels, weight=weight, reduction=reduction, tau=2.0, **OPTIONS | kind,
        )  # fmt: skip

    for name in KINDS:
        kind = {"kind": name}
        assert torch.autograd.gradcheck(loss, problem.student, fast_mode=True)


def test_gradcheck_of_every_entry(case):
    problem = case()
    weight = torch.tensor([1, 0, 1, 0, 0, 0, 2])
    assert torch.autograd.gradcheck(
        lambda x, w, bias: linear_divergence(
            x, w, problem.x_t, problem.w_t, bias_s=bias, weight=weight, kind="jensen_shannon"
        ),
        problem.student,
    )


@pytest.mark.parametrize("n", [1, 2, 130])
@pytest.mark.parametrize("v", [1, 2, 131])
def test_odd_sizes(case, n, v, monkeypatch):
    monkeypatch.setattr(chunked, "_SMALLEST_CHUNK", 4)
    for budget in (None, 1 << 13, 1 << 10):
        problem = case(n=n, v=v)
        expected = run(problem, backend="reference")
        for a, b in zip(run(problem, budget=budget), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_tokens_of_any_shape_and_memory_layout(case):
    problem = case(bias=False, labels=False)
    x = problem.x.detach()[:6].reshape(3, 2, 5).transpose(0, 1).requires_grad_()
    w = problem.w.detach().t().contiguous().t().requires_grad_()
    x_t = problem.x_t[:6].reshape(3, 2, 6).transpose(0, 1)
    weight = torch.tensor([[1.0], [2.0]])
    losses = []
    for backend in ("reference", "chunked"):
        x.grad = w.grad = None
        loss = linear_divergence(x, w, x_t, problem.w_t, weight=weight, backend=backend)
        items = linear_divergence(x, w, x_t, problem.w_t, reduction="none", backend=backend)
        assert items.shape == (2, 3)
        (loss + items.mean()).backward()
        losses.append((loss.detach(), items.detach(), x.grad, w.grad))
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_masked_is_zero_with_a_graph(case, source, reduction, cut):
    problem = case(source)
    got = run(problem, weight=torch.zeros(7), reduction=reduction)
    for tensor in got:
        assert tensor.count_nonzero() == 0


def test_no_tokens_is_zero_with_a_graph(case, cut):
    for tensor in run(case(n=0)):
        assert tensor.count_nonzero() == 0


@pytest.mark.parametrize("source", ["hidden", "logits", "probabilities", "topk"])
def test_tokens_left_out_may_hold_anything(case, source, cut):
    problem = case(source)
    keep = torch.arange(7) != 2
    expected = run(problem, weight=keep)
    with torch.no_grad():
        problem.x[2] = torch.nan
        values = problem.x_t.log_probs if source == "topk" else problem.x_t
        values = values.values if source == "probabilities" else values
        values[2] = torch.nan
    for a, b in zip(run(problem, weight=keep), expected, strict=True):
        assert torch.equal(a, b)


def test_ignored_labels_leave_their_tokens_out(case):
    problem = case()
    problem.labels[3] = -100
    expected = run(problem, weight=torch.arange(7) != 3)
    for a, b in zip(run(problem), expected, strict=True):
        assert torch.equal(a, b)


def test_a_frozen_head_gets_no_gradient(case):
    problem = case()
    expected = run(problem)
    problem.w.grad = None
    problem.w.requires_grad_(False)
    problem.student = [problem.x, problem.bias]
    got = run(problem)
    assert problem.w.grad is None
    torch.testing.assert_close(got, [expected[0], expected[1], expected[3]])


def test_nothing_is_formed_without_a_gradient(case, monkeypatch):
    problem = case()
    expected = run(problem)[0]
    monkeypatch.setattr(chunked, "_add_gradients", None)  # calling it would fail
    with torch.no_grad():
        loss = linear_divergence(*problem.operands(), **problem.keywords(), **OPTIONS)
    torch.testing.assert_close(loss, expected)


def test_parts_with_the_global_count_add_up(case):
    problem = case(bias=False)
    weight = masks()["weights"]
    whole = run(problem, weight=weight)
    total = [torch.zeros_like(t) for t in whole]
    for part in (slice(0, 3), slice(3, 7)):
        for tensor in problem.student:
            tensor.grad = None
        loss = linear_divergence(
            problem.x[part], problem.w, problem.x_t[part], problem.w_t,
            labels=problem.labels[part], weight=weight[part], num_items=5, **OPTIONS,
        )  # fmt: skip
        loss.backward()
        for t, new in zip(total, [loss.detach(), problem.x.grad, problem.w.grad], strict=True):
            t.add_(new)
    torch.testing.assert_close(total, whole)
    as_tensor = linear_divergence(
        *problem.operands(), labels=problem.labels, weight=weight, num_items=torch.tensor(5),
        **OPTIONS,
    )  # fmt: skip
    torch.testing.assert_close(as_tensor.detach(), whole[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_second_backward_pass_is_right(case, reduction, factor):
    problem = case()
    loss = linear_divergence(*problem.operands(), kind="reverse_kl", reduction=reduction).sum()
    loss = loss * factor
    gradients = []
    for keep in (True, True, False):
        problem.x.grad = problem.w.grad = None
        loss.backward(retain_graph=keep)
        gradients.append((problem.x.grad, problem.w.grad))
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_vocabularies_that_differ_by_padding(case):
    problem = case(v=11, labels=False)
    wider_w, wider_bias = torch.randn(13, 6).double(), torch.randn(13).double()
    wider_w[:11], wider_bias[:11] = problem.w_t, problem.bias_t
    with pytest.raises(InputError, match="w_t: 13 classes, the student has 11"):
        linear_divergence(problem.x, problem.w, problem.x_t, wider_w)
    cut = linear_divergence(
        problem.x, problem.w, problem.x_t, wider_w,
        bias_s=problem.bias, bias_t=wider_bias, num_classes=11,
    )  # fmt: skip
    whole = linear_divergence(*problem.operands(), **problem.keywords())
    torch.testing.assert_close(cut, whole)
    narrow = linear_divergence(problem.x, problem.w, torch.zeros(7, 12).double(), num_classes=5)
    narrow.backward()
    assert problem.w.grad[5:].count_nonzero() == 0


def test_top_of_all_classes_is_the_dense_divergence(case):
    problem = case("logits", bias=False, labels=False)
    log_probs = problem.x_t.log_softmax(1)
    every = TopK(torch.arange(11).expand(7, 11), log_probs, torch.full((7,), -torch.inf).double())
    for kind in KINDS:
        dense = linear_divergence(problem.x, problem.w, problem.x_t, kind=kind)
        for budget in (None, 200):
            topk = linear_divergence(problem.x, problem.w, every, kind=kind, budget=budget)
            torch.testing.assert_close(topk, dense)


def test_probabilities_are_taken_at_the_temperature(case):
    problem = case("logits", bias=False, labels=False)
    given = Probabilities((problem.x_t / 2).softmax(1))
    torch.testing.assert_close(
        linear_divergence(problem.x, problem.w, given, tau=2.0),
        linear_divergence(problem.x, problem.w, problem.x_t, tau=2.0),
    )


def test_large_logits_stay_finite(case, cut):
    problem = case(dtype=torch.float32, bias=False)
    with torch.no_grad():
        problem.x.mul_(100)
        problem.x_t.mul_(-100)
    for kind in KINDS:
        for tensor in run(problem, kind=kind, softcap=None):
            assert tensor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_operands_not_logits(case, dtype):
    problem = case(dtype=torch.float32)
    rounded = case(dtype=torch.float32)
    for tensor in (*rounded.student, rounded.x_t, rounded.w_t, rounded.bias_t):
        tensor.data = tensor.data.to(dtype).float()
    expected = run(rounded)
    with torch.autocast("cpu", dtype=dtype):
        got = run(problem)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_equals_eager(case, reduction):
    problem = case(dtype=torch.float32)
    weight = masks()["weights"]

    def loss(x, w, bias):
        return linear_divergence(
            x * 2, w, problem.x_t, problem.w_t, bias_s=bias, weight=weight, labels=problem.labels,
            reduction=reduction, kind="jensen_shannon",
        ).sum()  # fmt: skip

    torch.compiler.reset()
    results = []
    for f in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        for tensor in problem.student:
            tensor.grad = None
        value = f(*problem.student)
        (value * 1.5).backward()
        results.append([value.detach(), *(t.grad.clone() for t in problem.student)])
    torch.testing.assert_close(results[0], results[1])


def test_operators_follow_torchs_rules(case):
    problem = case(dtype=torch.float32)
    coef = torch.tensor([0.1, 0.0, 0.2, 0.1, 0.1, 0.0, 0.1])
    for op, wants in (
        (torch.ops.cohobate.linear_divergence.default, [True, True, True]),
        (torch.ops.cohobate.linear_divergence.default, [True, False, False]),
        (torch.ops.cohobate.linear_divergence_items.default, [True, True, True]),
    ):
        arguments = (
            problem.x.detach(), problem.w.detach(), problem.bias.detach(),
            [problem.x_t, problem.w_t], coef, problem.labels, "forward_kl", "hidden",
            [0.5, 1.0, 1.0, 0.5, 1.0, 1.0, 0.0, 0.0], 1 << 20, False, True, wants,
        )  # fmt: skip
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_it_exports(case):
    problem = case(dtype=torch.float32, bias=False, labels=False)

    class Loss(torch.nn.Module):
        def forward(self, x, w):
            return linear_divergence(x, w, problem.x_t, problem.w_t)

    operands = (problem.x.detach(), problem.w.detach())
    exported = torch.export.export(Loss(), operands)
    assert "cohobate.linear_divergence" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*operands), Loss()(*operands))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "kl"}, "kind: unknown"),
        ({"tau": 0.0}, "tau: 0.0"),
        ({"softcap": -1.0}, "softcap: -1.0"),
        ({"weight": torch.ones(3)}, "weight: shape"),
        ({"weight": torch.ones(7, requires_grad=True)}, "weight: requires a gradient"),
        ({"labels": torch.zeros(3)}, "labels: "),
        ({"bias_s": torch.zeros(3)}, "bias_s: "),
        ({"bias_t": torch.zeros(3)}, "bias_t: "),
        ({"num_classes": 12}, "num_classes: 12"),
        ({"x_t": torch.zeros(3, 6).double()}, "x_t: tokens"),
        ({"x_t": torch.zeros(7, 5).double()}, "w_t: "),
        ({"x_t": torch.zeros(7, 6)}, "w_t: torch.float64 does not match"),
        ({"x_t": torch.zeros(7, 12).double(), "w_t": None}, "x_t: 12 logits"),
        ({"x_t": Probabilities(torch.ones(7, 12)), "w_t": None}, "x_t: 12 probabilities"),
        ({"x_t": None, "w_t": None}, "x_t: neither"),
        ({"x_t": torch.zeros(7, 6, requires_grad=True)}, "the teacher gets no gradient"),
        (
            {"x_t": TopK(torch.zeros(7, 3), torch.zeros(7, 2), torch.zeros(7)), "w_t": None},
            "x_t: a TopK teacher needs",
        ),
    ],
)
def test_bad_input_is_named(case, change, message):
    problem = case(bias=False, labels=False)
    arguments = {"x_t": problem.x_t, "w_t": problem.w_t} | change
    with pytest.raises(InputError, match=message):
        linear_divergence(problem.x, problem.w, **arguments)
