"""The command ``cohobate``, and ``cohobate-<domain>`` for someone who installed one package.

Only what a command needs is imported: ``list`` and ``info`` answer without torch.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cohobate.core import __version__, catalog
from cohobate.core.errors import InputError, guard

USAGE = """\
usage: {prog} COMMAND [RECIPE] [options]

  list                     the papers that are installed
  info RECIPE              claim, what was measured here, recipes
  fit RECIPE               train; on an existing run folder: resume
  validate RECIPE          evaluate a trained run
  compare RECIPE           does distillation help on your data?
  predict RECIPE INPUT...  use a trained run on files
  export RECIPE            the student alone: safetensors, ONNX, Hugging Face Hub layout
  cache RECIPE             the teacher's answers to the training data, once, to disk
{extra}
RECIPE is <domain>/<paper> or <domain>/<paper>/<recipe>, as `list` and `info` print them.
Options of a command: {prog} COMMAND RECIPE --help
"""


def main(argv: Sequence[str] | None = None, domain: str | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; default those of the process.
        domain: Only this package's papers and commands.

    Returns:
        Exit code: 0, 2 for bad input, 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prog = "cohobate" if domain is None else f"cohobate-{domain}"
    return guard(lambda: _run(words, prog, domain), prog)


def _run(words: list[str], prog: str, domain: str | None) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE.format(prog=prog, extra=_domain_help(domain)), end="")
        return 0
    if words[0] == "--version":
        print(f"{prog} {__version__}")
        return 0
    name, *rest = words
    if name in COMMANDS:
        return COMMANDS[name](rest, prog, domain)
    if function := _domain_commands(domain).get(name):
        return _call(function, rest, f"{prog} {name}")
    known = [*COMMANDS, *_domain_commands(domain)]
    raise InputError(f"unknown command '{name}'{catalog.suggestion(name, known)}")


def _list(args: list[str], prog: str, domain: str | None) -> int:
    parser = _parser(prog, "list", "The papers that are installed.")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    asked = parser.parse_args(args)
    found = catalog.papers(domain)
    if asked.json:
        print(json.dumps({name: paper.about for name, paper in found.items()}, default=str))
        return 0
    width = max((len(name) for name in found), default=0)
    for name, paper in found.items():
        print(f"{name:<{width}}  {paper.about.get('summary', paper.about.get('title', ''))}")
    if not found:
        print("no papers: install a package such as cohobate-medseg")
    return 0


def _info(args: list[str], prog: str, domain: str | None) -> int:
    parser = _parser(prog, "info", "Claim, what was measured here, recipes.")
    parser.add_argument("recipe")
    paper = catalog.find(parser.parse_args(args).recipe, domain).paper
    about = paper.about
    code = about.get("code") or {}
    print(f"{about['title']} ({about['year']})")
    print(", ".join(about.get("authors", [])))
    if about.get("arxiv"):
        print(f"arXiv {about['arxiv']}")
    if code:
        print(f"official code: {code.get('repository')} ({code.get('licence')})")
    print(f"\n{about.get('summary', '')}\n")
    print(f"baseline: {about.get('baseline', '')}")
    print("claims of the paper:")
    for claim in about.get("claim", []):
        print(f"  {claim['setting']}: {claim['metric']} {claim['delta']} ({claim['source']})")
    print("measured here:")
    for line in _measured(paper) or ["  nothing yet; `compare` measures on your data"]:
        print(line)
    print("recipes:")
    for name, stages in paper.recipes.items():
        steps = " → ".join(stage.name for stage in stages)
        print(f"  {name}" + (f": {steps}" if len(stages) > 1 else ""))
    print(f"arms of compare: {', '.join(paper.arms) or 'none'}")
    for difference in about.get("differences", []):
        print(f"differs from the paper: {difference}")
    return 0


def _fit(args: list[str], prog: str, domain: str | None) -> int:
    recipe, rest = _take_recipe(args, prog, "fit", domain)
    from cohobate.core import runs

    for run in runs.fit(recipe, rest):
        print(run.path)
    return 0


def _validate(args: list[str], prog: str, domain: str | None) -> int:
    recipe, rest = _take_recipe(args, prog, "validate", domain)
    parser = _parser(prog, "validate", "Evaluate a trained run on its validation and test data.")
    parser.add_argument("--checkpoint", type=Path, default=_default_run(recipe))
    parser.add_argument("--json", action="store_true", help="machine-readable")
    asked, rest = parser.parse_known_args(rest)
    from cohobate.core import runs

    results = runs.validate(asked.checkpoint, rest, paper=recipe.paper.name)
    if asked.json:
        print(json.dumps(results))
    else:
        for name, value in results.items():
            print(f"{name:<32} {value:.5g}")
    return 0


def _compare(args: list[str], prog: str, domain: str | None) -> int:
    recipe, rest = _take_recipe(args, prog, "compare", domain)
    parser = _parser(
        prog,
        "compare",
        "Train the recipe and its baseline over several seeds, paired, and say whether it helped. "
        "Every option of `fit` is accepted too.",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of paired seeds")
    parser.add_argument("--first-seed", type=int, default=0, help="seeds count from here")
    parser.add_argument("--arms", nargs="*", default=["baseline"], help="arms, or 'all'")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=None, help="folder; an existing one resumes")
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    asked, rest = parser.parse_known_args(rest)
    from cohobate.core.compare import compare

    out = asked.out or Path("runs") / (
        recipe.full_name.split("/", 1)[1].replace("/", "-") + "-compare"
    )
    result = compare(
        recipe,
        rest,
        seeds=range(asked.first_seed, asked.first_seed + asked.seeds),
        arms=list(recipe.paper.arms) if asked.arms == ["all"] else asked.arms,
        out=out,
        jobs=asked.jobs,
        json_copy=asked.json,
    )
    print(result.markdown())
    print(f"\n{out}")
    return 0


def _predict(args: list[str], prog: str, domain: str | None) -> int:
    recipe, rest = _take_recipe(args, prog, "predict", domain)
    from cohobate.core import predict

    return predict.main(recipe, rest, f"{prog} predict", _default_run(recipe))


def _export(args: list[str], prog: str, domain: str | None) -> int:
    recipe, rest = _take_recipe(args, prog, "export", domain)
    parser = _parser(prog, "export", "Write the student alone.")
    parser.add_argument("--checkpoint", type=Path, default=_default_run(recipe))
    parser.add_argument(
        "--format", choices=["safetensors", "onnx", "hub"], default="safetensors",
        help="hub is safetensors, config and model card in the Hugging Face layout",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=None, help="default: export/ in the run folder")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload the hub layout to this repository"
    )
    asked = parser.parse_args(rest)
    from cohobate.core import export

    written = export.export(
        asked.checkpoint, asked.format, asked.out, push=asked.push, paper=recipe.paper.name
    )
    for path in written:
        print(path)
    return 0


def _cache(args: list[str], prog: str, domain: str | None) -> int:
    recipe, rest = _take_recipe(args, prog, "cache", domain)
    from cohobate.core.cache import command

    parser = _parser(
        prog,
        "cache",
        "Ask the recipe's frozen teacher about every training sample once and keep its answers. "
        "The model's and the data's options of `fit` are accepted too.",
    )
    command.add_options(parser)
    return command.main(recipe, *parser.parse_known_args(rest))


COMMANDS: dict[str, Callable[[list[str], str, str | None], int]] = {
    "list": _list,
    "info": _info,
    "fit": _fit,
    "validate": _validate,
    "compare": _compare,
    "predict": _predict,
    "export": _export,
    "cache": _cache,
}


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> Any:
        raise InputError(message)


def _parser(prog: str, command: str, description: str) -> argparse.ArgumentParser:
    return _Parser(prog=f"{prog} {command}", description=description, allow_abbrev=False)


def _take_recipe(
    args: list[str], prog: str, command: str, domain: str | None
) -> tuple[catalog.Recipe, list[str]]:
    if not args or args[0].startswith("-"):
        names = ", ".join(catalog.papers(domain)) or "none is installed"
        raise InputError(
            f"{command} needs a recipe first: {prog} {command} RECIPE (there is: {names})"
        )
    return catalog.find(args[0], domain), args[1:]


def _default_run(recipe: catalog.Recipe) -> Path:
    return Path("runs") / recipe.full_name.split("/", 1)[1].replace("/", "-")


def _measured(paper: catalog.Paper) -> list[str]:
    path = paper.folder / "measured.json"
    if not path.exists():
        return []
    return [f"  {line}" for line in json.loads(path.read_text())]


def _domain_commands(domain: str | None) -> dict[str, Callable[..., int | None]]:
    """The package's own commands: the functions in ``COMMANDS`` of its ``commands`` module."""
    if domain is None or importlib.util.find_spec(f"cohobate.{domain}.commands") is None:
        return {}
    module = importlib.import_module(f"cohobate.{domain}.commands")
    return {function.__name__.replace("_", "-"): function for function in module.COMMANDS}


def _domain_help(domain: str | None) -> str:
    lines = []
    for name, function in _domain_commands(domain).items():
        first = (function.__doc__ or "").strip().splitlines()[0].rstrip(".")
        lines.append(f"  {name:<24} {first}\n")
    return "".join(lines)


def _call(function: Callable[..., int | None], args: list[str], prog: str) -> int:
    """Run a function with options made of its signature."""
    from jsonargparse import ArgumentError, ArgumentParser

    from cohobate.core.recipes import one_line

    parser = ArgumentParser(prog=prog, exit_on_error=False, description=function.__doc__)
    parser.add_function_arguments(function, as_positional=True)
    try:
        parsed = parser.instantiate_classes(parser.parse_args(args))
    except ArgumentError as error:
        raise InputError(one_line(error, parser)) from None
    return function(**vars(parsed)) or 0


if __name__ == "__main__":
    raise SystemExit(main())
