"""Write what was measured into the README, the pages and the packages; nothing is typed by hand.

``python docs/generate.py`` writes, ``python docs/generate.py --check`` exits with 1 when a file is
not what the sources give. The sources are every paper's ``paper.yaml`` and ``docs/results/*.json``:
``<domain>-<slug>[-<variant>].json`` as ``cohobate compare --json`` writes it, and
``bench-<name>.json``, ``{"command", "machine", "versions", "rows": [{column: value}]}``. From them
come

- the table of papers between ``<!-- papers -->`` and ``<!-- /papers -->``,
- the results between ``<!-- results:NAME -->`` and ``<!-- /results -->``: NAME is the name of a
  JSON, and ``<domain>-<slug>`` stands for all of the paper's that have no block of their own,
- a picture beside each comparison's JSON,
- ``measured.json`` beside ``paper.yaml``, which ``cohobate info`` shows.

A marker stands alone on its line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohobate.core.catalog import Paper
from cohobate.core.compare import RECIPE_ARM, cost_text, draw, markdown
from cohobate.core.errors import InputError, guard

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = r"^<!-- {name} -->\n(?:(?!<!-- ).*\n)*<!-- /{end} -->$"


@dataclass(frozen=True)
class Result:
    """A comparison that was measured.

    Attributes:
        path: Its JSON in ``docs/results``.
        content: As `cohobate.core.compare.Comparison.as_json` gives.
    """

    path: Path
    content: dict[str, Any]

    @property
    def paper(self) -> str:
        """``<domain>/<slug>`` of the paper."""
        return "/".join(self.content["recipe"].split("/")[:2])

    @property
    def prefix(self) -> str:
        """What the names of the paper's files start with."""
        return self.paper.replace("/", "-")

    @property
    def variant(self) -> str:
        """What the file's name adds to the paper's; empty for the main result."""
        return self.path.stem.removeprefix(self.prefix).strip("-")

    @property
    def digest(self) -> str:
        """Identifies the JSON; the picture drawn from it carries it."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def command(self) -> str:
        """The command that repeats it."""
        given, seeds = self.content["command"], self.content["seeds"]
        options = {
            "--seeds": str(len(seeds)),
            "--first-seed": str(seeds[0]) if seeds[0] else "",
            "--arms": " ".join(list(self.content["arms"])[:-1]),
        }
        if options["--arms"] == "baseline":
            options["--arms"] = ""
        missing = [f"{k} {v}" for k, v in options.items() if v and k not in given]
        return " ".join([given, *missing])

    def line(self, metric: dict[str, str]) -> str:
        """What one metric came to, recipe against baseline, in words."""
        arms = self.content["arms"]
        base = next(iter(arms.values()))["metrics"][metric["name"]]
        own = arms[RECIPE_ARM]["metrics"][metric["name"]]
        low, high = own["interval"]
        arrow = "↑" if metric["direction"] == "higher" else "↓"
        return (
            f"{metric['label']} {arrow} {base['mean']:.4g} → {own['mean']:.4g}, "
            f"difference {own['difference']:+.3g} "
            f"(95 % interval {low:+.3g} to {high:+.3g}): {own['verdict']}"
        )

    @property
    def cost(self) -> str:
        """What the recipe costs over its baseline."""
        return cost_text(self.content, RECIPE_ARM)


def read_papers(root: Path) -> dict[str, Paper]:
    """Every paper in the tree by name, installed or not."""
    paths = sorted(root.glob("packages/*/src/cohobate/*/*/paper.yaml"))
    found = [Paper(p.parts[-3], p.parts[-2].replace("_", "-"), p.parent) for p in paths]
    return {paper.name: paper for paper in found}


def read_results(root: Path, papers: dict[str, Paper]) -> list[Result]:
    """Every comparison, main results before variants.

    Raises:
        InputError: A file is not a comparison, or its name is not that of its paper.
    """
    found = []
    for path in sorted((root / "docs/results").glob("*.json"), key=lambda path: path.stem):
        if path.stem.startswith("bench-"):
            continue
        result = Result(path, _read_json(path))
        if not {"recipe", "arms", "metrics", "seeds", "command"} <= set(result.content):
            raise InputError(f"{path}: not written by `cohobate compare --json`")
        if result.paper not in papers:
            raise InputError(f"{path}: there is no paper {result.paper}")
        if not f"{path.stem}-".startswith(f"{result.prefix}-"):
            raise InputError(f"{path}: the name must start with {result.prefix}")
        found.append(result)
    return found


def papers_table(papers: dict[str, Paper], results: list[Result], folder: Path, pages: Path) -> str:
    """The table of papers.

    Args:
        papers: By name.
        results: Of all papers.
        folder: Where the table's file lies.
        pages: Where the papers' pages lie.
    """
    lines = [
        "| paper | package | what it does | the paper's claim | measured here | cost |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, paper in papers.items():
        about, page = paper.about, pages / f"{paper.slug}.md"
        link = f"[`{name}`]({page.relative_to(folder)})" if page.exists() else f"`{name}`"
        own = [result for result in results if result.paper == name]
        claims = [f"{c['metric']} {c['delta']} ({c['setting']})" for c in _main_claims(about)]
        cells = [
            f"{link}<br>{about['title']}, {about['year']}",
            f"`cohobate-{paper.domain}`",
            about.get("summary", ""),
            "<br>".join(claims) or "–",
            "<br><br>".join(map(_cell, own)) or "not measured yet",
            "<br><br>".join(_with_variant(r, r.cost) for r in own) or "not measured yet",
        ]
        lines.append("| " + " | ".join(_escape(cell) for cell in cells) + " |")
    return "\n".join(lines) if papers else "No paper is here yet."


def results_block(shown: Iterable[Result]) -> str:
    """Results with tables, pictures, and how each was made."""
    parts = []
    for result in shown:
        title = result.variant or "Default recipe"
        picture = result.path.with_suffix(".png").name
        parts += [
            f"### {title}",
            markdown(result.content),
            f"![Every seed of every arm, {title}](../results/{picture})",
            f"`{result.command}` ({_made_with(result.content)}; "
            f"[JSON](../results/{result.path.name}))",
        ]
    return "\n\n".join(parts) or "Not measured yet."


def bench_block(path: Path) -> str:
    """The table of a benchmark.

    Raises:
        InputError: The file is missing or has no rows.
    """
    content = _read_json(path)
    rows = content.get("rows")
    if not rows:
        raise InputError(f"{path}: a benchmark needs rows")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = [columns, ["---"] * len(columns)]
    table += [[_value(row.get(name, "")) for name in columns] for row in rows]
    lines = ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in table]
    return "\n".join(lines) + f"\n\n`{content.get('command', '')}` ({_made_with(content)})"


def measured(own: list[Result]) -> str | None:
    """The content of ``measured.json``; nothing when nothing was measured."""
    lines = []
    for result in own:
        seeds = len(result.content["seeds"])
        about = f"{seeds} paired seeds, {result.content['steps']} steps a run"
        lines.append(f"{result.content['recipe']}, {about}; data: {result.content['data']}")
        lines += [f"  {result.line(metric)}" for metric in result.content["metrics"]]
        lines.append(f"  {result.cost}")
    return json.dumps(lines, indent=1, ensure_ascii=False) + "\n" if lines else None


def texts(root: Path) -> dict[Path, str | None]:
    """What every generated text should be; None for a file that should not exist.

    Raises:
        InputError: A source cannot be read, or a page or a marker is missing.
    """
    papers = read_papers(root)
    results = read_results(root, papers)
    found: dict[Path, str | None] = {}
    for page in [*sorted(root.glob("docs/*.md")), *sorted(root.glob("docs/papers/*.md"))]:
        found[page] = _fill_results(page, root, papers, results)
    for name, paper in papers.items():
        page = root / "docs/papers" / f"{paper.slug}.md"
        marker = f"<!-- results:{name.replace('/', '-')} -->"
        if page in found and marker not in (found[page] or ""):
            raise InputError(f"{page}: the page of {name} needs a line {marker}")
        own = [result for result in results if result.paper == name]
        found[paper.folder / "measured.json"] = measured(own)
    for page in (root / "README.md", root / "docs/index.md"):
        text = found.get(page) or page.read_text(encoding="utf-8")
        table = papers_table(papers, results, page.parent, root / "docs/papers")
        found[page] = _fill(text, page, "papers", "papers", table)
    return found


def pictures(root: Path) -> dict[Path, Result]:
    """The pictures that are missing or were drawn from another JSON."""
    every = {r.path.with_suffix(".png"): r for r in read_results(root, read_papers(root))}
    return {
        path: result
        for path, result in every.items()
        if not path.exists() or result.digest.encode() not in path.read_bytes()
    }


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write what is stale, or with ``--check`` only name it.

    Args:
        argv: Arguments; default those of the process.
        root: The repository.

    Returns:
        Exit code: 0, 1 when something is stale and ``--check`` was given, 2 for a bad source.
    """
    parser = argparse.ArgumentParser(description="Write what was measured into README and pages.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when stale")
    check = parser.parse_args(argv).check
    return guard(lambda: _run(root, check), "generate")


def _run(root: Path, check: bool) -> int:
    stale_texts = {p: t for p, t in texts(root).items() if t != _read(p)}
    stale_pictures = pictures(root)
    for path in [*stale_texts, *stale_pictures]:
        print(f"{path.relative_to(root)}: {'stale' if check else 'written'}")
    if check:
        return int(bool(stale_texts or stale_pictures))
    for path, text in stale_texts.items():
        if text is None:
            path.unlink()
        else:
            path.write_text(text, encoding="utf-8")
    for path, result in stale_pictures.items():
        _draw(result, path)
    return 0


def _draw(result: Result, path: Path) -> None:
    """Draw a result; the PNG carries the digest of its JSON, so that it is known to be current."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    draw(result.content, path)
    source = PngInfo()
    source.add_text("Source", result.digest)
    with Image.open(path) as picture:
        picture.load()
        picture.save(path, pnginfo=source, optimize=True)


def _fill_results(page: Path, root: Path, papers: dict[str, Paper], results: list[Result]) -> str:
    """A page with its blocks of results."""
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"^<!-- results:(\S+) -->$", text, re.MULTILINE)
    known = {paper.replace("/", "-") for paper in papers} | {r.path.stem for r in results}
    for name in names:
        if name.startswith("bench-"):
            content = bench_block(root / "docs/results" / f"{name}.json")
        elif name in known:
            content = results_block(
                r
                for r in results
                if r.path.stem == name or (r.prefix == name and r.path.stem not in names)
            )
        else:
            raise InputError(f"{page}: there is no paper or result {name}")
        text = _fill(text, page, f"results:{name}", "results", content)
    return text


def _fill(text: str, page: Path, name: str, end: str, content: str) -> str:
    """Replace what stands between two markers."""
    pattern = _BLOCK.format(name=re.escape(name), end=end)
    new = f"<!-- {name} -->\n\n{content}\n\n<!-- /{end} -->"
    filled, count = re.subn(pattern, lambda _: new, text, flags=re.MULTILINE)
    if count != 1:
        raise InputError(f"{page}: <!-- {name} --> and <!-- /{end} --> must stand there once")
    return filled


def _main_claims(about: dict[str, Any]) -> list[dict[str, str]]:
    """The claims on the metric that is compared here; all of them where none is."""
    claims = about.get("claim", [])
    return [c for c in claims if c["metric"] == about["metric"]["label"]] or claims


def _cell(result: Result) -> str:
    """The main metric for the table of papers; generated data is called so."""
    words = result.line(result.content["metrics"][0])
    before, _, verdict = words.rpartition(": ")
    synthetic = ", SYNTHETIC data" if "SYNTHETIC" in result.content["data"] else ""
    seeds = f"{len(result.content['seeds'])} seeds{synthetic}"
    return _with_variant(result, f"{before}, {seeds}: **{verdict}**")


def _with_variant(result: Result, text: str) -> str:
    return f"{result.variant}: {text}" if result.variant else text


def _made_with(content: dict[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in content.get("versions", {}).items()]
    return ", ".join([*versions, content.get("machine", "")]).strip(", ")


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _escape(cell: str) -> str:
    return " ".join(str(cell).split()).replace("|", "\\|")


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object")
    return content


if __name__ == "__main__":
    sys.exit(main())
