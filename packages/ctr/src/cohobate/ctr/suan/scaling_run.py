"""Runs of a scaling study: every grade on every amount of data, through the recipe."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from cohobate.core import catalog, runs
from cohobate.core.errors import InputError
from cohobate.ctr.data import ClickData
from cohobate.ctr.nets.inputs import Common
from cohobate.ctr.plots import scaling_plot
from cohobate.ctr.suan.network import GRADES, SUAN, Grade
from cohobate.ctr.suan.scaling import PowerLaw, fit_power_law


def parse_grade(text: str) -> Grade:
    """Read ``g1`` … ``g5`` or ``BLOCKSxLENGTHxWIDTH``.

    Raises:
        InputError: it is neither.
    """
    if text in GRADES:
        return GRADES[text]
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise InputError(f"grade {text!r}: one of {', '.join(GRADES)} or BLOCKSxLENGTHxWIDTH")
    blocks, length, dim = map(int, text.split("x"))
    return Grade(blocks, length, dim)


def run_scaling(
    out: Path,
    root: Path | None,
    grades: Sequence[str],
    rows: Sequence[int],
    seeds: Sequence[int],
    epochs: int,
    student: Literal["suan", "lightsuan"],
) -> dict[str, Any]:
    """Train, fit and draw.

    Args:
        out: folder of the runs; finished ones are not repeated.
        root: data; None generates them.
        grades: see :func:`parse_grade`, rising.
        rows: training rows, rising.
        seeds: seeds to average over.
        epochs: passes over the data.
        student: the network that grows.

    Returns:
        AUC by grade and rows, fits by name, and what was run.
    """
    sizes = {name: parse_grade(name) for name in grades}
    length = max(size.length for size in sizes.values())
    generated = [max(rows), 5_000, 20_000]
    options = [f"--data.length={length}", f"--trainer.max_epochs={epochs}",
               "--trainer.enable_progress_bar=false"]  # fmt: skip
    if root is None:
        options.append(f"--data.rows={generated}")
        data = ClickData(length=length, rows=(generated[0], generated[1], generated[2]))
    else:
        options.append(f"--data.root={root}")
        data = ClickData(root, length=length)
    recipe = catalog.find("ctr/suan")
    arm = "suan" if student == "suan" else "baseline"
    auc: dict[str, list[float]] = {}
    spread: dict[str, list[float]] = {}
    cells = [(name, n) for name in grades for n in rows]
    for name, n in tqdm(cells, "scaling"):
        size, found = sizes[name], []
        for seed in seeds:
            words = [
                *options,
                f"--model.student.init_args.blocks={size.blocks}",
                f"--model.student.init_args.heads={size.heads}",
                f"--model.common.dim={size.dim}",
                f"--model.common.length={size.length}",
                f"--data.limit_rows={n}",
                f"--seed_everything={seed}",
            ]
            folder = out / f"{student}-{name}-{n}-{seed}"
            run = runs.fit(recipe, words, arm=recipe.paper.arms[arm], out=folder)[0]
            found.append(run.info["test"]["test/auc"])
        auc.setdefault(name, []).append(float(np.mean(found)))
        spread.setdefault(name, []).append(float(np.std(found)))
    parameters = {
        name: SUAN(
            data.layout, Common(dim=s.dim, length=s.length, head=(128, 64)), blocks=s.blocks
        ).dense_parameters()
        for name, s in sizes.items()
    }
    return _result(out, data, rows, list(seeds), epochs, student, auc, spread, parameters)


def _result(
    out: Path,
    data: ClickData,
    rows: Sequence[int],
    seeds: list[int],
    epochs: int,
    student: str,
    auc: dict[str, list[float]],
    spread: dict[str, list[float]],
    parameters: dict[str, int],
) -> dict[str, Any]:
    """Fit both ways, draw, and gather everything."""
    best, grades = data.best_auc, list(auc)
    dense = [float(parameters[g]) for g in grades]
    free = 2 if best is not None else 3
    by_rows: dict[str, PowerLaw] = {}
    by_parameters: dict[str, PowerLaw] = {}
    if len(rows) >= free:
        by_rows = {g: fit_power_law([float(n) for n in rows], auc[g], best) for g in grades}
    columns = {f"{n} rows": [auc[g][i] for g in grades] for i, n in enumerate(rows)}
    if len(grades) >= free:
        by_parameters = {name: fit_power_law(dense, y, best) for name, y in columns.items()}

    def curves(laws: dict[str, PowerLaw], x: Sequence[float]) -> dict[str, Any]:
        line = np.geomspace(min(x), max(x), 50)
        return {name: (line, law(line)) for name, law in laws.items()}

    panels = [
        ("training rows", {g: ([float(n) for n in rows], auc[g]) for g in grades}),
        ("dense parameters", {name: (dense, y) for name, y in columns.items()}),
    ]
    fitted = {
        "training rows": curves(by_rows, [float(n) for n in rows]),
        "dense parameters": curves(by_parameters, dense),
    }
    scaling_plot(panels, fitted, out / "scaling.png", best=best)
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": _table(rows, auc, parameters, by_rows, by_parameters),
        "data": data.describe(),
        "student": student,
        "epochs": epochs,
        "seeds": seeds,
        "training_rows": list(rows),
        "best_auc": best,
        "dense_parameters": parameters,
        "auc": auc,
        "auc_sd": spread,
        "by_rows": {name: law.as_dict() for name, law in by_rows.items()},
        "by_parameters": {name: law.as_dict() for name, law in by_parameters.items()},
    }


def _table(
    rows: Sequence[int],
    auc: dict[str, list[float]],
    parameters: dict[str, int],
    by_rows: dict[str, PowerLaw],
    by_parameters: dict[str, PowerLaw],
) -> list[dict[str, Any]]:
    """AUC of each grade with the law over rows, then the laws over parameters."""

    def shown(law: PowerLaw | None) -> dict[str, Any]:
        if law is None:
            return {}
        error = {} if law.last_error is None else {"last point": f"{law.last_error:+.4f}"}
        return {"limit": round(law.a, 4), "exponent": round(law.e, 3), "R²": round(law.r2, 3),
                **error}  # fmt: skip

    table: list[dict[str, Any]] = [
        {
            "grade": grade,
            "dense parameters": parameters[grade],
            **{f"{n} rows": round(v, 4) for n, v in zip(rows, auc[grade], strict=True)},
            **shown(by_rows.get(grade)),
        }
        for grade in auc
    ]
    return table + [{"grade": f"all, {name}", **shown(law)} for name, law in by_parameters.items()]
