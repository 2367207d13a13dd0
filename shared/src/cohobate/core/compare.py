"""Does distillation help on these data? Paired runs over seeds, and an honest table.

Every arm trains with the same seeds: the same initial student, data order and augmentation. The
difference is taken seed by seed, which removes most of the spread between seeds.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from cohobate.core import catalog
from cohobate.core.arms import Run, plan, run_all
from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic, write_json
from cohobate.core.recipes import read_config

RECIPE_ARM = "distilled"
Stages = list[dict[str, Any]]
"""``run.json`` of each stage of one run, in order."""


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
        runs: Arm → seed → the stages that the arm has a use for; results are the last one's. The
            baseline is the first arm.
    """

    about: dict[str, Any]
    metrics: list[Metric]
    runs: dict[str, dict[int, Stages]]

    @property
    def baseline(self) -> str:
        """Name of the arm that the others are compared with."""
        return next(iter(self.runs))

    def values(self, arm: str, metric: Metric) -> list[float]:
        """One value per seed, in order of the seeds."""
        return [_result(stages[-1], metric.name) for stages in self.runs[arm].values()]

    def difference(self, arm: str, metric: Metric) -> Interval:
        """Paired difference of an arm minus the baseline."""
        pairs = zip(self.values(arm, metric), self.values(self.baseline, metric), strict=True)
        return interval([a - b for a, b in pairs])

    def verdict(self, arm: str, metric: Metric) -> str:
        """``better``, ``worse``, or ``no clear difference`` at the 95 % level."""
        found = self.difference(arm, metric)
        if found.low <= 0.0 <= found.high:
            return "no clear difference"
        up = found.mean > 0
        return "better" if up == (metric.direction == "higher") else "worse"

    @property
    def step_clock(self) -> str:
        """What steps are timed by: ``cpu`` where all stages have CPU times, otherwise ``wall``."""
        every = [stage for seeds in self.runs.values() for run in seeds.values() for stage in run]
        timed = [stage for stage in every if stage.get("step_seconds") is not None]
        known = timed and all(stage.get("step_cpu_seconds") is not None for stage in timed)
        return "cpu" if known else "wall"

    def cost(self, arm: str) -> dict[str, Any]:
        """What an arm costs in training: ratios to the baseline, None where one is not known.

        Returns:
            ``training_time_ratio``: steps × time of a step, over all ``stages``, those that the arm
            trains and has a use for, shared ones too; ``step_time_ratio``: in ``step_time_stage``,
            the last that both arms train, each for itself; ``peak_memory_ratio``: in the stage that
            takes most; ``added_parameters``: beside the student's, in the stage with most, and
            ``added_parameters_share`` of the student's.
        """
        own, base = (list(self.runs[name].values()) for name in (arm, self.baseline))
        time = "step_cpu_seconds" if self.step_clock == "cpu" else "step_seconds"
        trained = [{s["stage"] for s in run if s["steps"] and s.get(time)} for run in own + base]
        alone = set.intersection(*trained).difference(self.about.get("shared_stages", []))
        stage = next((s["stage"] for s in reversed(own[0]) if s["stage"] in alone), None)
        most = max((s["parameters"] for s in own[0]), key=lambda found: found["added"])
        return {
            "stages": [s["stage"] for s in own[0] if s["steps"]],
            "training_time_ratio": _ratio(own, base, lambda run: _training_time(run, time)),
            "step_time_stage": stage,
            "step_time_ratio": _ratio(
                own, base, lambda run: next((s[time] for s in run if s["stage"] == stage), None)
            ),
            "peak_memory_ratio": _ratio(
                own, base, lambda run: max(s.get("peak_memory_bytes") or 0 for s in run)
            ),
            "added_parameters": most["added"],
            "added_parameters_share": most["added"] / most["student"],
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
            if arm != self.baseline:
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
        return {**self.about, "step_clock": self.step_clock, "metrics": labels, "arms": arms}

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
            share = f"{100 * content['cost']['added_parameters_share']:.3g} %"
            told = f"Cost of {arm} over {baseline}: {cost_text(result, arm)} ({share})"
            lines += ["", f"{told}, none afterwards."]
    return "\n".join(lines)


def cost_text(result: dict[str, Any], arm: str) -> str:
    """What is known of an arm's cost over the baseline: ``step time × 1.2, 9 more parameters ...``.

    Args:
        result: As for `markdown`.
        arm: The arm.
    """
    cost, base = (result["arms"][name]["cost"] for name in (arm, next(iter(result["arms"]))))
    stages, others = cost.get("stages", []), base.get("stages", [])
    whole, step = cost.get("training_time_ratio"), cost["step_time_ratio"]
    if None not in (whole, step) and math.isclose(whole, step):
        whole = None  # one stage of as many steps
    which = of = ""
    if len(stages) > 1 or stages != others:
        which = ", ".join(stages) + (f" against {', '.join(others)}" if stages != others else "")
        shared = [stage for stage in result.get("shared_stages", []) if stage in stages]
        which = f" ({which}; shared: {', '.join(shared)})" if shared else f" ({which})"
        of = f" of {cost['step_time_stage']}"
    ratios = [
        (whole, f"training time × {{:.3g}}{which}"),
        (step, f"step time{of} × {{:.3g}}"),
        (cost["peak_memory_ratio"], "peak memory × {:.3g}"),
    ]
    known = [text.format(ratio) for ratio, text in ratios if ratio is not None]
    return ", ".join([*known, f"{cost['added_parameters']:,} more parameters in training"])


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
    without: dict[str, list[str]] = {RECIPE_ARM: []}
    for arm in dict.fromkeys(["baseline", *arms]):
        if arm not in recipe.paper.arms:
            raise InputError(f"unknown arm '{arm}'{catalog.suggestion(arm, recipe.paper.arms)}")
        overlays[arm] = path = recipe.paper.arms[arm]
        without[arm] = read_config(path).get("without", [])
    overlays[RECIPE_ARM] = None
    planned = plan(recipe, overlays, args, seeds, out)
    run_all(planned, jobs)
    infos = {
        arm: {seed: _used(planned[arm, seed], without[arm]) for seed in seeds} for arm in overlays
    }
    result = Comparison(_about(recipe, args, seeds, infos), _metrics(recipe, infos), infos)
    _write(result, out, json_copy)
    return result


def _used(run: Run, without: Sequence[str]) -> Stages:
    """The stages of a run but those that its arm has no use for."""
    return [info for info in (s.info for s in run.stages) if info["stage"] not in without]


def _result(run: dict[str, Any], name: str) -> float:
    found = {**run.get("best", {}), **run.get("test", {})}
    if found.get(name) is None:
        raise InputError(f"the run reported no {name} (it has: {', '.join(found) or 'nothing'})")
    return float(found[name])


def _metrics(recipe: catalog.Recipe, runs: dict[str, dict[int, Stages]]) -> list[Metric]:
    """The paper's metrics; those in ``also`` only where every run reported them."""
    about = recipe.paper.about
    if "metric" not in about:
        raise InputError(f"{recipe.paper.folder / 'paper.yaml'}: names no metric to compare")
    every = [stages[-1] for seeds in runs.values() for stages in seeds.values()]
    main = about["metric"]
    also = about.get("also", [])
    present = [m for m in also if all(m["name"] in run.get("test", {}) for run in every)]
    return [Metric(m["name"], m["label"], m["direction"]) for m in [main, *present]]


def _about(
    recipe: catalog.Recipe,
    args: Sequence[str],
    seeds: list[int],
    runs: dict[str, dict[int, Stages]],
) -> dict[str, Any]:
    stages = next(iter(runs[RECIPE_ARM].values()))
    run = stages[-1]
    return {
        "recipe": recipe.full_name,
        "command": shlex.join(["cohobate", "compare", recipe.full_name, *_public(args)]),
        "data": run["data"],
        "seeds": seeds,
        "steps": sum(stage["steps"] for stage in stages),
        "shared_stages": [stage.name for stage in recipe.shared.stages] if recipe.shared else [],
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


def _training_time(run: Stages, time: str) -> float | None:
    """Seconds in the steps of all stages; None where a step was not timed."""
    trained = [stage for stage in run if stage["steps"]]
    if any(stage.get(time) is None for stage in trained):
        return None
    return sum(stage["steps"] * stage[time] for stage in trained)


def _ratio(
    own: list[Stages], base: list[Stages], value: Callable[[Stages], float | None]
) -> float | None:
    """Median over seeds of the paired ratio."""
    pairs = [(value(a), value(b)) for a, b in zip(own, base, strict=True)]
    ratios = [a / b for a, b in pairs if a and b]
    return statistics.median(ratios) if ratios else None


def _write(result: Comparison, out: Path, json_copy: Path | None) -> None:
    for path in [out / "compare.json", *([json_copy] if json_copy else [])]:
        write_json(path, result.as_json())
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
