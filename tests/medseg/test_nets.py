from __future__ import annotations

from typing import get_args

import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.medseg.nets import Backbone, build


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dynunet", 16_663_688),
        ("unetr", 101_805_448),
        ("swinunetr", 35_072_774),
        ("vnet", 45_621_976),
    ],
)
def test_presets_have_the_papers_sizes(name, parameters):
    with torch.device("cpu" if name == "swinunetr" else "meta"):  # meta: sizes without memory
        net = build(name, 1, 8, (96, 96, 96))
    assert sum(p.numel() for p in net.parameters()) == parameters


SMALL = {
    "dynunet": {"filters": [4, 8, 8, 8, 8]},
    "unetr": {"feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
    "swinunetr": {"feature_size": 12},
    "vnet": {},
    "basicunet": {"features": [4, 4, 8, 8, 8, 4]},
    "unet": {"channels": [4, 8, 8, 8, 8]},
    "segresnet": {"init_filters": 8},
}


@pytest.mark.parametrize("name", sorted(set(get_args(Backbone)) - {"swinunetr", "vnet"}))
def test_every_preset_segments(name):
    net = build(name, 2, 3, (32, 32, 32), SMALL[name]).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 2, 32, 32, 32)).shape == (1, 3, 32, 32, 32)


def test_levels_decide_the_strides():
    net = build("dynunet", 1, 2, (64, 64), {"filters": [4, 8, 8, 8, 8, 8]}).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 1, 64, 64)).shape == (1, 2, 64, 64)


def test_faults_are_named():
    with pytest.raises(InputError, match=r"backbone 'resnet': known are dynunet"):
        build("resnet", 1, 2, (32, 32, 32))
    with pytest.raises(InputError, match=r"backbone unet has no argument 'filters'"):
        build("unet", 1, 2, (32, 32, 32), {"filters": [1]})
    with pytest.raises(InputError, match=r"backbone vnet: "):
        build("vnet", 3, 2, (32, 32, 32))
