"""The shared layers and the well-known networks: padding, definitions, running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cohobate.ctr.nets import BST, DIN, HSTU, Common, Features, Layout, MeanMLP, TargetAttention
from cohobate.ctr.nets.layers import BatchNorm, DenseFeatures, Dice

NETWORKS = [MeanMLP, DIN, TargetAttention, BST, HSTU]
Settle = Callable[[nn.Module, Features], Any]


@pytest.mark.parametrize("kind", NETWORKS)
def test_padding_moves_no_logit(
    kind: Any, layout: Layout, common: Common, features: Features, settle: Settle
) -> None:
    network = kind(layout, common)
    settle(network, features)
    short = features._replace(
        history=features.history[:, -20:], history_time=features.history_time[:, -20:]
    )
    padded = short._replace(
        history=nn.functional.pad(short.history, (0, 0, 9, 0)),
        history_time=nn.functional.pad(short.history_time, (9, 0)),
    )
    with torch.no_grad():
        torch.testing.assert_close(network(*short), network(*padded), atol=1e-5, rtol=0)
        assert (network(*short) - network(*features)).abs().max() > 1e-4  # behaviours matter


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_users_without_behaviours_give_finite_numbers(
    kind: Any, training: bool, layout: Layout, common: Common, features: Features
) -> None:
    network = kind(layout, common).train(training)
    bare = features._replace(
        history=torch.zeros_like(features.history),
        history_time=torch.zeros_like(features.history_time),
    )
    logit = network(*bare)
    logit.square().sum().backward()
    assert torch.isfinite(logit).all()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_step_in_bf16_is_finite(
    kind: Any, layout: Layout, common: Common, features: Features
) -> None:
    network = kind(layout, common)
    with torch.autocast("cpu", torch.bfloat16):
        logit = network(*features)
        logit.square().sum().backward()
    assert logit.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_din_is_its_activation_unit_over_the_four_parts(
    layout: Layout, common: Common, features: Features, settle: Settle
) -> None:
    network = DIN(layout, common, attention=(6, 4))
    parts = [torch.randn(6, 24) * 0.3 for _ in range(4)]  # for [q, k, q - k, q * k]
    with torch.no_grad():
        network.query.weight.copy_(parts[0] + parts[2])
        network.key.weight.copy_(parts[1] - parts[2])
        network.product.weight.copy_(parts[3])
    settle(network, features)
    whole = torch.cat(parts, 1)
    with torch.no_grad():
        got = network.interest(features)
        for b in range(5):
            q = network.paired(features.candidate[b : b + 1])[0]
            total = torch.zeros(24)
            for step in range(40):
                if features.history[b, step, 0] == 0:
                    continue
                k = network.tokens(features.history[b : b + 1, step : step + 1])[0, 0]
                hidden = whole @ torch.cat([q, k, q - k, q * k]) + network.query.bias
                total += network.rest(network.first(hidden[None]))[0] * k
            torch.testing.assert_close(got[b], total, atol=1e-4, rtol=1e-4)


def test_hstu_is_its_equations(layout: Layout, common: Common, features: Features) -> None:
    network = HSTU(layout, common, blocks=1, heads=2)
    nn.init.normal_(network.bias.position)
    nn.init.normal_(network.bias.time)
    w = {k: v.detach().double().numpy() for k, v in network.state_dict().items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.0.weight"] + w[f"{name}.0.bias"]

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    got = network.interest(features).detach().numpy()
    for b in range(5):
        keep = features.history[b, :, 0] != 0
        x = torch.cat([network.tokens(features.history[b : b + 1])[0][keep],
                       network.paired(features.candidate[b : b + 1])])  # fmt: skip
        x = x.detach().double().numpy()
        t = torch.cat([features.history_time[b][keep], features.time[b : b + 1]]).numpy()
        gate, value, query, key = np.split(
            silu(norm(x, "norm_in") @ w["project.0.weight"].T + w["project.0.bias"]), 4, -1
        )
        last, mixed = len(x) - 1, np.zeros(24)
        for j in range(last + 1):
            bucket = min(int(np.log(max(abs(int(t[last] - t[j])), 1)) / 0.301), 128)
            bias = w["bias.position"][j - last + network.bias.tokens - 1] + w["bias.time"][bucket]
            for h in (slice(0, 12), slice(12, 24)):
                mixed[h] += silu(query[last, h] @ key[j, h] + bias) * value[j, h]
        u = norm(mixed / (last + 1), "norm_out") * gate[last]
        expected = x[last] + u @ w["out.0.weight"].T + w["out.0.bias"]
        np.testing.assert_allclose(got[b], expected, atol=1e-4)


def test_batch_norm_is_torchs_with_a_biased_running_variance() -> None:
    ours, theirs = BatchNorm(3), nn.BatchNorm1d(3, eps=1e-3)
    x = torch.randn(50, 3) * 2 + 1
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.var, x.var(0, correction=0))
    torch.testing.assert_close(ours.mean, x.mean(0))
    with pytest.raises(ValueError, match="two rows"):
        ours(x[:1])


@pytest.mark.parametrize("kind", [BatchNorm, Dice])
def test_running_statistics_forget_the_first_batches(kind: Any) -> None:
    layer, noise = kind(1), torch.tensor([[-1.0], [1.0]])
    for _ in range(100):
        layer(noise)
    assert layer.mean.item() == pytest.approx(0, abs=1e-6)
    for _ in range(60):
        layer(noise + 5)
    assert layer.mean.item() > 4.9  # the plain average would be 1.9


def test_zeros_among_dense_features_can_mean_missing() -> None:
    layer = DenseFeatures(2, zero_is_missing=True)
    with torch.no_grad():
        layer.missing.copy_(torch.tensor([3.0, -3.0]))
        layer.scale.copy_(torch.tensor([2.0, 1.0]))
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 4.0]])
    raw = torch.tensor([[3.0, 1.0], [4.0, -3.0], [2.0, 4.0]])
    expected = (raw - raw.mean(0)) / (raw.var(0, correction=0) + 1e-3).sqrt()
    torch.testing.assert_close(layer(x), torch.tanh(expected))
