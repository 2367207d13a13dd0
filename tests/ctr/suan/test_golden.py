"""Every layer, block, stack, encoder and tower against arrays of the released TensorFlow layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cohobate.ctr.metrics import auc, calibrate, log_loss
from cohobate.ctr.nets import Common, Layout
from cohobate.ctr.nets.layers import BatchNorm, Head, RelativeBias, causal_scores, time_bucket
from cohobate.ctr.suan.blocks import (
    UAB,
    CrossAttention,
    DualAlignment,
    RMSNorm,
    SelfAttention,
    SwiGLU,
)
from cohobate.ctr.suan.network import SUAN

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {k: torch.from_numpy(np.asarray(v)) for k, v in arrays.items()}


def put(parameter: Tensor, value: Tensor) -> None:
    assert parameter.shape == value.shape
    with torch.no_grad():
        parameter.copy_(value)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def fill_self(layer: SelfAttention, g: dict[str, Tensor], prefix: str = "") -> None:
    put(layer.qkv.weight, torch.cat([g[prefix + f"w{c}"] for c in "qkv"], 1).T)
    put(layer.out.weight, g[prefix + "wo"].T)


def fill_cross(layer: CrossAttention, g: dict[str, Tensor], prefix: str = "") -> None:
    put(layer.query.weight, g[prefix + "wq"].T)
    put(layer.keys_values.weight, torch.cat([g[prefix + "wk"], g[prefix + "wv"]], 1).T)
    put(layer.out.weight, g[prefix + "wo"].T)


def fill_align(layer: DualAlignment, reduce: Tensor, own: Tensor, cross: Tensor) -> None:
    put(layer.reduce.weight, reduce.T)
    put(layer.gate.weight, torch.cat([own, cross], 1).T)


def fill_feed(layer: SwiGLU, g: dict[str, Tensor], prefix: str = "") -> None:
    put(layer.up.weight, torch.cat([g[prefix + "w1"], g[prefix + "w2"]], 1).T)
    put(layer.up.bias, torch.cat([g[prefix + "b1"], g[prefix + "b2"]]))
    put(layer.down.weight, g[prefix + "w3"].T)
    put(layer.down.bias, g[prefix + "b3"])


def fill_block(block: UAB, g: dict[str, Tensor], index: int) -> None:
    p = f"block{index}_"
    for norm, name in zip(block.norms, ("g1", "g2", "g3"), strict=True):
        put(norm.gamma, g[p + name])
    fill_self(block.attention, g, p + "sa_")
    fill_cross(block.cross, g, p + "ca_")
    fill_align(block.align, g[p + "da_reduce"], g[p + "da_self"], g[p + "da_cross"])
    fill_feed(block.feed, g, p + "ff_")


def stack(g: dict[str, Tensor], layers: int, width: int, profile: int, tokens: int) -> SUAN:
    """A SUAN whose token width and embedding width are those of the arrays."""
    fields = width // profile
    network = SUAN(
        Layout(10, 6, 14, 5, tuple(range(fields)), dense=2, length=tokens - 1),
        blocks=layers,
        heads=int(g["heads"]),
        compat="official",
        common=Common(dim=profile, head=(4,)),
    )
    if fields * profile != width:  # the arrays' width need not be a multiple: rebuild the blocks
        network.blocks = nn.ModuleList(
            UAB(width, profile, int(g["heads"]), compat="official") for _ in range(layers)
        )
    for i, block in enumerate(network.blocks):
        fill_block(block, g, i)
    # the encoder's table is one entry longer on either side than its tokens can use
    network.bias = RelativeBias(tokens, int(g["num_buckets"]))
    put(network.bias.position, g["pos_w"][: 2 * tokens - 1])
    put(network.bias.time, g["ts_w"])
    return network


@pytest.mark.parametrize("name", ["rmsnorm_0", "rmsnorm_1"])
def test_rmsnorm(name: str) -> None:
    g = load(name)
    layer = RMSNorm(g["gamma"].numel(), float(g["eps"]))
    put(layer.gamma, g["gamma"])
    x = g["x"].requires_grad_()
    y = layer(x)
    y.backward(g["gy"])
    close(y, g["y"])
    # an all-zero row has a gradient of about 1e6: compare relative to its size
    close(x.grad / g["dx"].abs().clamp(min=1), g["dx"] / g["dx"].abs().clamp(min=1))
    close(layer.gamma.grad, g["dgamma"])


@pytest.mark.parametrize("name", ["swiglu_0", "swiglu_1"])
def test_swiglu(name: str) -> None:
    g = load(name)
    layer = SwiGLU(g["x"].shape[-1])
    fill_feed(layer, g)
    x = g["x"].requires_grad_()
    y = layer(x)
    y.backward(g["gy"])
    close(y, g["y"])
    close(x.grad, g["dx"])


@pytest.mark.parametrize("name", ["relbias_0", "relbias_1"])
def test_relative_bias(name: str) -> None:
    g = load(name)
    times, n, buckets = g["timestamps"], g["timestamps"].shape[1], int(g["num_buckets"])
    layer = RelativeBias(n, buckets)
    put(layer.position, g["pos_w"])
    put(layer.time, g["ts_w"])
    index = torch.arange(n)
    bias = layer(times, times, index - index[:, None])
    bias.backward(g["gbias"])
    assert torch.equal(
        time_bucket(times[:, :, None] - times[:, None], buckets), g["buckets"].long()
    )
    close(bias, g["bias"])
    close(layer.position.grad, g["dpos_w"])
    close(layer.time.grad, g["dts_w"])


def test_mask() -> None:
    g = load("mask_0")
    assert torch.equal((causal_scores(g["ids"] != 0) != 0).float(), g["mask"].float())


class _Given:
    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)


@pytest.mark.parametrize("name", ["selfattn_0", "selfattn_1"])
def test_self_attention(name: str) -> None:
    g = load(name)
    layer = SelfAttention(g["x"].shape[-1], int(g["heads"]))
    fill_self(layer, g)
    x, bias = g["x"].requires_grad_(), g["bias"].requires_grad_()
    y = layer(x, _Given(bias[:, None] + causal_scores(g["ids"] != 0)))
    (y * g["gy"] * g["valid"]).sum().backward()
    close(y, g["y"])
    close(x.grad, g["dx"])
    close(bias.grad, g["dbias"])


@pytest.mark.parametrize("name", ["crossattn_0", "crossattn_1"])
def test_cross_attention(name: str) -> None:
    g = load(name)
    profile = g["profile"].requires_grad_()
    x = g["x"].requires_grad_()
    layer = CrossAttention(x.shape[-1], profile.shape[-1], int(g["heads"]), "official")
    fill_cross(layer, g)
    y = layer(x, profile)
    y.backward(g["gy"])
    close(y, g["y"])
    close(x.grad, g["dx"])
    close(profile.grad, g["dprofile"])


@pytest.mark.parametrize("name", ["dualalign_0", "dualalign_1"])
def test_dual_alignment(name: str) -> None:
    g = load(name)
    own, cross = g["x_self"].requires_grad_(), g["x_cross"].requires_grad_()
    layer = DualAlignment(own.shape[-1])
    fill_align(layer, g["w_reduce"], g["w_self"], g["w_cross"])
    y = layer(own, cross, lambda x: x.mean(1, keepdim=True))
    y.backward(g["gy"])
    close(y, g["y"])
    close(own.grad, g["dx_self"])
    close(cross.grad, g["dx_cross"])


@pytest.mark.parametrize("name", ["uab_0", "uab_1", "stack_0"])
def test_block_and_stack(name: str) -> None:
    g = load(name)
    x, profile = g["x"].requires_grad_(), g["profile"].requires_grad_()
    network = stack(g, int(g["num_layers"]), x.shape[-1], profile.shape[-1], x.shape[1])
    y = network.encode(x, g["timestamps"], g["ids"] != 0, profile)
    (y[:, -1] * g["glast"]).sum().backward()
    close(y, g["y"], 2e-5)
    close(x.grad, g["dx"], 2e-5)
    close(profile.grad, g["dprofile"], 2e-5)


def test_whole_encoder() -> None:
    g = load("encoder_0")
    profile = g["emb_user"]
    network = stack(g, int(g["num_layers"]), 20, 4, 7)
    put(network.project.weight, g["target_w"].T)
    put(network.project.bias, g["target_b"])
    put(network.time.weight, g["time_w"].T)
    put(network.time.bias, g["time_b"])
    put(network.position, g["pos_table"])
    norm = BatchNorm(2).eval()
    for ours, theirs in zip(
        (norm.weight, norm.bias, norm.mean, norm.var),
        ("bn_gamma", "bn_beta", "bn_mean", "bn_var"),
        strict=True,
    ):
        put(ours, g[theirs])
    fields = ("shop", "item", "category", "aoi", "hour")
    behaviours = torch.cat([g[f"emb_seq_{f}"] for f in fields], -1)
    candidate = network.project(g["emb_item"].flatten(1))
    hours = torch.cat([g["emb_seq_hour"], g["emb_item"][:, -1:]], 1)
    tokens = torch.cat([behaviours, candidate[:, None]], 1) + network.time(hours) + network.position
    ids = torch.cat([g["seq_shop_ids"], g["item_ids"][:, :1]], 1)
    times = torch.cat([g["seq_hours"], g["item_ids"][:, -1:]], 1)
    last = network.encode(tokens, times, ids != 0, profile)[:, -1]
    out = torch.cat(
        [
            norm(g["dense"]),
            last,
            profile.flatten(1),
            g["emb_item"].flatten(1),
            g["emb_context"].flatten(1),
        ],
        1,
    )
    close(out, g["features"], 2e-5)


@pytest.mark.parametrize("name", ["tower_eval_0", "tower_train_0"])
def test_tower(name: str) -> None:
    g = load(name)
    x = g["x"].requires_grad_()
    widths = [g["b0"].numel(), g["b1"].numel()]
    tower = Head(x.shape[1], widths).train(bool(g["training"]))
    for i, (linear, norm, dice) in enumerate(tower.hidden):
        put(linear.weight, g[f"w{i}"].T)
        put(linear.bias, g[f"b{i}"])
        fill_norm(norm, g, f"bn{i}_")
        put(dice.alpha, g[f"dice{i}_alpha"])
        put(dice.mean, g[f"dice{i}_mean"][0])
        put(dice.std, g[f"dice{i}_std"][0])
        dice.batches.fill_(20_000)  # where the average is exponential
    put(tower.out.weight, g["w_out"].T)
    put(tower.out.bias, g["b_out"])
    fill_norm(tower.norm, g, "bn_out_")
    logit = tower(x)
    logit.backward(g["gy"][:, 0])
    close(logit, g["logit"][:, 0])
    close(x.grad, g["dx"])
    if bool(g["training"]):
        for i, (_, _, dice) in enumerate(tower.hidden):
            close(dice.mean, g[f"dice{i}_mean_after"][0])
            close(dice.std, g[f"dice{i}_std_after"][0])


def fill_norm(norm: BatchNorm, g: dict[str, Tensor], prefix: str) -> None:
    put(norm.weight, g[prefix + "gamma"])
    put(norm.bias, g[prefix + "beta"])
    put(norm.mean, g[prefix + "mean"])
    put(norm.var, g[prefix + "var"])


@pytest.mark.parametrize("name", ["metrics_0", "metrics_1"])
def test_metrics(name: str) -> None:
    g = load(name)
    preds, labels = g["preds"].double(), g["labels"]
    calibrated = calibrate(preds, float(g["sample_rate"]))
    close(calibrated, g["calibrated"].double(), 1e-6)
    assert float(auc(preds, labels)) == pytest.approx(float(g["auc_exact"]), abs=1e-12)
    assert float(auc(preds, labels)) == pytest.approx(float(g["auc_official"]), abs=1e-4)
    for p, key in ((preds, "logloss_official"), (calibrated, "logloss_official_calibrated")):
        # the authors clip nothing but predictions of exactly 0 and 1
        p = torch.where(p >= 1, 0.999, torch.where(p <= 0, 0.001, p))
        assert float(log_loss(p, labels)) == pytest.approx(float(g[key]), abs=1e-6)
