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


def stage(name: str, steps: int, seconds: float | None, added: int = 0, **more: object) -> dict:
    return {
        "stage": name,
        "steps": steps,
        "step_seconds": seconds,
        "peak_memory_bytes": 1000,
        "parameters": {"student": 100, "added": added},
        "test": {"test/dice": 0.5},
        **more,
    }


def comparison(baseline: list[float], distilled: list[float]) -> Comparison:
    def run(value: float, seconds: float, added: int) -> list[dict]:
        results = {"test/dice": value, "test/hd95": 10 * value}
        return [stage("fit", 9, seconds, added, test=results)]

    runs = {
        "baseline": {seed: run(v, 1.0, 0) for seed, v in enumerate(baseline)},
        "distilled": {seed: run(v, 1.2, 1) for seed, v in enumerate(distilled)},
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
    assert "Cost of distilled over baseline: step time × 1.2, peak memory × 1, 1 more" in text
    assert "1 more parameters in training (1 %)" in text


def costs(own: list[dict], base: list[dict], **about: object) -> tuple[dict, str]:
    """Cost of the recipe and how it is told; a second seed takes twice the time in both arms."""

    def seeds(run: list[dict]) -> dict[int, list[dict]]:
        slow = [{**s, "step_seconds": s["step_seconds"] and 2 * s["step_seconds"]} for s in run]
        return {0: run, 1: slow}

    told = {"recipe": "toy/x", "seeds": [0, 1], "steps": 9, "data": "none", **about}
    result = Comparison(told, [DICE], {"baseline": seeds(base), "distilled": seeds(own)}).as_json()
    (line,) = (line for line in markdown(result).splitlines() if line.startswith("Cost"))
    assert "?" not in line
    return result["arms"]["distilled"]["cost"], line


def test_all_stages_cost_and_the_last_that_both_train_is_compared() -> None:
    teacher, mean = stage("teacher", 100, 0.5, peak_memory_bytes=4000), stage("distil", 10, 1.0)
    cost, line = costs(
        [teacher, stage("distil", 10, 3.0, added=7), stage("head", 5, 0.4)],
        [mean, stage("head", 0, None)],
        shared_stages=["teacher"],
    )
    assert cost["training_time_ratio"] == pytest.approx((100 * 0.5 + 10 * 3 + 5 * 0.4) / 10)
    assert (cost["step_time_stage"], cost["step_time_ratio"]) == ("distil", 3.0)
    assert cost["peak_memory_ratio"] == 4.0
    assert (cost["added_parameters"], cost["added_parameters_share"]) == (7, 0.07)
    told = "training time × 8.2 (teacher, distil, head against distil; shared: teacher)"
    assert f"{told}, step time of distil × 3, peak memory × 4, 7 more" in line


def test_a_shared_stage_has_no_step_time_to_compare() -> None:
    shared = stage("teacher", 100, 0.5)
    cost, line = costs(
        [shared, stage("distil", 10, 1.0)],
        [shared, stage("distil", 0, 0.1)],  # timed, but nothing was trained
        shared_stages=["teacher"],
    )
    assert cost["step_time_ratio"] is None
    told = "training time × 1.2 (teacher, distil against teacher; shared: teacher), peak memory × 1"
    assert f"baseline: {told}, 0 more" in line


def test_one_stage_of_more_steps_takes_more_time() -> None:
    cost, line = costs([stage("fit", 30, 1.2)], [stage("fit", 10, 1.0)])
    assert cost["training_time_ratio"] == pytest.approx(3.6)
    assert "training time × 3.6, step time × 1.2, peak memory × 1" in line


def test_what_is_not_known_is_left_out() -> None:
    unknown = {"step_seconds": None, "peak_memory_bytes": None}
    cost, line = costs([stage("fit", 2, None) | unknown], [stage("fit", 2, 1.0)])
    assert cost["training_time_ratio"] is cost["step_time_ratio"] is None
    assert "baseline: 0 more parameters" in line


def test_cpu_time_counts_where_every_stage_has_it() -> None:
    own, base = ([stage("fit", 9, wall, step_cpu_seconds=cpu)] for wall, cpu in ((9, 2.0), (1, 1)))
    runs = {"baseline": {0: base}, "distilled": {0: own}}
    found = Comparison({"seeds": [0]}, [DICE], runs).as_json()
    assert found["step_clock"] == "cpu"
    assert found["arms"]["distilled"]["cost"]["step_time_ratio"] == 2
    base[0]["step_cpu_seconds"] = None  # as on a GPU
    found = Comparison({"seeds": [0]}, [DICE], runs).as_json()
    assert found["step_clock"] == "wall"
    assert found["arms"]["distilled"]["cost"]["step_time_ratio"] == 9


def test_a_result_of_before_all_stages_counted_is_told() -> None:
    result = comparison([0.2, 0.3], [0.1, 0.2]).as_json()
    del result["step_clock"]
    kept = ("step_time_ratio", "peak_memory_ratio", "added_parameters", "added_parameters_share")
    for arm in result["arms"].values():
        arm["cost"] = {key: arm["cost"][key] for key in kept}
    assert "baseline: step time × 1.2, peak memory × 1, 1 more" in markdown(result)
    result["arms"]["distilled"]["cost"]["step_time_ratio"] = None
    assert "baseline: peak memory × 1, 1 more" in markdown(result)


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
    assert info["steps"] == result["steps"] == 8
    assert info["step_seconds"] > 0
    assert info["step_cpu_seconds"] > 0
    assert result["step_clock"] == "cpu"
    assert result["arms"]["distilled"]["cost"]["step_time_stage"] == "fit"
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
    done = run_command(
        "compare", "toy/staged", "--seeds=1", "--arms", "baseline", "alone", "--out=c"
    )
    assert done.code == 0
    assert "Cost of alone over baseline: training time × " in done.out
    result = json.loads(Path("c/compare.json").read_text())
    assert (result["steps"], result["shared_stages"]) == (8, ["warm"])
    trained = {arm: found["cost"]["stages"] for arm, found in result["arms"].items()}
    both = ["warm", "distil"]
    assert trained == {"baseline": both, "alone": ["distil"], "distilled": both}
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
