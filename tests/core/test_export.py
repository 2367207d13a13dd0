from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.core.export import export, load_student, to_onnx
from cohobate.core.testing import assert_export_round_trip


def test_the_exported_student_answers_the_same(trained: Path, tmp_path: Path) -> None:
    assert_export_round_trip(trained, tmp_path)


def test_the_hub_layout_is_complete(trained: Path, tmp_path: Path) -> None:
    export(trained, "hub", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["parameters"] == sum(p.numel() for p in load_student(tmp_path).parameters())
    card = (tmp_path / "README.md").read_text()
    assert "SYNTHETIC points" in card
    assert "| test/loss |" in card


@pytest.mark.parametrize("axes", [{0: "batch"}, {1: "length"}, {0: "batch", 1: "length"}])
def test_onnx_keeps_axes_open(tmp_path: Path, axes: dict[int, str]) -> None:
    path = to_onnx(nn.Linear(3, 2), (torch.zeros(1, 1, 3),), tmp_path / "x.onnx", open_axes=(axes,))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    shape = [7 if axis in axes else 1 for axis in (0, 1)]
    out = session.run(None, {session.get_inputs()[0].name: torch.zeros(*shape, 3).numpy()})
    assert out[0].shape == (*shape, 2)


def test_a_network_that_onnx_cannot_hold_is_one_line(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(InputError, match=r"x.onnx: torch .* cannot put .* into ONNX: .*ependent"):
        to_onnx(Branching(), (torch.zeros(1, 3),), tmp_path / "x.onnx", open_axes=({0: "batch"},))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_disagrees_is_an_error_and_not_written(tmp_path: Path, monkeypatch) -> None:
    class Wrong:
        def __init__(self, *args, **kwargs) -> None: ...

        def get_inputs(self):
            return [type("I", (), {"name": "x"})]

        def run(self, *args):
            return [torch.ones(1, 2).numpy()]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    network = nn.Linear(3, 2, bias=False)
    with pytest.raises(InputError, match=r"x\.onnx: ONNX Runtime differs"):
        to_onnx(network, (torch.zeros(1, 3),), tmp_path / "x.onnx", open_axes=({0: "batch"},))
    assert list(tmp_path.iterdir()) == []


def test_push_needs_the_hub_layout(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--format hub"):
        export(trained, "onnx", tmp_path, push="me/mine")


def test_a_folder_without_a_student_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_student(tmp_path)
