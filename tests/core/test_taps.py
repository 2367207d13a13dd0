from __future__ import annotations

import pytest
import torch
from torch import nn

from cohobate.core.errors import InputError
from cohobate.core.taps import Taps, adapter


class Pair(nn.Module):
    def forward(self, x):
        return x, 2 * x


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), Pair())


def test_takes_outputs_inputs_and_tuple_entries_with_their_graph() -> None:
    network = net()
    x = torch.randn(4, 2)
    with Taps(network, {"out": "0", "in": "1:input", "second": "2:1"}) as taps:
        first, second = network(x)
        assert torch.equal(taps["out"], network[0](x))
        assert torch.equal(taps["in"], taps["out"])
        assert torch.equal(taps["second"], second)
        taps["second"].sum().backward()
    assert network[0].weight.grad is not None
    assert first.shape == (4, 3)


def test_a_shared_layer_is_found_by_each_of_its_names() -> None:
    layer = nn.Linear(2, 2)
    network = nn.Sequential(layer, layer)
    x = torch.randn(1, 2)
    with Taps(network, {"again": "1"}) as taps:
        out = network(x)
        assert torch.equal(taps["again"], out)


def test_nothing_stays_after_the_block() -> None:
    network = net()
    taps = Taps(network, {"out": "0"})
    with taps:
        network(torch.zeros(1, 2))
    network(torch.zeros(1, 2))
    with pytest.raises(KeyError, match="did not run"):
        taps["out"]
    assert not network[0]._forward_hooks


def test_a_wrong_path_suggests_the_right_one() -> None:
    network = nn.ModuleDict({"encoder": nn.Linear(1, 1)})
    with pytest.raises(InputError, match="no layer 'encodr', did you mean 'encoder'"):
        Taps(network, {"x": "encodr"})
    with pytest.raises(InputError, match="'input' or a number"):
        Taps(network, {"x": "encoder:output"})


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        ((2, 4), (2, 6), "auto"),
        ((2, 5, 4), (2, 5, 6), "linear"),
        ((2, 4, 8), (2, 6, 4), "auto"),
        ((2, 4, 8, 8), (2, 6, 8, 8), "auto"),
        ((2, 4, 8, 8), (2, 6, 16, 12), "auto"),
        ((2, 4, 4, 4, 4), (2, 6, 8, 8, 8), "conv"),
        ((2, 4, 8, 8), (2, 4, 8, 8), "auto"),
    ],
)
def test_an_adapter_brings_the_student_to_the_teachers_shape(student, teacher, kind) -> None:
    module = adapter(torch.zeros(student), torch.zeros(teacher), kind)
    assert module(torch.zeros(student)).shape == teacher
    assert isinstance(module, nn.Identity) == (student == teacher)


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [((2, 4), (2, 4, 3), "auto"), ((2, 5, 4), (2, 6, 4), "linear"), ((2, 4), (2, 5), "conv")],
)
def test_shapes_that_do_not_fit_are_named(student, teacher, kind) -> None:
    with pytest.raises(InputError, match=r"student \(2, "):
        adapter(torch.zeros(student), torch.zeros(teacher), kind)
