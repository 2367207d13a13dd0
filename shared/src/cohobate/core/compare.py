"""Does distillation help on these data? Paired runs over seeds, and an honest table.

Every arm trains with the same seeds: the same initial student, data order and augmentation. The
difference is taken seed by seed, which removes most of the spread between seeds.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from cohobate.core import catalog
from cohobate.core.arms import plan, run_all
from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic

RECIPE_ARM = "distilled"


@dataclass(frozen=True)
class Metric:
    """A number that is compared.

    Attributes:
        name: Name in the run's results, ``test/dice``.
        label: Name in the table.
        direction: ``higher`` or ``lower`` is better.
    """

    name: str
    label: str
    direction: str


@dataclass(frozen=True)
class Interval:
    """A mean with its spread.

    Attributes:
        mean: Mean over seeds.
        sd: Sample standard deviation; 0 for one seed.
        low: Lower end of the 95 % confidence interval of the mean (Student's t).
        high: Upper end.
    """

    mean: float
    sd: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Mean, standard deviation and 95 % interval of the mean.

    Args:
        values: One per seed.

    Example:
        >>> found = interval([1.0, 2.0, 3.0])
        >>> found.mean, found.sd, round(found.low, 4), round(found.high, 4)
        (2.0, 1.0, -0.4841, 4.4841)
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, 0.0, float("-inf"), float("inf"))
    sd = statistics.stdev(values)
    half = float(student_t.ppf(0.975, len(values) - 1)) * sd / len(values) ** 0.5
    return Interval(mean, sd, mean - half, mean + half)


@dataclass
class Comparison:
    """All runs of a comparison.

    Attributes:
        about: Paper, recipe, options, data, versions: what was run.
        metrics: What is compared, the main metric first.
        runs: Arm → seed → ``run.json`` of that run; the baseline is the first arm.
    """

    about: dict[str, Any]
    metrics: list[Metric]
    runs: dict[str, dict[int, dict[str, Any]]]

    def values(self, arm: str, metric: Metric) -> list[float]:
        """One value per seed, in order of the seeds."""
        return [_result(run, metric.name) for run in self.runs[arm].values()]

    def difference(self, arm: str, metric: Metric) -> Interval:
        """Paired difference of an arm minus the baseline."""
        baseline = next(iter(self.runs))
        pairs = zip(self.values(arm, metric), self.values(baseline, metric), strict=True)
        return interval([a - b for a, b in pairs])

    def verdict(self, arm: str, metric: Metric) -> str:
        """``better``, ``worse``, or ``no clear difference`` at the 95 % level."""
        found = self.difference(arm, metric)
        if found.low <= 0.0 <= found.high:
            return "no clear difference"
        up = found.mean > 0
        return "better" if up == (metric.direction == "higher") else "worse"

    def cost(self, arm: str) -> dict[str, float | None]:
        """Step time and memory relative to the baseline, parameters added in training."""
        own, base = list(self.runs[arm].values()), list(next(iter(self.runs.values())).values())
        students = own[0]["parameters"]["student"]
        return {
            "step_time_ratio": _ratio(own, base, "step_seconds"),
            "peak_memory_ratio": _ratio(own, base, "peak_memory_bytes"),
            "added_parameters": own[0]["parameters"]["added"],
            "added_parameters_share": own[0]["parameters"]["added"] / students,
        }

    def as_json(self) -> dict[str, Any]:
        """Everything: each run, the summaries, the verdicts."""
        arms: dict[str, Any] = {}
        for arm in self.runs:
            arms[arm] = {
                "metrics": {
                    m.name: {
                        "values": self.values(arm, m),
                        "mean": interval(self.values(arm, m)).mean,
                        "sd": interval(self.values(arm, m)).sd,
                    }
                    for m in self.metrics
                },
                "cost": self.cost(arm),
            }
            if arm != next(iter(self.runs)):
                for m in self.metrics:
                    found = self.difference(arm, m)
                    arms[arm]["metrics"][m.name] |= {
                        "difference": found.mean,
                        "interval": [found.low, found.high],
                        "verdict": self.verdict(arm, m),
                    }
        labels = [
            {"name": m.name, "label": m.label, "direction": m.direction} for m in self.metrics
        ]
        return {**self.about, "metrics": labels, "arms": arms}

    def markdown(self) -> str:
        """The table people read."""
        return markdown(self.as_json())


def markdown(result: dict[str, Any]) -> str:
    """The table of a comparison.

    Args:
        result: As `Comparison.as_json` gives and ``compare.json`` holds.
    """
    baseline = next(iter(result["arms"]))
    seeds = result["seeds"]
    lines = [
        f"`{result['recipe']}`, {len(seeds)} paired seeds ({seeds[0]}–{seeds[-1]}), "
        f"{result['steps']} steps a run. Data: {result['data']}.",
        "",
        "| metric | arm | mean ± sd | paired difference (95 % interval) | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for metric in result["metrics"]:
        arrow = "↑" if metric["direction"] == "higher" else "↓"
        for arm, content in result["arms"].items():
            m = content["metrics"][metric["name"]]
            row = f"| {metric['label']} {arrow} | {arm} | {m['mean']:.4g} ± {m['sd']:.2g} |"
            if arm == baseline:
                row += " | |"
            else:
                low, high = m["interval"]
                row += f" {m['difference']:+.3g} ({low:+.3g} to {high:+.3g}) | {m['verdict']} |"
            lines.append(row)
    for arm, content in result["arms"].items():
        if arm != baseline:
            cost = content["cost"]
            lines += [
                "",
                f"Cost of {arm} over {baseline}: step time × {_number(cost['step_time_ratio'])}, "
                f"peak memory × {_number(cost['peak_memory_ratio'])}, "
                f"{cost['added_parameters']:,} more parameters in training "
                f"({100 * cost['added_parameters_share']:.3g} %), none afterwards.",
            ]
    return "\n".join(lines)


def compare(
    recipe: catalog.Recipe,
    args: Sequence[str],
    *,
    seeds: Iterable[int],
    arms: Sequence[str],
    out: Path,
    jobs: int = 1,
    json_copy: Path | None = None,
) -> Comparison:
    """Train the recipe and its arms over seeds and compare them.

    Each run is a process of its own, so that memory is measured cleanly. A comparison that was
    stopped goes on: finished runs are kept, a half-finished one is resumed. Stages that the recipe
    calls ``shared`` are trained once for each seed.

    Args:
        recipe: The recipe.
        args: Options for every run, as for ``fit``.
        seeds: The seeds; every arm uses all of them.
        arms: Arms of the paper, the baseline first; the recipe itself is added last.
        out: Folder; runs go to ``<out>/<arm>/seed-<n>``, the result to ``compare.{json,md,png}``.
        jobs: Runs at the same time.
        json_copy: Where the JSON is written a second time.

    Returns:
        The comparison.

    Raises:
        InputError: An arm is unknown, a seed is missing, or a run ended with bad input.
    """
    seeds = list(seeds)
    if not seeds:
        raise InputError("compare needs at least one seed")
    overlays: dict[str, Path | None] = {}
    for arm in dict.fromkeys(["baseline", *arms]):
        if arm not in recipe.paper.arms:
            raise InputError(f"unknown arm '{arm}'{catalog.suggestion(arm, recipe.paper.arms)}")
        overlays[arm] = recipe.paper.arms[arm]
    overlays[RECIPE_ARM] = None
    planned = plan(recipe, overlays, args, seeds, out)
    run_all(planned, jobs)
    infos = {arm: {seed: planned[arm, seed].stages[-1].info for seed in seeds} for arm in overlays}
    result = Comparison(_about(recipe, args, seeds, infos), _metrics(recipe, infos), infos)
    _write(result, out, json_copy)
    return result


def _result(run: dict[str, Any], name: str) -> float:
    found = {**run.get("best", {}), **run.get("test", {})}
    if found.get(name) is None:
        raise InputError(f"the run reported no {name} (it has: {', '.join(found) or 'nothing'})")
    return float(found[name])


def _metrics(recipe: catalog.Recipe, runs: dict[str, dict[int, dict[str, Any]]]) -> list[Metric]:
    """The paper's metrics; those in ``also`` only where every run reported them."""
    about = recipe.paper.about
    if "metric" not in about:
        raise InputError(f"{recipe.paper.folder / 'paper.yaml'}: names no metric to compare")
    every = [run for seeds in runs.values() for run in seeds.values()]
    main = about["metric"]
    also = about.get("also", [])
    present = [m for m in also if all(m["name"] in run.get("test", {}) for run in every)]
    return [Metric(m["name"], m["label"], m["direction"]) for m in [main, *present]]


def _about(
    recipe: catalog.Recipe,
    args: Sequence[str],
    seeds: list[int],
    runs: dict[str, dict[int, dict[str, Any]]],
) -> dict[str, Any]:
    run = next(iter(runs[RECIPE_ARM].values()))
    return {
        "recipe": recipe.full_name,
        "command": shlex.join(["cohobate", "compare", recipe.full_name, *_public(args)]),
        "data": run["data"],
        "seeds": seeds,
        "steps": run["steps"],
        "versions": run["versions"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _public(args: Sequence[str]) -> list[str]:
    """Options without the folders of this machine."""
    shown = []
    for word in args:
        name, equals, value = word.partition("=")
        text = value if equals else name
        shown.append(f"{name}{equals}{Path(text).name}" if equals else Path(text).name)
    return shown


def _ratio(own: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> float | None:
    """Median over seeds of the paired ratio."""
    pairs = [(a.get(key), b.get(key)) for a, b in zip(own, base, strict=True)]
    ratios = [a / b for a, b in pairs if a and b]
    return statistics.median(ratios) if ratios else None


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def _write(result: Comparison, out: Path, json_copy: Path | None) -> None:
    content = json.dumps(result.as_json(), indent=1) + "\n"
    for path in [out / "compare.json", *([json_copy] if json_copy else [])]:
        with save_atomic(path) as temporary:
            temporary.write_text(content)
    with save_atomic(out / "compare.md") as temporary:
        temporary.write_text(result.markdown() + "\n")
    with save_atomic(out / "compare.png") as temporary:
        draw(result.as_json(), temporary)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw each metric: one line a seed from arm to arm, the mean as a bar.

    Args:
        result: As `Comparison.as_json` gives.
        path: The PNG.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = list(result["arms"])
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        columns = min(3, len(result["metrics"]))
        rows = math.ceil(len(result["metrics"]) / columns)
        width = max(0.85 * len(arms), 2.0, 5.0 / columns)  # the title needs five inches
        figure = Figure(figsize=(width * columns + 0.6, 2.9 * rows + 0.3), layout="constrained")
        FigureCanvasAgg(figure)
        for place, metric in enumerate(result["metrics"]):
            axes = figure.add_subplot(rows, columns, place + 1)
            values = [result["arms"][arm]["metrics"][metric["name"]]["values"] for arm in arms]
            for seed in zip(*values, strict=True):
                axes.plot(
                    range(len(arms)), seed, color="0.6", marker="o", markersize=3, linewidth=1
                )
            for x, found in enumerate(values):
                mean = statistics.fmean(found)
                axes.plot([x - 0.2, x + 0.2], [mean, mean], color="C0", linewidth=3)
            axes.set_xticks(range(len(arms)), [re.sub("[-_]", "\n", arm) for arm in arms])
            axes.margins(x=0.12)
            arrow = "higher is better" if metric["direction"] == "higher" else "lower is better"
            title = textwrap.fill(f"{metric['label']} ({arrow})", round(13 * width))
            axes.set_title(title, fontsize=9)
        figure.suptitle(
            f"{result['recipe']}: a grey line is one seed, the bar the mean", fontsize=9
        )
        figure.savefig(path, dpi=140, format="png")
