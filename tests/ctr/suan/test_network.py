"""SUAN and LightSUAN: padding, causality, the sparse pattern, cached scoring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.ctr.nets import Common, Features, Layout
from cohobate.ctr.nets.layers import RelativeBias
from cohobate.ctr.suan.attention import GatheredReach, MaskedReach, sparse_pattern
from cohobate.ctr.suan.network import GRADES, SUAN, LightSUAN
from cohobate.ctr.suan.serving import one_user, score_one_by_one, score_parallel, score_repeated

Settle = Callable[[torch.nn.Module, Features], Any]
NETWORKS = [
    lambda layout, common: SUAN(layout, common, blocks=2),
    lambda layout, common: SUAN(layout, common, blocks=2, pooling="split"),
    lambda layout, common: LightSUAN(layout, common, blocks=2, window=3, dilation=4),
    lambda layout, common: LightSUAN(layout, common, blocks=2, window=3, dilation=4, gathered=True),
    lambda layout, common: LightSUAN(
        layout, common, blocks=2, window=3, dilation=4, dense_target=True
    ),
]
IDS = ["suan", "split", "masked", "gathered", "dense-target"]


def pad(features: Features, slots: int) -> Features:
    return features._replace(
        history=torch.nn.functional.pad(features.history, (0, 0, slots, 0)),
        history_time=torch.nn.functional.pad(features.history_time, (slots, 0)),
    )


def empty(features: Features) -> Features:
    return features._replace(
        history=torch.zeros_like(features.history),
        history_time=torch.zeros_like(features.history_time),
    )


@pytest.mark.parametrize("make", NETWORKS, ids=IDS)
@pytest.mark.parametrize("slots", [1, 7, 64])
def test_padding_moves_no_logit(
    make: Callable[..., SUAN], slots: int, layout: Layout, common: Common, settle: Settle
) -> None:
    network = make(replace(layout, length=104), replace(common, length=104))
    features = layout.example(5)
    settle(network, features)
    with torch.no_grad():
        difference = network(*features) - network(*pad(features, slots))
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("make", NETWORKS, ids=IDS)
@pytest.mark.parametrize("behaviours", [0, 1])
def test_short_histories_give_finite_logits_and_gradients(
    make: Callable[..., SUAN], behaviours: int, layout: Layout, common: Common
) -> None:
    features = empty(layout.example(5))
    if behaviours:
        whole = layout.example(5)
        features.history[:, -1], features.history_time[:, -1] = (
            whole.history[:, -1],
            whole.history_time[:, -1],
        )
    network = make(layout, common)
    logits = network(*features)
    logits.square().sum().backward()
    assert torch.isfinite(logits).all()
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("make", NETWORKS, ids=IDS)
def test_bf16_autocast_is_finite_and_close(
    make: Callable[..., SUAN], layout: Layout, common: Common, features: Features
) -> None:
    network = make(layout, common)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(*features)
        logits.sum().backward()
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    torch.testing.assert_close(logits, network(*features), atol=0.3, rtol=0.1)


def float64_oracle(network: SUAN, x: Tensor, times: Tensor, valid: Tensor, u: Tensor) -> np.ndarray:
    """The stack with token loops in float64, from the equations; returns the last token."""
    w = {k: v.detach().double().numpy() for k, v in network.state_dict().items()}
    out = []
    for b in range(len(x)):
        keep = valid[b].numpy()
        t, h, profile = times[b].numpy()[keep], x[b].detach().double().numpy()[keep], u[b]
        out.append(_sample(network, w, h, t, profile.detach().double().numpy())[-1])
    return np.stack(out)


def _sample(
    network: SUAN, w: dict[str, np.ndarray], x: np.ndarray, t: np.ndarray, u: np.ndarray
) -> np.ndarray:
    n, width = x.shape
    heads = network.blocks[0].attention.heads
    bias = np.full((n, n), -np.inf)
    for i in range(n):
        for j in range(i + 1):
            k, r = network.window, network.dilation
            if r is None or i - j < k or (i - j) % r == 0:
                bucket = min(int(np.log(max(abs(int(t[i] - t[j])), 1)) / 0.301), 128)
                bias[i, j] = w["bias.position"][j - i + network.bias.tokens - 1]
                bias[i, j] += w["bias.time"][bucket]

    def norm(h: np.ndarray, g: np.ndarray) -> np.ndarray:
        return g * h / (np.sqrt((h**2).mean(-1, keepdims=True)) + 1e-6)

    def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, extra: Any) -> np.ndarray:
        out, size = [], width // heads
        for i in range(heads):
            s = slice(i * size, (i + 1) * size)
            scores = q[:, s] @ k[:, s].T / np.sqrt(size) + extra
            e = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(e / e.sum(-1, keepdims=True) @ v[:, s])
        return np.concatenate(out, -1)

    for i in range(len(network.blocks)):
        p = f"blocks.{i}."
        x0 = norm(x, w[p + "norms.0.gamma"])
        q, k, v = np.split(x0 @ w[p + "attention.qkv.weight"].T, 3, -1)
        x1 = norm(
            attend(q, k, v, bias) @ w[p + "attention.out.weight"].T + x0, w[p + "norms.1.gamma"]
        )
        k, v = np.split(u @ w[p + "cross.keys_values.weight"].T, 2, -1)
        cross = attend(x1 @ w[p + "cross.query.weight"].T, k, v, 0.0)
        cross = cross @ w[p + "cross.out.weight"].T
        both = x1 + cross
        means = np.repeat(both.mean(0, keepdims=True), n, 0)
        if network.pooling == "split" and n > 1:
            means[:-1] = both[:-1].mean(0)
        z = np.maximum(means @ w[p + "align.reduce.weight"].T, 0)
        a, b = np.split(z @ w[p + "align.gate.weight"].T, 2, -1)
        gate = np.exp(a) / (np.exp(a) + np.exp(b))
        x2 = norm(gate * x1 + (1 - gate) * cross + x1, w[p + "norms.2.gamma"])
        up = x2 @ w[p + "feed.up.weight"].T + w[p + "feed.up.bias"]
        gate, value = np.split(up, 2, -1)
        hidden = gate / (1 + np.exp(-gate)) * value
        x = hidden @ w[p + "feed.down.weight"].T + w[p + "feed.down.bias"] + x2
    return x


@pytest.mark.parametrize("make", NETWORKS[:4], ids=IDS[:4])
def test_the_stack_is_the_equations(
    make: Callable[..., SUAN], layout: Layout, common: Common
) -> None:
    network = make(layout, common)
    torch.nn.init.normal_(network.bias.position)  # large enough to matter
    torch.nn.init.normal_(network.bias.time)
    f = layout.example(3)
    width = common.width(layout)
    x = torch.randn(3, 21, width, generator=torch.Generator().manual_seed(0))
    times = torch.cat([f.history_time[:, -20:], f.time[:, None]], 1)
    valid = torch.ones(3, 21, dtype=torch.bool)
    valid[0, :8] = False
    u = network.table(f.profile)
    last = network.encode(x, times, valid, u)[:, -1]
    expected = float64_oracle(network, x, times, valid, u)
    np.testing.assert_allclose(last.detach().numpy(), expected, atol=2e-5)


def test_a_behaviour_does_not_change_what_came_before(layout: Layout, common: Common) -> None:
    network = SUAN(layout, common, blocks=1)
    # the gate pools over all tokens by design: closed here, so that attention alone speaks
    torch.nn.init.zeros_(network.blocks[0].align.gate.weight)
    x, times = torch.randn(2, 10, 24), torch.arange(10).expand(2, 10) * 1000
    valid, u = torch.ones(2, 10, dtype=torch.bool), torch.randn(2, 3, 8)
    before = network.encode(x, times, valid, u)
    changed = x.clone()
    changed[:, 6] += 1
    after = network.encode(changed, times, valid, u)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amin((0, 2)).min() > 0


def test_the_pattern_is_its_definition_for_all_lengths() -> None:
    for n in range(1, 65):
        for k, r in ((1, 1), (4, 4), (3, 5), (16, 4), (64, 7), (1, 64)):
            pattern = sparse_pattern(n, k, r)
            for i in range(n):
                seen = [j for j in range(i + 1) if i - j < k or (i - j) % r == 0]
                assert pattern[i].nonzero()[:, 0].tolist() == seen


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 33, 64, 257])
@pytest.mark.parametrize(
    ("window", "dilation"), [(1, 1), (4, 4), (3, 5), (16, 16), (5, 3), (300, 2)]
)
def test_gathered_attention_equals_masked(tokens: int, window: int, dilation: int) -> None:
    torch.manual_seed(0)
    bias = RelativeBias(tokens)
    torch.nn.init.normal_(bias.position)
    torch.nn.init.normal_(bias.time)
    times = torch.randint(1, 10_000, (2, tokens)).cumsum(1)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[0, : tokens // 3] = False
    qkv = [torch.randn(2, 2, tokens, 6, requires_grad=True) for _ in range(3)]
    cotangent = torch.randn(2, 2, tokens, 6)
    results = []
    for gathered in (False, True):
        if gathered:
            reach = GatheredReach(bias, times, valid, window, dilation)
        else:
            reach = MaskedReach(bias, times, valid, sparse_pattern(tokens, window, dilation))
        out = reach.attend(*qkv)
        gradients = torch.autograd.grad((out * cotangent).sum(), [*qkv, bias.position, bias.time])
        results.append((out, *gradients))
    for masked, gathered in zip(*results, strict=True):
        torch.testing.assert_close(gathered, masked, atol=1e-5, rtol=1e-5)


def test_a_wide_window_is_dense_attention(
    layout: Layout, common: Common, features: Features, settle: Settle
) -> None:
    torch.manual_seed(0)
    dense = SUAN(layout, common, blocks=2, pooling="split")
    light = LightSUAN(layout, common, blocks=2, window=100, gathered=True)
    light.load_state_dict(dense.state_dict())
    settle(dense, features)
    settle(light, features)
    torch.testing.assert_close(light(*features), dense(*features), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", NETWORKS[1:], ids=IDS[1:])
@pytest.mark.parametrize("candidates", [1, 7, 100])
def test_scoring_at_once_equals_one_by_one(
    make: Callable[..., SUAN],
    candidates: int,
    layout: Layout,
    common: Common,
    features: Features,
    settle: Settle,
) -> None:
    network = make(layout, common)
    settle(network, features)
    user, ids = one_user(layout, candidates)
    alone = score_one_by_one(network, user, ids)
    together = score_parallel(network, user, ids)
    assert (alone - together).abs().max() < 1e-5
    assert (alone - score_repeated(network, user, ids)).abs().max() < 1e-5
    assert candidates == 1 or alone.std() > 1e-4  # the candidates do differ
    order = torch.randperm(candidates)
    shuffled = score_parallel(network, user, ids[:, order])
    assert (shuffled - together[:, order]).abs().max() < 1e-5


def test_scoring_takes_users_with_padding_and_own_times(
    layout: Layout, common: Common, features: Features, settle: Settle
) -> None:
    network = LightSUAN(layout, common, blocks=2, window=3, dilation=4)
    settle(network, features)
    for f in (features, empty(features)):  # the last row of the example has half a history
        ids = torch.randint(1, layout.ids, (5, 3, layout.candidate))
        times = f.time[:, None] + torch.tensor([0, 60, 7200])
        with torch.no_grad():
            together = network.score(network.encode_user(f), ids, times)
            for i in range(3):
                alone = network(*f._replace(candidate=ids[:, i], time=times[:, i]))
                assert (alone - together[:, i]).abs().max() < 1e-5


def test_a_pooling_that_looks_at_the_candidate_cannot_be_cached(
    layout: Layout, common: Common, features: Features
) -> None:
    with pytest.raises(InputError, match="pooling 'split'"):
        SUAN(layout, common).encode_user(features)


def test_match_uses_the_behaviours_own_fields(
    layout: Layout, common: Common, features: Features
) -> None:
    network = SUAN(layout, common, candidate="match")
    token = network.target(features.candidate)
    expected = network.table(features.candidate).flatten(1)
    torch.testing.assert_close(token[:, :16], expected)
    assert (token[:, 16:] == 0).all()  # the third behaviour field has no partner
    assert network(*features).shape == (5,)


def test_grades_set_size_and_length(layout: Layout) -> None:
    long = replace(layout, length=400)
    for name, grade in GRADES.items():
        network = SUAN(long, Common(head=(8,)), grade=name)
        assert len(network.blocks) == grade.blocks
        assert network.dim == grade.dim
        assert network.length == min(grade.length, 400)
    with pytest.raises(InputError, match="'g9'"):
        SUAN(layout, grade="g9")
    with pytest.raises(InputError, match="heads 7"):
        SUAN(layout, heads=7)


def test_a_shorter_network_sees_the_newest_behaviours(
    layout: Layout, common: Common, features: Features, settle: Settle
) -> None:
    network = SUAN(layout, replace(common, length=10))
    settle(network, features)
    recent = features._replace(
        history=features.history[:, -10:], history_time=features.history_time[:, -10:]
    )
    torch.testing.assert_close(network(*features), network(*recent))


def test_parameters_of_a_block() -> None:
    layout = Layout(100, 6, 14, 5, (0, 1, 2, 3, 4))
    block = SUAN(layout, Common(head=(4,))).blocks[0]
    # the paper's Ele.me width: D = 40, d = 8
    assert sum(p.numel() for p in block.parameters()) == 26_240
