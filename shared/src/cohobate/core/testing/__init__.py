"""Checks that every paper's tests reuse: one function for each promise to the user."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cohobate.core import catalog, cli, runs
from cohobate.core.export import export, load_student, tensors_of, to_onnx
from cohobate.core.io import load_checkpoint
from cohobate.core.module import DistillModule
from cohobate.core.recipes import Recipe, read_config


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        code: Exit code.
        out: Standard output.
        err: Standard error.
    """

    code: int
    out: str
    err: str


def run_command(*words: str | Path, domain: str | None = None) -> Outcome:
    """Run ``cohobate`` in this process.

    Args:
        *words: The command line.
        domain: As for ``cohobate-<domain>``.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(word) for word in words], domain)
        except SystemExit as stop:  # --help
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def assert_one_line(outcome: Outcome, *parts: str | Path) -> None:
    """Bad input: exit code 2 and a last line on standard error that names the file and the fault.

    Args:
        outcome: From `run_command`.
        *parts: What the line must contain.
    """
    assert outcome.code == 2, outcome
    line = outcome.err.strip().splitlines()[-1]
    assert "Traceback" not in outcome.err, outcome.err
    for part in parts:
        assert str(part) in line, line


def golden(path: Path) -> dict[str, Any]:
    """Read recorded arrays; float arrays become tensors.

    Args:
        path: An ``.npz`` or ``.json`` file.
    """
    if path.suffix == ".json":
        return dict(json.loads(path.read_text()))
    with np.load(path, allow_pickle=False) as file:
        return {k: torch.from_numpy(v) if v.dtype.kind in "fiub" else v for k, v in file.items()}


def build(recipe: str, *options: str) -> Recipe:
    """Parse a recipe's first stage with options and make its model, data and trainer.

    Args:
        recipe: Name as on the command line.
        *options: Options such as ``--model.width=4``.
    """
    found = catalog.find(recipe)
    config = read_config(found.stages[0].path)
    parts = {"logger": [], "enable_checkpointing": False, "enable_progress_bar": False}
    return Recipe(config, options, lambda _: dict(parts))


def recipes(domain: str) -> list[tuple[str, Path]]:
    """Every complete recipe of a package, for a test that parses each: (name, file)."""
    return [
        (f"{paper.name}:{stage.path.stem}", stage.path)
        for paper in catalog.papers(domain).values()
        for stages in paper.recipes.values()
        for stage in stages
    ]


def assert_recipe_parses(path: Path) -> None:
    """A recipe and the classes it names fit together; nothing is built.

    Args:
        path: A complete recipe.
    """
    from jsonargparse import ArgumentParser

    from cohobate.core.recipes import import_class, model_class

    config = read_config(path)
    model, data = model_class(config), import_class(config["data"]["class_path"])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(model, "model", skip=set(model.from_data), sub_configs=True)
    parser.add_class_arguments(data, "data", sub_configs=True)
    parser.parse_object({key: config[key].get("init_args", {}) for key in ("model", "data")})


def assert_teachers_frozen(model: DistillModule, batch: Any) -> None:
    """After a backward pass no teacher has a gradient, a changed buffer, or left eval mode.

    Args:
        model: A module with at least one teacher.
        batch: A training batch.
    """
    teachers = model.teachers()
    assert teachers, "the module has no teacher"
    networks = [network for teacher in teachers.values() for network in teacher.networks]
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in networks]
    model.train()
    model.training_step(batch, 0).backward()
    for network, state in zip(networks, before, strict=True):
        assert not network.training
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())
        assert all(torch.equal(state[k], v) for k, v in network.state_dict().items())
    owned = {id(p) for p in model.parameters()}
    assert not any(id(p) in owned for network in networks for p in network.parameters())


def assert_student_only(folder: Path) -> None:
    """``student.safetensors`` holds the student's tensors, all of them and nothing else.

    Args:
        folder: A finished run folder.
    """
    model = runs.load_run(folder)
    saved = load_checkpoint(folder / "student.safetensors")
    own = model.student.state_dict()
    assert set(saved) == set(own)
    assert all(torch.equal(saved[name], tensor) for name, tensor in own.items())


def assert_export_round_trip(folder: Path, tmp_path: Path, *, onnx: bool = True) -> None:
    """The exported student gives the trained student's outputs.

    Args:
        folder: A finished run folder.
        tmp_path: Where to export to.
        onnx: Also export to ONNX, which compares in ONNX Runtime.
    """
    model = runs.load_run(folder)
    inputs = tuple(
        torch.randn_like(x) if x.is_floating_point() else x for x in model.example_input()
    )
    with torch.no_grad():
        expected = tensors_of(model.student(*inputs))
        export(folder, "hub", tmp_path / "hub")
        for want, got in zip(
            expected, tensors_of(load_student(tmp_path / "hub")(*inputs)), strict=True
        ):
            torch.testing.assert_close(got, want)
    if onnx:
        path = tmp_path / "student.onnx"
        assert to_onnx(model.student, inputs, path, open_axes=model.open_axes()).exists()


def assert_same_run(one: Path, other: Path) -> None:
    """Two run folders have the same metrics, weights, optimiser and teachers, to the last bit.

    Args:
        one: A run folder.
        other: Another.
    """
    assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    a, b = load_checkpoint(one / "last.ckpt"), load_checkpoint(other / "last.ckpt")
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "teachers", "global_step"):
        assert_equal(a[key], b[key], key)


def assert_equal(one: Any, other: Any, name: str = "") -> None:
    """Nested containers of tensors and numbers are the same, to the last bit."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert set(one) == set(other), name
        for key in one:
            assert_equal(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, Sequence) and not isinstance(one, str):
        assert len(one) == len(other), name
        for place, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{name}[{place}]")
    else:
        assert one == other, name
