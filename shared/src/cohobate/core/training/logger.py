"""``metrics.csv``: one row per logged step, readable by anything, exact after a resume."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from cohobate.core.io import save_atomic


class MetricsCsv(Logger):
    """Writes metrics as they come to one CSV file.

    Lightning's own CSV logger starts its file anew when a run is resumed; this one keeps the rows
    of the checkpoint and drops those after it. A metric that first appears later adds a column.

    Args:
        folder: The run folder; the file is ``metrics.csv`` in it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._rows: list[dict[str, str]] = []
        self._columns = ["step", "epoch"]
        self._on_disk = 0
        self._stale = True

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """There is one file a run."""
        return ""

    @property
    def root_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @property
    def rows_written(self) -> int:
        """Rows so far, the header not counted."""
        return len(self._rows)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Hyper-parameters stand in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row; values are written with all digits a float32 has."""
        row = {"step": str(step), "epoch": str(int(metrics.get("epoch", 0)))}
        row |= {key: f"{float(value):.9g}" for key, value in metrics.items() if key != "epoch"}
        for key in row:
            if key not in self._columns:
                self._columns.append(key)
                self._stale = True
        self._rows.append(row)
        self.save()

    @rank_zero_only
    def save(self) -> None:
        """Bring the file up to date: append, or write it anew when a column came or rows went."""
        if self._stale:
            with save_atomic(self.path) as temporary, temporary.open("w", newline="") as file:
                self._write(file, self._rows, header=True)
        elif self._on_disk < len(self._rows):
            with self.path.open("a", newline="") as file:
                self._write(file, self._rows[self._on_disk :])
        self._on_disk, self._stale = len(self._rows), False

    def truncate(self, rows: int) -> None:
        """Read the file of an earlier run and keep its first ``rows`` rows.

        Args:
            rows: As ``rows_written`` was when the checkpoint was saved.
        """
        if self.path.exists():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                self._rows = [{k: v for k, v in row.items() if v} for row in reader][:rows]
            present = {key for row in self._rows for key in row}
            self._columns = [c for c in reader.fieldnames or [] if c in present | {"step", "epoch"}]
        self._stale = True

    def _write(self, file: Any, rows: list[dict[str, str]], header: bool = False) -> None:
        writer = csv.DictWriter(file, self._columns, restval="")
        if header:
            writer.writeheader()
        writer.writerows(rows)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read a ``metrics.csv``: one dictionary a row, without the empty cells.

    Args:
        path: The file.
    """
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
