"""Millions of generated rows through training: memory over time, and a run killed and resumed.

    python tests/benchmarks/ctr/bench_stream.py WORK STEP [--rows 20000000] [--out OUT.json]

STEP is one of ``generate``, ``whole``, ``killed`` and ``report``; each may be run on its own, in
that order, and one that is done is not repeated. ``whole`` trains without a stop. ``killed`` trains
the same again and is killed with SIGKILL at a third and at two thirds of the steps. ``report``
compares both to the last bit and writes the memory of every process of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

BATCH, LENGTH, HEAD = 8192, 8, 16
FIT = """
import sys
from pathlib import Path
import torch
from cohobate.core import catalog, runs
torch.set_num_threads(1)
recipe = catalog.find("ctr/suan")
runs.fit(recipe, sys.argv[3:], arm=recipe.paper.arms[sys.argv[1]], out=Path(sys.argv[2]))
"""


def options(work: Path) -> list[str]:
    """What both runs are started with."""
    return [
        f"--data.root={work / 'clicks'}", f"--data.batch_size={BATCH}",
        f"--model.common.head=[{HEAD}]", "--checkpoint_steps=250", "--trainer.max_epochs=1",
        "--trainer.log_every_n_steps=20", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def generate(work: Path, rows: int) -> None:
    """Write the clicks; the peak is the generator's."""
    if (work / "clicks").exists():
        return
    command = [sys.executable, "-m", "cohobate.ctr", "generate", str(work / "making"),
               "--rows", f"[{rows},10000,50000]", "--length", str(LENGTH)]  # fmt: skip
    _watch(work / "generate.json", subprocess.Popen(command), None, None)
    (work / "making").rename(work / "clicks")


def train(work: Path, name: str, kills: list[int]) -> None:
    """Train into ``work / name``, killing the process when it has logged one of the steps."""
    folder = work / name
    command = [sys.executable, "-c", FIT, "mlp", str(folder), *options(work)]
    for step in [*kills, None]:
        process = subprocess.Popen(command)
        reached = _watch(work / f"{name}-{step or 'end'}.json", process, folder, step)
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"{name}: ended with {process.returncode}")
        print(name, f"{'killed' if step else 'finished'} at step {reached}", flush=True)


def _watch(path: Path, process: Any, folder: Path | None, stop: int | None) -> int:
    """Note resident memory and step twice a second until the end, or kill at a step."""
    watched, samples, step = psutil.Process(process.pid), [], 0
    start = time.time()
    while process.poll() is None:
        try:
            memory = watched.memory_info().rss
        except psutil.NoSuchProcess:
            break
        step = _step(folder) if folder else 0
        samples.append([round(time.time() - start, 1), step, memory])
        if stop is not None and step >= stop:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.5)
    process.wait()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{path.stem}: ended with {process.returncode}")
    path.write_text(json.dumps(samples))
    return step


def _step(folder: Path) -> int:
    """The last step in ``metrics.csv``."""
    path = folder / "metrics.csv"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        header = file.readline().decode().strip().split(",")
        file.seek(max(path.stat().st_size - 2048, file.tell()))
        lines = file.read().decode().strip().splitlines()
    cells = lines[-1].split(",") if lines else []
    place = header.index("step")
    return int(cells[place]) if len(cells) == len(header) and cells[place] else 0


def report(work: Path, rows: int, out: Path) -> None:
    """Compare the two runs and write the memory of each process."""
    from cohobate.core.testing import assert_same_run

    assert_same_run(work / "whole", work / "killed")
    info = json.loads((work / "whole" / "run.json").read_text())
    table = []
    for path in sorted(work.glob("*.json"), key=lambda p: p.stat().st_mtime):
        samples = json.loads(path.read_text())
        trained = [s for s in samples if s[1] > 0] or samples
        first, last = trained[0], trained[-1]
        early = max(s[2] for s in trained[: max(len(trained) // 4, 1)])
        table.append(
            {
                "process": path.stem,
                "steps": f"{first[1]} to {last[1]}",
                "seconds": round(last[0]),
                "rows per second": round(
                    (last[1] - first[1]) * BATCH / max(last[0] - first[0], 0.5)
                    if path.stem != "generate"
                    else rows / max(last[0], 0.5)
                ),
                "peak MB in the first quarter": round(early / 1e6),
                "peak MB": round(max(s[2] for s in samples) / 1e6),
            }
        )
    content = {
        "command": f"python tests/benchmarks/ctr/bench_stream.py WORK report --rows {rows} "
        f"--out {out.name}",
        "machine": f"{platform.machine()}, one thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "data": info["data"],
        "setting": f"arm mlp, head {HEAD}, batch {BATCH}, L {LENGTH}, {info['steps']} steps, "
        "shuffled",
        "bytes_on_disk": sum(p.stat().st_size for p in (work / "clicks").rglob("*.parquet")),
        "test": info["test"],
        "killed_and_resumed_equals_whole": True,
        "rows": table,
    }
    out.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("step", choices=["generate", "whole", "killed", "report"])
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench-suan-stream.json"))
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    steps = asked.rows // BATCH
    if asked.step == "generate":
        generate(asked.work, asked.rows)
    elif asked.step == "whole":
        train(asked.work, "whole", [])
    elif asked.step == "killed":
        train(asked.work, "killed", [steps // 3, 2 * steps // 3])
    else:
        report(asked.work, asked.rows, asked.out)


if __name__ == "__main__":
    main()
