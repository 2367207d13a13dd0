from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy import stats

from cohobate.core import arms
from cohobate.core.compare import Comparison, Metric, draw, interval, markdown
from cohobate.core.testing import run_command

DICE = Metric("test/dice", "Dice", "higher")
HAUSDORFF = Metric("test/hd95", "HD95", "lower")


def run(value: float, seconds: float = 1.0) -> dict:
    return {
        "test": {"test/dice": value, "test/hd95": 10 * value},
        "parameters": {"student": 100, "added": 1 if seconds > 1 else 0},
        "step_seconds": seconds,
        "peak_memory_bytes": 1000,
    }


def comparison(baseline: list[float], distilled: list[float]) -> Comparison:
    runs = {
        "baseline": {seed: run(v) for seed, v in enumerate(baseline)},
        "distilled": {seed: run(v, 1.2) for seed, v in enumerate(distilled)},
    }
    about = {"recipe": "toy/tiny", "seeds": list(range(len(baseline))), "steps": 9, "data": "none"}
    return Comparison(about, [DICE, HAUSDORFF], runs)


def test_the_interval_is_students() -> None:
    values = [0.3, 0.5, 0.9, 0.4]
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, statistics.fmean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_seed_decides_nothing() -> None:
    result = comparison([0.1], [0.9])
    assert result.difference("distilled", DICE).high == math.inf
    assert result.verdict("distilled", DICE) == "no clear difference"


def test_pairing_finds_what_the_spread_hides() -> None:
    result = comparison([0.1, 0.5, 0.9], [0.12, 0.52, 0.925])
    assert result.verdict("distilled", DICE) == "better"
    assert result.verdict("distilled", HAUSDORFF) == "worse"
    unpaired = comparison([0.1, 0.5, 0.9], [0.925, 0.12, 0.52])
    assert unpaired.verdict("distilled", DICE) == "no clear difference"


def test_the_table_prints_what_was_found() -> None:
    text = comparison([0.2, 0.3, 0.4], [0.1, 0.2, 0.31]).markdown()
    assert "| Dice ↑ | baseline | 0.3 ± 0.1 | | |" in text
    assert "| Dice ↑ | distilled | 0.2033 ± 0.11 | -0.0967 (-0.111 to -0.0823) | worse |" in text
    assert "step time × 1.2" in text
    assert "1 more parameters in training (1 %)" in text


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw(comparison([0.2, 0.3], [0.1, 0.2]).as_json(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_trains_every_arm_and_resumes(in_tmp: Path) -> None:
    words = ["compare", "toy/tiny", "--seeds=1", "--jobs=2", "--trainer.max_epochs=1", "--out=c"]
    outcome = run_command(*words, "--json=copy.json")
    assert outcome.code == 0, outcome.err
    result = json.loads(Path("copy.json").read_text())
    assert list(result["arms"]) == ["baseline", "distilled"]
    assert result["command"] == "cohobate compare toy/tiny --trainer.max_epochs=1"
    assert markdown(result) in outcome.out
    assert {p.name for p in Path("c").iterdir()} >= {"compare.json", "compare.md", "compare.png"}
    made = Path("c/baseline/seed-0/last.ckpt").stat().st_mtime_ns
    info = json.loads(Path("c/distilled/seed-0/run.json").read_text())
    assert info["steps"] == 8
    assert run_command(*words).code == 0
    assert Path("c/baseline/seed-0/last.ckpt").stat().st_mtime_ns == made


@pytest.fixture
def forked(in_child: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a comparison are forks, which need not import torch again."""

    class Fork:
        def __init__(self, command: list[str], **_: object) -> None:
            assert command[1:3] == ["-m", arms.__name__]
            self.returncode = in_child(lambda: sys.exit(arms._child(command[3:])))

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(arms, "subprocess", SimpleNamespace(Popen=Fork))


@pytest.mark.usefixtures("forked")
def test_a_run_that_stopped_between_two_stages_goes_on(in_tmp: Path) -> None:
    words = ["compare", "toy/staged", "--seeds=1", "--out=c"]
    assert run_command(*words).code == 0
    first, last = Path("c/distilled/seed-0/1-warm"), Path("c/distilled/seed-0/2-distil")
    kept = [first / "last.ckpt", Path("c/baseline/seed-0/2-distil/last.ckpt")]
    made = [path.stat().st_mtime_ns for path in kept]
    shutil.rmtree(last)
    outcome = run_command(*words)
    assert outcome.code == 0, outcome.err
    assert json.loads((last / "run.json").read_text())["status"] == "finished"
    assert [path.stat().st_mtime_ns for path in kept] == made


@pytest.mark.usefixtures("forked")
def test_a_shared_stage_is_trained_once_for_each_seed(in_tmp: Path) -> None:
    assert run_command("compare", "toy/staged", "--seeds=1", "--out=c").code == 0
    made = (Path("c/all-arms/seed-0/run.json")).read_bytes()
    for arm in ("baseline", "distilled"):
        assert Path(f"c/{arm}/seed-0/1-warm/run.json").read_bytes() == made
    assert run_command("fit", "toy/staged", "--seed_everything=0", "--out=alone").code == 0
    for name in ("1-warm", "2-distil"):
        runs = [Path(folder) / name for folder in ("c/distilled/seed-0", "alone")]
        weights = [(run / "student.safetensors").read_bytes() for run in runs]
        assert weights[0] == weights[1]
        assert (runs[0] / "metrics.csv").read_text() == (runs[1] / "metrics.csv").read_text()


def test_a_run_that_fails_says_why(in_tmp: Path) -> None:
    outcome = run_command("compare", "toy/tiny", "--seeds=1", "--data.root=missing", "--out=c")
    assert outcome.code == 2
    assert outcome.err.strip().splitlines()[-1].endswith("missing: no such folder")
