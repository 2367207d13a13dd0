"""The runs of a comparison: every arm with every seed, a process each, under one progress bar."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cohobate.core import catalog
from cohobate.core.errors import InputError, guard
from cohobate.core.io import write_json
from cohobate.core.recipes import read_config, take_config_files
from cohobate.core.runs import RunFolder, stage_folders

ALL_ARMS = "all-arms"
"""Stands for an arm where the stages that all arms share are trained."""

_BAR = "{desc}: {percentage:3.0f}% |{bar}| {n:.1f}/{total} runs [{elapsed} < {remaining}{postfix}]"
Key = tuple[str, int]


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        arm: Name of the arm, or `ALL_ARMS`.
        seed: The seed.
        folder: Where it is trained.
        command: What trains it.
        stages: The run folders of its stages.
    """

    arm: str
    seed: int
    folder: Path
    command: list[str]
    stages: list[RunFolder]

    @property
    def done(self) -> bool:
        """Whether just this run is finished; another command is left to ``fit`` to judge."""
        started = self.folder / "command.json"
        same = started.exists() and json.loads(started.read_text()) == self.command[3:]
        return same and self.stages[-1].finished

    @property
    def fraction(self) -> float:
        """How much is done: the finished stages, and the epochs of the one after them."""
        finished = sum(stage.finished for stage in self.stages)
        whole = finished == len(self.stages)
        begun = 0.0 if whole else _epochs_done(self.stages[finished])
        return min((finished + begun) / len(self.stages), 0.99)

    def start(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start it, or let it go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "command.json").write_text(json.dumps(self.command[3:]))
        with (self.folder / "log.txt").open("ab") as output:
            return subprocess.Popen(self.command, stdout=output, stderr=output, env=environment)

    def failure(self, code: int) -> Exception:
        """Why it ended with this exit code."""
        log = self.folder / "log.txt"
        text = log.read_text(errors="replace").strip().splitlines()
        if code == 2:
            return InputError(text[-1].partition(": ")[2] if text else "")
        return RuntimeError(f"{self.arm}, seed {self.seed} ended with {code}; see {log}")

    def take(self, shared: Run) -> None:
        """Copy the stages that all arms share, where this run has none of its own."""
        for own, made in zip(self.stages, shared.stages, strict=False):
            if not own.path.exists():
                temporary = own.path.with_name(f".{own.path.name}")
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(made.path, temporary)
                temporary.rename(own.path)


def plan(
    recipe: catalog.Recipe,
    overlays: Mapping[str, Path | None],
    args: Sequence[str],
    seeds: Sequence[int],
    out: Path,
) -> dict[Key, Run]:
    """All runs by arm and seed, in the order in which they are started.

    Args:
        recipe: The recipe.
        overlays: Arm → its overlay; None for the recipe as it is.
        args: Options for every run.
        seeds: Every arm uses all of them.
        out: Runs go to ``<out>/<arm>/seed-<n>``.
    """
    shared = recipe.shared
    found = {}
    for seed in seeds:
        options = [*args, f"--seed_everything={seed}"]
        for arm, part in {ALL_ARMS: shared, **dict.fromkeys(overlays, recipe)}.items():
            if part is not None:
                folder = out / arm / f"seed-{seed}"
                overlay = ALL_ARMS if arm == ALL_ARMS else str(overlays[arm] or "")
                command = _command(recipe, overlay, options, folder)
                found[arm, seed] = Run(arm, seed, folder, command, stage_folders(part, folder))
    return found


def run_all(runs: Mapping[Key, Run], jobs: int) -> None:
    """Run what is not finished, ``jobs`` at a time; what all arms share is run before them.

    Raises:
        InputError: A run ended with bad input.
    """
    waiting = _unfinished(runs)
    total = len(waiting) + sum(run.done for run in runs.values() if run.arm != ALL_ARMS)
    running: dict[Key, subprocess.Popen[bytes]] = {}
    environment = dict(os.environ)
    # Several runs at once must not each take all cores.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(jobs, 1))))
    # On a terminal the bar moves each second, in a log there is a line every half minute.
    pause = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, desc="compare", mininterval=pause, bar_format=_BAR) as bar:
        try:
            while waiting or running:
                while len(running) < max(jobs, 1) and (key := _next(waiting, running)):
                    waiting.remove(key)
                    if key[0] != ALL_ARMS and (shared := runs.get((ALL_ARMS, key[1]))):
                        runs[key].take(shared)
                    running[key] = runs[key].start(environment)
                for key in [k for k, process in running.items() if process.poll() is not None]:
                    code = running.pop(key).returncode
                    if code != 0:
                        raise runs[key].failure(code)
                done = total - len(waiting) - len(running)
                bar.set_postfix_str(", ".join(f"{arm} {seed}" for arm, seed in running), False)
                bar.update(done + sum(runs[key].fraction for key in running) - bar.n)
                if running:
                    _wait(running)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()


def _unfinished(runs: Mapping[Key, Run]) -> list[Key]:
    """What is left to do; shared stages only where an arm of the seed lacks them."""
    waiting = [key for key, run in runs.items() if not run.done]
    lacking = {
        seed
        for arm, seed in waiting
        if arm != ALL_ARMS and (shared := runs.get((ALL_ARMS, seed)))
        and not runs[arm, seed].stages[len(shared.stages) - 1].path.exists()
    }  # fmt: skip
    return [key for key in waiting if key[0] != ALL_ARMS or key[1] in lacking]


def _next(waiting: list[Key], running: Mapping[Key, object]) -> Key | None:
    """The first run that need not wait for the stages that it shares."""
    for arm, seed in waiting:
        shared = (ALL_ARMS, seed)
        if arm == ALL_ARMS or (shared not in waiting and shared not in running):
            return arm, seed
    return None


def _wait(running: Mapping[Key, subprocess.Popen[bytes]]) -> None:
    """Until a run ends, but at most a second, so that the bar moves."""
    deadline = time.monotonic() + 1.0
    for process in running.values():
        try:
            process.wait(max(deadline - time.monotonic(), 0.01))
            return
        except subprocess.TimeoutExpired:
            continue


def _epochs_done(run: RunFolder) -> float:
    """How much of a stage is done, from the epochs in its metrics.csv."""
    metrics = run.path / "metrics.csv"
    if not metrics.exists() or not run.config.exists():
        return 0.0
    with metrics.open("rb") as file:
        file.seek(max(metrics.stat().st_size - 4096, 0))
        lines = file.read().decode(errors="replace").strip().splitlines()
    trainer = read_config(run.config).get("trainer", {})
    cells = lines[-1].split(",") if lines else []
    epochs = trainer.get("max_epochs") or 0
    if len(cells) < 2 or not cells[1].isdigit() or epochs < 1:
        return 0.0
    return min(int(cells[1]) / epochs, 0.99)


def _command(recipe: catalog.Recipe, overlay: str, args: Sequence[str], folder: Path) -> list[str]:
    rest, extra = take_config_files(args, {})
    command = [sys.executable, "-m", "cohobate.core.arms", recipe.full_name]
    command += [overlay, str(folder), json.dumps(extra)]
    return [*command, *rest, "--trainer.enable_progress_bar=false"]


def _child(argv: list[str]) -> int:
    """One run, in a process of its own: recipe, overlay, folder, config, options."""
    from cohobate.core import runs

    name, overlay, folder, extra, *rest = argv
    if config := json.loads(extra):
        path = write_json(Path(folder) / "options.yaml", config)  # JSON is YAML
        rest += ["--config", str(path)]
    whole = catalog.find(name)
    recipe = whole.shared if overlay == ALL_ARMS else whole
    assert recipe is not None
    arm = Path(overlay) if overlay not in ("", ALL_ARMS) else None
    return guard(lambda: runs.fit(recipe, rest, arm=arm, out=Path(folder)), "cohobate compare")


if __name__ == "__main__":
    raise SystemExit(_child(sys.argv[1:]))
