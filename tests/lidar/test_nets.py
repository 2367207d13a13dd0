"""Networks against the recorded official ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cohobate.core.errors import InputError
from cohobate.lidar.nets import ImageNetwork, ResUNet, VoxelNet, build
from cohobate.lidar.nets.image import encoder_weights

Recorded = Callable[[str], dict[str, Any]]
Fill = Callable[[nn.Module], nn.Module]


@pytest.mark.parametrize("case", ["a", "b"])
def test_res16unet34c_equals_the_official_network(
    case: str, recorded: Recorded, fill: Fill
) -> None:
    z = recorded(f"sparse_res16unet34c_{case}")
    network = fill(ResUNet(1, int(z["out_channels"]), normalize=bool(z["normalize"])))
    network.train(bool(z["train_mode"]))
    with torch.no_grad():
        out = network(z["coords"], z["feats"])
    assert (out - z["out"]).abs().max() <= 1e-3 * z["out"].abs().max()
    if z["train_mode"]:
        state = network.state_dict()
        for key, name in (("bn0.bn", "bn0"), ("block1.0.norm1.bn", "block1_norm1")):
            expected = z[f"{name}_running_mean"]
            torch.testing.assert_close(state[f"{key}.running_mean"], expected, rtol=1e-4, atol=1e-6)


def test_res16unet34c_has_the_official_names_and_size() -> None:
    network = build("res16unet34c", 64)
    assert sum(p.numel() for p in network.parameters()) == 37_849_184
    shapes = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    expected = {
        "conv0p1s1.kernel": (27, 1, 32), "bn0.bn.weight": (32,), "bn0.bn.running_mean": (32,),
        "conv1p1s2.kernel": (8, 32, 32), "block1.0.conv1.kernel": (27, 32, 32),
        "block1.1.norm2.bn.bias": (32,), "conv2p2s2.kernel": (8, 32, 32),
        "block2.0.downsample.0.kernel": (32, 64), "block2.0.downsample.1.bn.weight": (64,),
        "conv3p4s2.kernel": (8, 64, 64), "conv4p8s2.kernel": (8, 128, 128),
        "block4.5.conv2.kernel": (27, 256, 256), "convtr4p16s2.kernel": (8, 256, 256),
        "bntr4.bn.weight": (256,), "block5.0.conv1.kernel": (27, 384, 256),
        "convtr5p8s2.kernel": (8, 256, 128), "convtr6p4s2.kernel": (8, 128, 96),
        "convtr7p2s2.kernel": (8, 96, 96), "block8.1.conv2.kernel": (27, 96, 96),
        "final.kernel": (96, 64), "final.bias": (1, 64),
    }  # fmt: skip
    assert {name: shapes.get(name) for name in expected} == expected
    kinds = {name.split(".")[0] for name in shapes}
    assert kinds == {
        "conv0p1s1", "bn0", "final", *(f"block{i}" for i in range(1, 9)),
        "conv1p1s2", "conv2p2s2", "conv3p4s2", "conv4p8s2", *(f"bn{i}" for i in range(1, 5)),
        "convtr4p16s2", "convtr5p8s2", "convtr6p4s2", "convtr7p2s2",
        *(f"bntr{i}" for i in range(4, 8)),
    }  # fmt: skip


def test_a_networks_output_has_the_order_of_its_input() -> None:
    torch.manual_seed(0)
    network = build("unet-small", 5).eval()
    places = torch.randint(-9, 9, (200, 3)).unique(dim=0)
    coordinates = torch.nn.functional.pad(places, (1, 0))
    features = torch.randn(len(places), 1)
    order = torch.randperm(len(places))
    with torch.no_grad():
        found = network(coordinates, features)
        shuffled = network(coordinates[order], features[order])
    torch.testing.assert_close(shuffled, found[order], rtol=1e-5, atol=1e-5)


def test_clouds_of_a_batch_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    network = build("unet-small", 3).eval()
    one = torch.nn.functional.pad(torch.randint(-5, 5, (60, 3)).unique(dim=0), (1, 0))
    two = one + torch.tensor([1, 0, 0, 0])
    x = torch.randn(len(one), 1)
    with torch.no_grad():
        alone = network(one, x)
        both = network(torch.cat([one, two]), torch.cat([x, torch.randn_like(x)]))
    torch.testing.assert_close(both[: len(one)], alone, rtol=1e-5, atol=1e-5)


def test_first_weights_are_drawn_as_minkowski_does() -> None:
    network = ResUNet()
    for name, fan in (("conv2p2s2", 32 * 8), ("convtr5p8s2", 128 * 8), ("final", 96)):
        largest = float(network.get_submodule(name).kernel.detach().abs().max())
        assert 0.95 / math.sqrt(fan) < largest <= 1 / math.sqrt(fan)


def test_voxelnet_equals_the_official_network(recorded: Recorded, fill: Fill) -> None:
    z = recorded("voxelnet_a")
    network = fill(VoxelNet()).eval()
    assert sum(p.numel() for p in network.parameters()) == 720_064
    batch = int(z["bev_shape"][0])
    with torch.no_grad():
        bev = network.bird_eye(z["voxel_coords_bzyx"], z["voxel_feats"], batch)
        points = network(z["voxel_coords_bzyx"], z["voxel_feats"], z["points_bxyzi"][:, :4])
    assert tuple(bev.shape) == tuple(z["bev_shape"].tolist())
    cell, row, column = z["bev_cells_byx"].long().unbind(1)
    torch.testing.assert_close(bev[cell, :, row, column], z["bev_values"], rtol=1e-5, atol=1e-5)
    assert (bev.abs().sum(1) > 0).sum() == len(cell)
    torch.testing.assert_close(points, z["point_feats"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "name"),
    [("dilation", "resnet50"), ("ppkt", "resnet50-stride32"), ("dino", "vit_small_p16")],
)
def test_image_networks_equal_the_official_ones(
    case: str, name: str, recorded: Recorded, fill: Fill
) -> None:
    z = recorded(f"image_{case}_a")
    network = fill(ImageNetwork(name)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        features = network(z["image"])
    torch.testing.assert_close(features, z["features"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("of", "prefix", "more"),
    [
        ("plain", "", {"fc.weight": torch.zeros(2)}),
        ("moco", "module.encoder_q.", {"module.encoder_q.fc.0.weight": torch.zeros(2)}),
        ("swav", "module.", {"module.prototypes.weight": torch.zeros(2)}),
        ("pixpro", "module.encoder.", {"module.projector.weight": torch.zeros(2)}),
    ],
)
def test_weights_of_self_supervised_methods(
    of: str, prefix: str, more: dict[str, torch.Tensor], tmp_path: Path, fill: Fill
) -> None:
    encoder = fill(ImageNetwork("resnet18-half")).encoder
    path = tmp_path / "weights.pth"
    state = {prefix + name: tensor for name, tensor in encoder.state_dict().items()}
    torch.save({"state_dict": {**state, **more}}, path)
    found = encoder_weights(ImageNetwork("resnet18-half").encoder, path, of)  # type: ignore[arg-type]
    assert set(found) == set(encoder.state_dict())
    assert torch.equal(found["conv1.weight"], encoder.conv1.weight)


def test_weights_of_another_method_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, path)
    encoder = ImageNetwork("resnet18-half").encoder
    with pytest.raises(InputError, match="from moco"):
        encoder_weights(encoder, path, "moco")
    with pytest.raises(InputError, match="no weights for"):
        encoder_weights(encoder, path, "plain")


def test_bad_networks() -> None:
    with pytest.raises(InputError, match="stages"):
        build("unet-small", 3, arguments={"encoder": [8]})
    with pytest.raises(InputError, match="network_args"):
        build("unet-small", 3, arguments={"depth": 3})
    with pytest.raises(InputError, match="VoxelNet takes none"):
        build("voxelnet", 3, arguments={"stem": 8})
    with pytest.raises(InputError, match="no voxel"):
        build("unet-small", 3)(torch.zeros(0, 4).long(), torch.zeros(0, 1))
    with pytest.raises(InputError, match="features"):
        build("unet-small", 3)(torch.zeros(1, 4).long(), torch.zeros(1, 2))
    with pytest.raises(InputError, match="outside the grid"):
        VoxelNet()(torch.tensor([[0, 50, 0, 0]]), torch.zeros(1, 4), torch.zeros(1, 4))
