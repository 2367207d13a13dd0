"""Generated tables say what the measured files say, also when that is against the method."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cohobate.core.compare import Comparison, Metric

ROOT = Path(__file__).parents[2]
PAPER = """\
title: A paper
year: 2020
summary: makes | things better
claim:
  - {setting: somewhere, metric: Dice, delta: "+9 points"}
  - {setting: somewhere, metric: speed, delta: "x 3"}
metric: {name: test/dice, label: Dice, direction: higher}
"""
PAGE = "# A paper\n\nBefore.\n\n<!-- results:dom-my-paper -->\n<!-- /results -->\n\nAfter.\n"
TABLE = "# Title\n\n<!-- papers -->\n<!-- /papers -->\n\nEnd.\n"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


generate = load()


def comparison(baseline: list[float], distilled: list[float], **about: Any) -> dict[str, Any]:
    """The JSON of a comparison with these Dice scores."""

    def run(dice: float, seconds: float, added: int) -> list[dict[str, Any]]:
        stage = {
            "stage": "fit",
            "steps": 600,
            "test": {"test/dice": dice},
            "step_seconds": seconds,
            "peak_memory_bytes": 100,
            "parameters": {"student": 1000, "added": added},
        }
        return [stage]

    runs = {
        "baseline": {seed: run(dice, 1.0, 0) for seed, dice in enumerate(baseline)},
        "distilled": {seed: run(dice, 1.5, 1234) for seed, dice in enumerate(distilled)},
    }
    told = {
        "recipe": "dom/my-paper",
        "command": "cohobate compare dom/my-paper",
        "data": "SYNTHETIC volumes",
        "seeds": list(range(len(baseline))),
        "steps": 600,
        "versions": {"torch": "2.99"},
        "machine": "two cores",
    }
    metrics = [Metric("test/dice", "Dice", "higher")]
    return Comparison({**told, **about}, metrics, runs).as_json()


GOOD = comparison([0.5, 0.6, 0.7], [0.61, 0.7, 0.81])
BAD = comparison([0.61, 0.7, 0.81], [0.5, 0.6, 0.7])


class House:
    """A repository with one paper."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "packages/dom/src/cohobate/dom/my_paper"
        self.folder.mkdir(parents=True)
        (root / "docs/papers").mkdir(parents=True)
        (root / "docs/results").mkdir()
        (self.folder / "paper.yaml").write_text(PAPER)
        (root / "docs/papers/my-paper.md").write_text(PAGE)
        (root / "docs/index.md").write_text(TABLE)
        (root / "README.md").write_text(TABLE)

    def add(self, name: str, content: dict[str, Any]) -> None:
        (self.root / "docs/results" / f"{name}.json").write_text(json.dumps(content))

    def run(self, *words: str) -> int:
        return generate.main(words, self.root)

    def read(self, name: str) -> str:
        return (self.root / name).read_text()

    @property
    def measured(self) -> list[str]:
        return json.loads((self.folder / "measured.json").read_text())


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_this_repository_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr()


def test_a_paper_without_result_is_not_measured_yet(house: House) -> None:
    assert house.run() == 0
    assert house.read("README.md").count("not measured yet") == 2
    assert "Not measured yet." in house.read("docs/papers/my-paper.md")
    assert not (house.folder / "measured.json").exists()


def test_the_readme_row(house: House) -> None:
    house.add("dom-my-paper", GOOD)
    house.run()
    row = next(line for line in house.read("README.md").splitlines() if "my-paper" in line)
    assert "[`dom/my-paper`](docs/papers/my-paper.md)<br>A paper, 2020" in row
    assert "`cohobate-dom`" in row
    assert "makes \\| things better" in row
    assert "Dice +9 points (somewhere)" in row
    assert "speed" not in row, "only claims on the compared metric"
    assert "Dice ↑ 0.6 → 0.7067, difference +0.107 (95 % interval +0.0923 to +0.121)" in row
    assert "3 seeds, SYNTHETIC data: **better**" in row
    assert "step time × 1.5, peak memory × 1, 1,234 more parameters" in row
    assert "(papers/my-paper.md)" in house.read("docs/index.md")


def test_a_result_against_the_method_is_shown_as_such(house: House) -> None:
    house.add("dom-my-paper", BAD)
    house.run()
    assert "difference -0.107 (95 % interval -0.121 to -0.0923)" in house.read("README.md")
    assert "**worse**" in house.read("README.md")
    assert "**worse**" in house.read("docs/index.md")
    assert "| worse |" in house.read("docs/papers/my-paper.md")
    assert house.measured[1].endswith("(95 % interval -0.121 to -0.0923): worse")
    assert "better" not in house.read("docs/papers/my-paper.md")


def test_an_unclear_result_is_shown_as_such(house: House) -> None:
    house.add("dom-my-paper", comparison([0.5, 0.6, 0.7], [0.6, 0.5, 0.75]))
    house.run()
    assert "**no clear difference**" in house.read("README.md")


def test_a_page_shows_every_variant_with_its_command_and_versions(house: House) -> None:
    house.add("dom-my-paper", GOOD)
    other = {"recipe": "dom/my-paper/real", "seeds": [3, 4, 5], "data": "real volumes"}
    house.add("dom-my-paper-real", comparison([0.5, 0.6, 0.7], [0.5, 0.6, 0.6], **other))
    house.run()
    page = house.read("docs/papers/my-paper.md")
    assert page.startswith("# A paper\n\nBefore.\n")
    assert page.endswith("\n\nAfter.\n")
    assert "`cohobate compare dom/my-paper --seeds 3` (torch 2.99, two cores" in page
    assert "`cohobate compare dom/my-paper --seeds 3 --first-seed 3` (torch 2.99" in page
    assert "### real\n\n`dom/my-paper/real`, 3 paired seeds (3–5)" in page
    assert "(../results/dom-my-paper-real.png)" in page
    assert (house.root / "docs/results/dom-my-paper-real.png").exists()
    assert "<br>real: Dice" in house.read("README.md")
    assert (
        house.measured[0]
        == "dom/my-paper, 3 paired seeds, 600 steps a run; data: SYNTHETIC volumes"
    )


def test_a_variant_with_a_block_of_its_own_is_shown_there_alone(house: House) -> None:
    house.add("dom-my-paper", GOOD)
    house.add("dom-my-paper-real", {**GOOD, "data": "real volumes"})
    page = house.root / "docs/papers/my-paper.md"
    page.write_text(f"{PAGE}\n<!-- results:dom-my-paper-real -->\n<!-- /results -->\n")
    assert house.run() == 0
    before, after = page.read_text().split("After.")
    assert "SYNTHETIC volumes" in before
    assert "real volumes" not in before
    assert "real volumes" in after
    assert "SYNTHETIC volumes" not in after


def test_writing_twice_changes_nothing(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    house.add("dom-my-paper", GOOD)
    assert house.run() == 0
    capsys.readouterr()
    assert house.run() == 0
    assert house.run("--check") == 0
    assert capsys.readouterr().out == ""


def edit(name: str, old: str, new: str) -> Callable[[House], None]:
    def change(house: House) -> None:
        text = house.read(name)
        assert old in text
        (house.root / name).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        (edit("README.md", "+0.107", "+0.207"), "README.md"),
        (edit("docs/index.md", "better", "best"), "docs/index.md"),
        (edit("docs/papers/my-paper.md", "0.7067", "0.8"), "docs/papers/my-paper.md"),
        (lambda house: house.add("dom-my-paper", BAD), "docs/results/dom-my-paper.png"),
        (lambda house: (house.folder / "measured.json").unlink(), "measured.json"),
        (lambda house: (house.root / "docs/results/dom-my-paper.json").unlink(), "measured.json"),
        (lambda house: (house.folder / "paper.yaml").write_text(f"{PAPER}x: 1"), None),
    ],
)
def test_what_is_stale_is_named(
    house: House,
    change: Callable[[House], None],
    stale: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    house.add("dom-my-paper", GOOD)
    house.run()
    capsys.readouterr()
    change(house)
    before = {p: p.read_bytes() for p in house.root.rglob("*") if p.is_file()}
    assert house.run("--check") == (stale is not None)
    out = capsys.readouterr().out
    assert f"{stale}: stale" in out if stale else out == ""
    assert before == {p: p.read_bytes() for p in house.root.rglob("*") if p.is_file()}
    assert house.run() == 0
    assert house.run("--check") == 0


def test_a_benchmark_becomes_a_table(house: House) -> None:
    content = {"rows": [{"shape": "8 × 8", "ms": 1.23456}], "command": "run it", "machine": "m"}
    house.add("bench-core", content)
    page = house.root / "docs/fused.md"
    page.write_text("<!-- results:bench-core -->\n<!-- /results -->\n")
    assert house.run() == 0
    assert "| shape | ms |\n| --- | --- |\n| 8 × 8 | 1.235 |\n\n`run it` (m)" in page.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.add("dom-other", GOOD), "the name must start with dom-my-paper"),
        (lambda h: h.add("dom-my-paperback", GOOD), "the name must start with dom-my-paper"),
        (lambda h: h.add("dom-x", {**GOOD, "recipe": "dom/x"}), "there is no paper dom/x"),
        (lambda h: h.add("dom-my-paper", {"seeds": []}), "not written by `cohobate compare"),
        (edit("README.md", "<!-- /papers -->", ""), "<!-- papers --> and <!-- /papers -->"),
        (edit("docs/papers/my-paper.md", "<!-- results:dom-my-paper", "<!-- "), "needs a line"),
        (edit("docs/papers/my-paper.md", "results:dom", "results:mod"), "no paper or result mod-"),
        (edit("docs/papers/my-paper.md", "<!-- /results -->", ""), "must stand there once"),
    ],
)
def test_a_bad_source_is_one_line_and_nothing_is_written(
    house: House,
    change: Callable[[House], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(house)
    before = {p: p.read_bytes() for p in house.root.rglob("*") if p.is_file()}
    assert house.run() == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert before == {p: p.read_bytes() for p in house.root.rglob("*") if p.is_file()}
