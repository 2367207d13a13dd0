"""The stand-in for mmcv's compiled operators."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

pytest.importorskip("mmdet")
pytest.importorskip("cohobate.detection.d_fine.mmdet")

from mmcv import ops
from mmcv.ops.multi_scale_deform_attn import (
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)
from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss
from mmengine.logging import HistoryBuffer

from cohobate.detection.d_fine.mmdet import compat

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not compat.stand_in(), reason="mmcv's operators are compiled"),
]


def test_compiled_operators_are_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = ModuleType(compat.EXTENSION)
    compiled.__spec__ = ModuleSpec(compat.EXTENSION, None)
    monkeypatch.setitem(sys.modules, compat.EXTENSION, compiled)
    assert not compat.stand_in()
    assert sys.modules[compat.EXTENSION] is compiled


def test_an_operator_that_is_not_written_names_itself() -> None:
    with pytest.raises(NotImplementedError, match=r"roi_align_forward.*compiled"):
        ops.roi_align(torch.rand(1, 1, 8, 8), torch.tensor([[0.0, 0, 0, 4, 4]]), 2)


class Attribute:
    """Pickled as the attribute of a class, as mmengine's log pickles its methods."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (HistoryBuffer, self.name)


def test_a_checkpoint_is_read_as_data(tmp_path: Path) -> None:
    log = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"log": log, "one": np.float64(3.0)}, tmp_path / "good.pth")
    found = torch.load(tmp_path / "good.pth", weights_only=True)
    assert found["log"].data[0].tolist() == [1.0, 2.0]
    assert found["log"].statistics("mean") == 1.5
    torch.save(Attribute("min"), tmp_path / "method.pth")
    assert torch.load(tmp_path / "method.pth", weights_only=True) is HistoryBuffer.min
    torch.save(Attribute("__subclasses__"), tmp_path / "bad.pth")
    with pytest.raises(UnpicklingError, match="__subclasses__"):
        torch.load(tmp_path / "bad.pth", weights_only=True)


@pytest.mark.parametrize("offset", [0, 1])
def test_nms(offset: int) -> None:
    torch.manual_seed(0)
    corner = torch.randint(0, 20, (40, 2)).float()
    boxes = torch.cat([corner, corner + torch.randint(5, 20, (40, 2))], 1)
    scores = torch.rand(40)
    found, kept = ops.nms(boxes, scores, 0.5, offset=offset)
    true = torchvision.ops.nms(boxes + torch.tensor([0, 0, offset, offset]), scores, 0.5)
    assert kept.tolist() == true.tolist()
    assert torch.equal(found, torch.cat([boxes, scores[:, None]], 1)[true])
    assert 1 < len(kept) < 40


def test_deformable_attention_as_a_device_would_call_it() -> None:
    torch.manual_seed(0)
    shapes = torch.tensor([[4, 5], [2, 3]])
    starts = torch.tensor([0, 20])
    inputs = [torch.rand(2, 26, 2, 3), torch.rand(2, 7, 2, 2, 3, 2), torch.rand(2, 7, 2, 2, 3)]
    inputs = [x.double().requires_grad_() for x in inputs]
    value, places, weights = inputs
    true = multi_scale_deformable_attn_pytorch(value, shapes.tolist(), places, weights)
    found = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, places, weights, 64)
    torch.testing.assert_close(found, true)
    upstream = torch.rand_like(true)
    for a, b in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(true, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
        assert a.abs().sum() > 0


@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_as_a_device_would_call_it(weighted: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 4, requires_grad=True)
    target = torch.tensor([0, 1, 4, 3, 2, 4])
    weight = torch.rand(4) if weighted else None
    found = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "sum")
    one_hot = torch.nn.functional.one_hot(target, 5)[:, :4]
    rows = py_sigmoid_focal_loss(logits, one_hot, gamma=2.0, alpha=0.25, reduction="none")
    if weight is not None:
        rows = rows * torch.cat([weight, torch.ones(1)])[target][:, None]
    torch.testing.assert_close(found, rows.sum())
    grads = [torch.autograd.grad(x, logits)[0] for x in (found, rows.sum())]
    torch.testing.assert_close(*grads)
