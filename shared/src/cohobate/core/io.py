"""Weights in, files out: nothing is unpickled, nothing is left half-written."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cohobate.core.catalog import suggestion
from cohobate.core.errors import InputError


@contextmanager
def save_atomic(path: Path) -> Iterator[Path]:
    """Write a file so that it is either whole or not there.

    Yields a sibling path to write to; on success it replaces ``path`` in one step (after the data
    has reached the disk), on any error it is removed and an earlier ``path`` stays as it was.

    Args:
        path: Where the file shall stand.

    Raises:
        InputError: The disk is full or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "scores.csv"
        >>> with save_atomic(target) as temporary:
        ...     _ = temporary.write_text("a,b")
        >>> target.read_text()
        'a,b'
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # there is none where nothing can be written
            temporary.unlink()


@contextmanager
def result_folder(path: Path) -> Iterator[None]:
    """Make a folder for results before the work starts that they cost.

    On an error, the folders that were made and are still empty are removed again.

    Args:
        path: The folder; it may exist.

    Raises:
        InputError: It is a file or lies under one, or nothing can be written there.
    """
    made = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            file = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "not a folder" if file else error.strerror or error
            raise InputError(f"{path}: cannot be written: {reason}") from None
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # there is something in it, or it was not made
                folder.rmdir()
        raise


def write_json(path: Path, content: Any) -> Path:
    """Write JSON that people can read too; whole or not at all, as `save_atomic`."""
    with save_atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as data: safetensors, or ``torch.load(weights_only=True)``.

    Args:
        path: A ``.safetensors`` file or one written by ``torch.save``.

    Returns:
        Its content; for safetensors the tensors by name.

    Raises:
        InputError: The file is missing, damaged, or holds pickled objects that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about pickles, which are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged checkpoint: {_first_line(error)}") from None
    except Exception as error:
        # torch reports both by UnpicklingError or RuntimeError, with pages of advice
        if "PytorchStreamReader" in str(error):
            raise InputError(f"{path}: damaged checkpoint: {_first_line(error)}") from None
        raise InputError(
            f"{path}: not a checkpoint of tensors (a pickle could run code and is never loaded)"
        ) from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: expected a dictionary of tensors, found {type(content).__name__}"
        )
    return content


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name.

    Args:
        path: A file as in `load_checkpoint`; an entry ``state_dict``, ``model_state_dict``,
            ``model`` or ``module`` is unwrapped, so that files of Lightning and of most training
            scripts work.

    Raises:
        InputError: As `load_checkpoint`, or nothing in the file is a tensor.
    """
    content: Any = load_checkpoint(path)
    for key in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(content.get(key), dict):
            content = content[key]
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no tensors")
    return tensors


def fitting_weights(
    network: nn.Module, weights: dict[str, Tensor], source: Path, *, strict: bool = True
) -> dict[str, Tensor]:
    """Check weights against a network before anything is loaded.

    Args:
        network: The network to fill.
        weights: Tensors by name.
        source: The file they come from, for the message.
        strict: Whether names must agree both ways; otherwise only common names are checked.

    Returns:
        The tensors whose names the network has.

    Raises:
        InputError: The first name or shape that does not fit.
    """
    own, kind = network.state_dict(), type(network).__name__
    if strict:
        for name in own:
            if name not in weights:
                raise InputError(f"{source}: no weights for {name} of {kind}")
        for name in weights:
            if name not in own:
                raise InputError(f"{source}: {name} is not in {kind}{suggestion(name, own)}")
    matched = {name: tensor for name, tensor in weights.items() if name in own}
    for name, tensor in matched.items():
        if tensor.shape != own[name].shape:
            raise InputError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, "
                f"{kind} needs {tuple(own[name].shape)}"
            )
    return matched


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
