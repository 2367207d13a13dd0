"""What benchmarks share: variants timed in turn in one process, and the JSON of a page's table."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm


def in_turn(
    runs: Mapping[str, Callable[[], object]], repeat: int, title: str = ""
) -> dict[str, list[float]]:
    """Process seconds of each variant, all taking turns, after one round that does not count.

    Seconds of the process, and not of the clock, count other work on the machine little; and what
    slows the machine for a while slows all variants alike.

    Args:
        runs: What to time, by name.
        repeat: Rounds that count.
        title: Of the progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in tqdm(range(repeat + 1), desc=title or "rounds"):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median seconds of each variant."""
    return {name: statistics.median(found) for name, found in seconds.items()}


def times_faster(ours: Sequence[float], other: Sequence[float]) -> str:
    """How many times faster ours is: median, least and greatest of the ratios of each round."""
    ratios = [b / a for a, b in zip(ours, other, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def write_rows(
    out: Path,
    script: str,
    packages: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    conditions: str = "1 thread, process seconds",
    update: bool = False,
) -> None:
    """Write the rows of a benchmark, with what they were measured by and on.

    Args:
        out: JSON file, best in ``docs/results``.
        script: Command that measures, from the repository's root.
        packages: Distributions whose versions matter; those that are not installed are left out.
        rows: One mapping a row of the table, all with the same keys.
        conditions: How the seconds were taken.
        update: Keep the rows that stand in the file under another ``what``.
    """
    if update and out.exists():
        new = {row["what"] for row in rows}
        rows = [row for row in json.loads(out.read_text())["rows"] if row["what"] not in new] + [
            *rows
        ]
    content = {
        "command": f"python {script}",
        "machine": f"{platform.machine()}, {conditions}",
        "versions": {name: found for name in packages if (found := _version(name))},
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
