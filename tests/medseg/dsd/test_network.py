from __future__ import annotations

import copy
import zlib

import numpy as np
import pytest
import torch
from monai.networks import nets
from torch import nn

from cohobate.core.errors import InputError
from cohobate.medseg.dsd.losses import dice_ce, distillation, prepare
from cohobate.medseg.dsd.network import Head, Outputs, SelfDistilled, stage_paths
from cohobate.medseg.nets import build

CUBE = [[3, 3, 3]] * 5
STRIDES = [[1] * 3] + [[2] * 3] * 4


def official(name):
    """The networks of the recorded files, with the arguments of their README."""
    if name == "dynunet":
        return nets.DynUNet(
            3, 1, 8, kernel_size=CUBE, strides=STRIDES, upsample_kernel_size=STRIDES[1:],
            filters=[32, 64, 128, 256, 320], norm_name="instance", res_block=True,
        )  # fmt: skip
    if name == "unetr":
        return nets.UNETR(
            1, 4, img_size=(32, 32, 32), feature_size=16, hidden_size=192, mlp_dim=384, num_heads=6,
            proj_type="perceptron", norm_name="instance", res_block=True,
        )  # fmt: skip
    if name == "vnet":
        return nets.VNet(3, 1, 4)
    return nets.SwinUNETR(in_channels=1, out_channels=4, feature_size=12)


CLASSES = ["dynunet", "unetr", "vnet", "swinunetr"]
ADDED = {"dynunet": 8592, "unetr": 3600, "vnet": 4904 - 32 * 4 - 4 - 4 * 4 - 4, "swinunetr": 1336}


@torch.no_grad()
def fill(module, prefix=""):
    """Weights from names, as the recorded files define them."""
    for own, parameter in module.named_parameters():
        name = (prefix + own).replace("deconv.0.", "deconv.")
        rng = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
        v = rng.standard_normal(tuple(parameter.shape)).astype(np.float32)
        if v.ndim >= 2:
            v = v / np.sqrt(np.prod(v.shape[1:]))
        else:
            v = 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
        parameter.copy_(torch.from_numpy(v.astype(np.float32)))


def small(name="dynunet", size=(16, 16, 16), classes=3, args=None, **options):
    sizes = {
        "dynunet": {"filters": [4, 6, 8, 8]},
        "unetr": {"feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
        "basicunet": {"features": [4, 4, 8, 8, 8, 4]},
        "unet": {"channels": [4, 8, 8, 8, 8]},
        "segresnet": {"init_filters": 8},
        "swinunetr": {"feature_size": 12},
        "vnet": {},
    }
    torch.manual_seed(0)
    net = build(name, 1, classes, size, {**sizes[name], **(args or {})})
    return SelfDistilled(net, in_channels=1, out_channels=classes, roi_size=size, **options)


def backward(outputs):
    """All losses of the paper on a random label."""
    shape = outputs.main.shape
    target = prepare(torch.randint(0, shape[1], (shape[0], *shape[2:])), outputs.main)
    loss = torch.stack([dice_ce(z, target) for z in (outputs.main, *outputs.decoder)]).sum()
    if outputs.decoder:
        loss = loss + distillation(outputs.decoder[1:], outputs.decoder[0]).sum()
    if outputs.encoder:
        loss = loss + distillation(outputs.encoder[:-1], outputs.encoder[-1]).sum()
    loss.backward()


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 4])
def test_head_is_the_official_one(recorded, scale):
    record = recorded(f"head_s{scale}")
    head = Head(record["x"].shape[1], record["y"].shape[1], (scale,) * 3)
    own = {
        "conv_weight": head.conv.weight,
        "conv_bias": head.conv.bias,
        "deconv_weight": head.deconv[0].weight,
        "deconv_bias": head.deconv[0].bias,
    }
    for name, parameter in own.items():
        parameter.data.copy_(record[name])
    x = record["x"].requires_grad_()
    y = head(x)
    torch.testing.assert_close(y, record["y"], rtol=1e-5, atol=1e-5)
    y.backward(record["cotangent"])
    torch.testing.assert_close(x.grad, record["grad_x"], rtol=1e-4, atol=1e-5)
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, record[f"grad_{name}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1, 2, 4, 8, 16])
def test_one_deconvolution_is_used_again(scale):
    head = Head(5, 3, (scale,) * 3)
    assert len(head.deconv) == 1
    assert len(list(head.parameters())) == 4
    assert head.deconv[0].kernel_size == (1 if scale == 1 else 2,) * 3
    calls = []
    head.deconv[0].register_forward_hook(lambda *_: calls.append(1))
    assert head(torch.zeros(1, 5, 2, 2, 2)).shape == (1, 3, *(2 * scale,) * 3)
    assert len(calls) == max(1, scale.bit_length() - 1)


@pytest.mark.parametrize(
    ("stride", "kernels"),
    [
        ((4, 4, 2), [(2, 2, 2), (2, 2, 1)]),
        ((1, 8, 8), [(1, 2, 2)]),
        ((2, 1, 8), [(2, 1, 2), (1, 1, 2)]),
    ],
)
def test_unequal_strides_double_only_where_needed(stride, kernels):
    head = Head(4, 3, stride)
    assert [deconv.kernel_size for deconv in head.deconv] == kernels
    out = head(torch.zeros(1, 4, 3, 3, 3))
    assert out.shape == (1, 3, *(3 * s for s in stride))


@pytest.mark.parametrize(("upsample", "tensors"), [("deconv_once", 4), ("linear", 2)])
def test_other_ways_up(upsample, tensors):
    head = Head(4, 3, (4, 4, 4), upsample)
    assert len(list(head.parameters())) == tensors
    x = torch.randn(1, 4, 3, 2, 3)
    out = head(x)
    assert out.shape == (1, 3, 12, 8, 12)
    if upsample == "linear":
        torch.testing.assert_close(out[..., 0, 0, 0], head.conv(x)[..., 0, 0, 0])
        torch.testing.assert_close(out[..., -1, -1, -1], head.conv(x)[..., -1, -1, -1])


# --- whole networks -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_outputs_of_the_official_code(recorded, names, name):
    record = recorded(f"net_{name}")
    network = official(name)
    fill(network)
    shape, classes = tuple(record["x_shape"].tolist()), record["train_main"].shape[1]
    size = (64, 32, 32) if name == "swinunetr" else (32, 32, 32)  # for the dry run
    wrapped = SelfDistilled(network, in_channels=1, out_channels=classes, roi_size=size)
    fill(wrapped.heads, "head.")
    rng = np.random.RandomState(int(record["x_seed"]))
    x = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    torch.testing.assert_close(x.flatten()[:8], record["x_first8"])
    assert sum(p.numel() for p in network.parameters()) == int(record["n_params_backbone"])
    added = sum(p.numel() for p in wrapped.heads.parameters())
    assert added == ADDED[name]
    wrapped.train()
    for module in wrapped.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d | nn.Dropout3d):
            module.eval()
    with torch.no_grad():
        out = wrapped(x)
    step = (slice(None), slice(None), *(slice(None, None, int(record["stride"])),) * 3)
    found = dict(zip(names, (out.main, *out.decoder[::-1], *out.encoder), strict=True))
    for place, output in enumerate(names):
        z = found[output]
        torch.testing.assert_close(z[step], record[f"train_{output}"], rtol=0, atol=1e-4)
        stats = torch.stack([z.mean(), z.std(), z.abs().max()]).double()
        torch.testing.assert_close(stats, record["stats"][place], rtol=1e-3, atol=1e-4)
    wrapped.eval()
    with torch.no_grad():
        main = wrapped(x)
    torch.testing.assert_close(main[step], record["eval_main"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "share"),
    [*((name, "auto") for name in CLASSES), ("unetr", "always"), ("dynunet", "never")],
)
def test_every_head_learns(name, share):
    size = {"dynunet": (16, 16, 16), "swinunetr": (64, 32, 32)}.get(name, (32, 32, 32))
    wrapped = small(name, size, share_heads=share).train()
    image = torch.randn(2 if name == "vnet" else 1, 1, *size)
    backward(wrapped(image))
    for parameter in wrapped.heads.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    silent = {n for n, p in wrapped.network.named_parameters() if p.grad is None}
    if name == "unetr":  # MONAI's ViT holds a norm for an attention it does not use
        assert silent
        wrapped.network.zero_grad(set_to_none=True)
        wrapped.network(image).square().mean().backward()
        assert silent == {n for n, p in wrapped.network.named_parameters() if p.grad is None}
    else:
        assert not silent


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("basicunet", [1, 2, 4, 8], [2, 4, 8, 16]),
        ("unet", [2, 4, 8, 16], [2, 4, 8, 16]),
        ("segresnet", [1, 2, 4], [2, 4, 8]),
    ],
)
def test_stages_of_the_other_presets(name, encoder, decoder):
    wrapped = small(name, (32, 32, 32)).train()
    strides = {stage.name: stage.stride[0] for stage in wrapped.stages}
    assert [strides[f"enc{i}"] for i in range(1, len(encoder) + 1)] == encoder
    assert [strides[f"dec{i}"] for i in range(1, len(decoder) + 1)] == decoder
    assert len(strides) == len(encoder) + len(decoder)
    out = wrapped(torch.randn(1, 1, 32, 32, 32))
    assert all(z.shape == out.main.shape for z in (*out.decoder, *out.encoder))
    backward(out)


def test_more_levels_and_two_dimensions():
    args = {"filters": [4, 4, 8, 8, 8, 8]}
    wrapped = small("dynunet", (64, 64), args=args).train()
    out = wrapped(torch.randn(1, 1, 64, 64))
    assert len(out.decoder) == len(out.encoder) == 5
    assert wrapped.divisor == (32, 32)


def test_unequal_strides_of_a_network():
    strides = [[1, 1, 1], [2, 2, 1], [2, 2, 2], [2, 2, 1]]
    wrapped = small("dynunet", (16, 16, 8), args={"strides": strides}).train()
    assert wrapped.divisor == (8, 8, 2)
    out = wrapped(torch.randn(1, 1, 16, 16, 8))
    assert all(z.shape == (1, 3, 16, 16, 8) for z in (*out.decoder, *out.encoder))
    backward(out)


def test_shared_heads_are_one_object():
    wrapped = small("dynunet")
    assert list(wrapped.heads) == ["s1", "s2", "s4", "s8"]
    assert {s.name: s.head for s in wrapped.stages}["dec2"] == "s4"
    separate = small("dynunet", share_heads="never")
    assert len(separate.heads) == 6


def test_heads_of_a_dynunet_follow_its_initialisation():
    wrapped = small("dynunet", args={"filters": [8, 16, 32, 256]})
    head = wrapped.heads["s8"].conv
    assert (head.bias == 0).all()
    expected = (2 / (1 + 0.01**2) / 256) ** 0.5  # Kaiming normal, a = 0.01, fan in 256
    assert head.weight.std().item() == pytest.approx(expected, rel=0.15)


def test_paper_setting_adds_under_a_thousandth():
    filters = [32, 64, 128, 256, 320]
    wrapped = small("dynunet", (32, 32, 32), classes=8, args={"filters": filters})
    backbone = sum(p.numel() for p in wrapped.network.parameters())
    added = sum(p.numel() for p in wrapped.heads.parameters())
    assert (backbone, added) == (16_663_688, 8_592)
    assert added / backbone < 1e-3


# --- the wrapper's promises -----------------------------------------------------------------------


def test_training_gives_a_structure_and_evaluation_a_tensor():
    wrapped = small()
    x = torch.randn(1, 1, 16, 16, 16)
    assert isinstance(wrapped.train()(x), Outputs)
    with torch.no_grad():
        logits = wrapped.eval()(x)
        assert type(logits) is torch.Tensor
        assert torch.equal(logits, wrapped.network(x))


def test_nothing_is_kept_after_a_pass():
    wrapped = small().train()
    wrapped(torch.randn(1, 1, 16, 16, 16))
    assert wrapped.taps.all() == {}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in wrapped.network.modules())


@pytest.mark.parametrize("name", ["dynunet", "unetr"])
def test_backbone_weights_go_both_ways(name):
    wrapped = small(name, (16, 16, 16) if name == "dynunet" else (32, 32, 32))
    bare = copy.deepcopy(wrapped.network)
    for parameter in bare.parameters():
        parameter.data.add_(1)
    wrapped.network.load_state_dict(bare.state_dict(), strict=True)
    bare.load_state_dict(wrapped.network.state_dict(), strict=True)
    assert not any("head" in key for key in bare.state_dict())


def test_a_copy_stands_on_its_own():
    wrapped = small().train()
    other = copy.deepcopy(wrapped)
    with torch.no_grad():
        other.network.output_block.conv.conv.weight.zero_()
        x = torch.randn(1, 1, 16, 16, 16)
        assert other(x).decoder[0].shape == (1, 3, 16, 16, 16)
        assert not torch.equal(other(x).main, wrapped(x).main)


def test_the_dry_run_leaves_no_trace():
    torch.manual_seed(0)
    network = build("vnet", 1, 3, (32, 32, 32)).train()
    network.in_tr.eval()  # a user's own choice
    before = {k: v.clone() for k, v in network.state_dict().items()}
    state = torch.get_rng_state()
    SelfDistilled(
        network, in_channels=1, out_channels=3, roi_size=(32, 32, 32), encoder_heads=False,
        decoder_heads=False,
    )  # fmt: skip
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.in_tr.training
    assert network.down_tr32.training


def test_without_heads_the_output_is_the_networks():
    wrapped = small(encoder_heads=False, decoder_heads=False).train()
    out = wrapped(torch.randn(1, 1, 16, 16, 16))
    assert out.decoder == out.encoder == ()
    assert list(wrapped.heads) == []


class TwoStage(nn.Module):
    """A user's own network."""

    def __init__(self, stride=2):
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 3, padding=1)
        self.down = nn.Conv3d(4, 6, stride, stride)
        self.up = nn.ConvTranspose3d(6, 4, stride, stride)
        self.deep = nn.Conv3d(6, 6, 2, 2)
        self.back = nn.ConvTranspose3d(6, 6, 2, 2)
        self.out = nn.Conv3d(4, 3, 1)

    def forward(self, x):
        a = self.stem(x)
        b = self.down(a)
        c = self.back(self.deep(b)) + b
        return self.out(self.up(c) + a)


def own(network, **paths):
    return SelfDistilled(network, in_channels=1, out_channels=3, roi_size=(16, 16, 16), **paths)


def test_own_network_by_module_paths():
    wrapped = own(TwoStage(), encoder=["stem", "down"], decoder=["up:input", "deep"]).train()
    out = wrapped(torch.randn(1, 1, 16, 16, 16))
    assert len(out.encoder) == len(out.decoder) == 2
    backward(out)
    table = wrapped.table().splitlines()
    assert table[0].split() == ["stage", "module", "channels", "stride", "head"]
    assert "dec1   up:input  6         2×2×2   dec1" in table


# --- errors ---------------------------------------------------------------------------------------


def test_a_class_without_preset():
    with pytest.raises(InputError, match=r"TwoStage: no preset for this class; give the module"):
        own(TwoStage())
    with pytest.raises(InputError, match=r"Linear: no preset"):
        stage_paths(nn.Linear(1, 1))


def test_a_path_that_does_not_exist():
    with pytest.raises(InputError, match=r"TwoStage has no layer 'dwon', did you mean 'down'"):
        own(TwoStage(), encoder=["stem", "dwon"], decoder=["up"])


def test_a_stride_that_is_no_power_of_two():
    network = TwoStage(stride=3)
    with pytest.raises(InputError, match=r"stage 'down': feature size \(6, 6, 6\) at input size"):
        SelfDistilled(
            network, in_channels=1, out_channels=3, roi_size=(18, 18, 18),
            encoder=["stem", "down"], decoder=["down"],
        )  # fmt: skip


def test_a_size_the_network_refuses():
    with pytest.raises(InputError, match=r"DynUNet refuses an image of shape \(1, 1, 20, 20, 20\)"):
        small("dynunet", (20, 20, 20))
    with pytest.raises(InputError, match=r"SwinUNETR refuses an image of shape"):
        small("swinunetr", (48, 48, 48))


def test_an_image_that_does_not_fit():
    wrapped = small().train()
    with pytest.raises(InputError, match=r"image \(1, 1, 16, 16, 20\): every size must be divis"):
        wrapped(torch.zeros(1, 1, 16, 16, 20))
    with pytest.raises(InputError, match=r"image \(1, 2, 16, 16, 16\) has 2 channels"):
        wrapped(torch.zeros(1, 2, 16, 16, 16))


def test_a_network_with_its_own_supervision():
    args = {"deep_supervision": True, "deep_supr_num": 2}
    wrapped = small("dynunet", args=args).train()
    with pytest.raises(InputError, match=r"its own deep supervision must be off"):
        wrapped(torch.zeros(1, 1, 16, 16, 16))


def test_a_network_with_other_classes():
    with pytest.raises(InputError, match=r"TwoStage gives \(1, 3, 16, 16, 16\)"):
        SelfDistilled(
            TwoStage(), in_channels=1, out_channels=4, roi_size=(16, 16, 16),
            encoder=["stem"], decoder=["down"],
        )  # fmt: skip
