"""``cohobate predict``: a trained run used on files, with the paper's own options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentError, ArgumentParser
from tqdm import tqdm

from cohobate.core import catalog
from cohobate.core.errors import InputError
from cohobate.core.io import result_folder
from cohobate.core.recipes import model_class, one_line, read_config
from cohobate.core.runs import load_run


def main(recipe: catalog.Recipe, args: Sequence[str], prog: str, default_run: Path) -> int:
    """Parse the options of ``predict`` and run the paper's ``predict_files``.

    Args:
        recipe: The recipe whose model class has the options.
        args: The command line after the recipe.
        prog: Name for the help text.
        default_run: Run folder when ``--checkpoint`` is not given.

    Returns:
        Exit code: 0.

    Raises:
        InputError: An option, a file or the checkpoint is wrong.
    """
    kind = model_class(read_config(recipe.stages[-1].path))
    parser = ArgumentParser(
        prog=prog, exit_on_error=False, description="Use a trained run on files."
    )
    parser.add_argument("inputs", nargs="+", type=Path, help="files or folders")
    parser.add_argument(
        "--checkpoint", type=Path, default=default_run, help="run folder or checkpoint"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), help="folder for the results"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the best"
    )
    options = parser.add_method_arguments(kind, "predict_files", skip={"inputs", "out"})
    try:
        parsed = parser.parse_args(list(args))
    except ArgumentError as error:
        raise InputError(one_line(error, parser)) from None
    for path in parsed.inputs:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    model = load_run(parsed.checkpoint, paper=recipe.paper.name)
    if type(model).predict_files is not kind.predict_files:
        raise InputError(
            f"{parsed.checkpoint}: trained {type(model).__name__}, which is not used on files as "
            f"{recipe.full_name} is ({kind.__name__})"
        )
    model = model.to(_device(parsed.device))
    with result_folder(parsed.out), torch.inference_mode():
        written = model.predict_files(
            parsed.inputs, parsed.out, **{name: parsed[name] for name in options}
        )
    for path in written:
        print(path)
    return 0


def files_in(
    inputs: Sequence[Path],
    inside: Callable[[Path], Sequence[Path]],
    kind: str,
    name: Callable[[Path], str] = lambda path: path.stem,
) -> list[Path]:
    """The files that are meant by files and folders.

    Args:
        inputs: As given.
        inside: Folder → the files of it that are meant.
        kind: What they are, for the message.
        name: File → what the names of its results start with.

    Raises:
        InputError: A folder has none, or two files have one name.
    """
    found: dict[str, Path] = {}
    for entry in inputs:
        files = inside(entry) if entry.is_dir() else [entry]
        if not files:
            raise InputError(f"{entry}: no {kind} in this folder")
        for path in files:
            other = found.setdefault(name(path), path)
            if other != path:
                raise InputError(f"{path}: its result would overwrite that of {other}")
    return list(found.values())


def each_file(
    paths: Sequence[Path],
    out: Path,
    work: Callable[[Path], list[Path]],
    doing: str,
    finish: Callable[[], list[Path]] = list,
) -> list[Path]:
    """Work through files under a progress bar; one at fault does not stop the others.

    Args:
        paths: The files.
        out: Folder of the results, for the message.
        work: File → what was written for it.
        doing: What the bar says.
        finish: Called after the last file; writes what tells of all of them.

    Returns:
        The files written, those of ``finish`` first.

    Raises:
        InputError: The first fault, when all the rest is done.
    """
    written: list[Path] = []
    faults: list[str] = []
    for path in tqdm(paths, desc=doing, disable=len(paths) < 2):
        try:
            written += work(path)
        except InputError as error:
            faults.append(str(error))
    written = [*finish(), *written]
    if faults:
        more = f" (and {len(faults) - 1} more files)" if len(faults) > 1 else ""
        done = len(paths) - len(faults)
        rest = f"; the other {done} are in {out}" if done else ""
        raise InputError(f"{faults[0]}{more}{rest}")
    return written


def _device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
