"""The student alone: safetensors, ONNX that was run and compared, Hugging Face Hub layout."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cohobate.core.catalog import papers
from cohobate.core.errors import InputError
from cohobate.core.io import fitting_weights, load_weights, result_folder, save_atomic, write_json
from cohobate.core.module import DistillModule
from cohobate.core.recipes import Config, build_model
from cohobate.core.runs import RunFolder, checkpoint_file, load_run, read_run_config, save_student

Format = Literal["safetensors", "onnx", "hub"]


def export(
    checkpoint: Path,
    kind: Format,
    out: Path | None = None,
    *,
    push: str | None = None,
    paper: str | None = None,
) -> list[Path]:
    """Write a trained run's student.

    Args:
        checkpoint: A run folder, or a checkpoint in one.
        kind: ``safetensors`` (weights and config), ``onnx``, or ``hub`` (weights, config, card).
        out: Folder; default ``export`` in the run folder.
        push: ``owner/name`` of a Hub repository to upload the ``hub`` layout to.
        paper: Name of the paper that the run must be of.

    Returns:
        The files written.

    Raises:
        InputError: There is no such run, it is of another paper, ``out`` is no folder, or the ONNX
            model disagrees with the student.
    """
    file = checkpoint_file(checkpoint, paper=paper)
    model = load_run(file)
    folder = out or file.parent / "export"
    if push is not None and kind != "hub":
        raise InputError("--push uploads the Hub layout: add --format hub")
    with result_folder(folder):
        if kind == "onnx":
            path, axes = folder / "student.onnx", model.open_axes()
            return [to_onnx(model.student, model.example_input(), path, open_axes=axes)]
        config = read_run_config(file.parent)
        written = _weights_and_config(model, config, RunFolder(file.parent), folder)
        if kind == "hub":
            written.append(_card(RunFolder(file.parent), folder))
    if push is not None:
        _upload(folder, push)
    return written


def load_student(folder: Path) -> nn.Module:
    """Load an exported student (``safetensors`` or ``hub`` layout), in eval mode.

    Args:
        folder: With ``config.json`` and ``model.safetensors``.

    Raises:
        InputError: A file is missing or the weights do not fit.
    """
    path = Path(folder) / "config.json"
    try:
        config: Config = json.loads(path.read_text())
    except OSError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    weights = path.parent / "model.safetensors"
    student = build_model(config).student
    student.load_state_dict(fitting_weights(student, load_weights(weights), weights))
    return student.eval()


def to_onnx(
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    open_axes: tuple[dict[int, str], ...],
    tolerance: float = 1e-3,
) -> Path:
    """Export a network to ONNX and check the file against it in ONNX Runtime.

    The check is done on the example and on one twice as long in every open axis.

    Args:
        network: The network; exported in eval mode on the CPU.
        inputs: Example inputs.
        path: The file.
        open_axes: For each input its axes of any size, by name, as `DistillModule.open_axes` gives.
        tolerance: Largest difference allowed, relative to the largest output (at least 1).

    Returns:
        ``path``.

    Raises:
        InputError: The network cannot be put into ONNX, or ONNX Runtime's output differs from the
            network's by more than ``tolerance``.
    """
    network = network.cpu().eval()
    inputs = tuple(x.detach().cpu() for x in inputs)
    dims = {name: torch.export.Dim(name, min=1) for axes in open_axes for name in axes.values()}
    shapes = tuple({axis: dims[name] for axis, name in axes.items()} for axes in open_axes)
    # an example of size 1 would be taken for a constant where the axis shall stay open
    twice = _doubled(inputs, open_axes)
    with onnx_file(network, twice, path, dynamic_shapes=shapes) as file:
        for example in (inputs, twice):
            _check_onnx(network, example, file, path, tolerance)
    return path


@contextmanager
def onnx_file(
    network: nn.Module, inputs: tuple[Tensor, ...], path: Path, **options: Any
) -> Iterator[Path]:
    """Put a network into an ONNX file, which the ``with`` block checks; an error there removes it.

    Args:
        network: The network, in eval mode.
        inputs: Example inputs, of size 1 in no axis that shall stay open.
        path: Where the file shall stand; the block gets a sibling.
        **options: As for `torch.onnx.export`: ``dynamic_shapes``, ``input_names``, ...

    Raises:
        InputError: The network cannot be put into ONNX.
    """
    for name in ("onnxscript", "torch.onnx"):  # what it skips because it is not installed
        logging.getLogger(name).setLevel(logging.ERROR)
    with save_atomic(path) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's notes on its own internals
            try:
                program = torch.onnx.export(
                    network, inputs, dynamo=True, verbose=False, external_data=False, **options
                )
            except torch.onnx.OnnxExporterError as error:
                reason = str(error.__cause__ or error).strip().splitlines()[0]
                raise InputError(
                    f"{path}: torch {torch.__version__} cannot put the network into ONNX: {reason}"
                ) from error
            assert program is not None
            program.save(temporary, external_data=False)
        yield temporary


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of a network's output, however they are nested, in order."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors_of(value)]


def _doubled(
    inputs: tuple[Tensor, ...], open_axes: tuple[dict[int, str], ...]
) -> tuple[Tensor, ...]:
    found = []
    for x, axes in zip(inputs, open_axes, strict=True):
        for axis in axes:
            x = torch.cat([x, x.flip(axis)], axis)
        found.append(x)
    return tuple(found)


def _check_onnx(
    network: nn.Module, inputs: tuple[Tensor, ...], file: Path, name: Path, tolerance: float
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    with torch.no_grad():
        expected = tensors_of(network(*inputs))
    for want, got in zip(expected, session.run(None, feed), strict=True):
        reference = want.numpy()
        scale = max(1.0, float(np.abs(reference).max()))
        difference = float(np.abs(reference - got).max()) / scale
        if not difference <= tolerance:
            raise InputError(
                f"{name}: ONNX Runtime differs from the network by {difference:.2g} "
                f"(allowed {tolerance:.2g}); nothing was written"
            )


def _weights_and_config(
    model: DistillModule, config: Config, run: RunFolder, folder: Path
) -> list[Path]:
    weights, described = folder / "model.safetensors", folder / "config.json"
    save_student(model, weights)
    content = {
        "library_name": "cohobate",
        "paper": run.info.get("paper"),
        "parameters": sum(p.numel() for p in model.student.parameters()),
        "model": config["model"],
    }
    return [weights, write_json(described, content)]


def _card(run: RunFolder, folder: Path) -> Path:
    """A model card from ``run.json`` and ``paper.yaml``."""
    info = run.info
    paper = papers().get(info.get("paper", ""))
    about = paper.about if paper else {}
    results = {**info.get("best", {}), **info.get("test", {})}
    rows = "\n".join(
        f"| {name} | {value:.5g} |" for name, value in results.items() if value is not None
    )
    text = f"""---
library_name: cohobate
tags: [knowledge-distillation]
---

# Student of {info.get("paper")}

Trained with cohobate by "{about.get("title", "")}" (arXiv {about.get("arxiv", "")}).

- data: {info.get("data", "")}
- seed: {info.get("seed")}, steps: {info.get("steps")}
- parameters: {info.get("parameters", {}).get("student")}

| metric | value |
| --- | --- |
{rows}

```python
from cohobate.core.export import load_student

student = load_student("path/to/this/folder")
```
"""
    path = folder / "README.md"
    with save_atomic(path) as temporary:
        temporary.write_text(text)
    return path


def _upload(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder)
