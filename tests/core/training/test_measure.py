from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cohobate.core.training import measure


def timer(monkeypatch: pytest.MonkeyPatch, steps: list[tuple[float, float]]) -> measure.StepTimer:
    """After steps of so many seconds, by the wall clock and of CPU time."""
    clocks = {"perf_counter": 100.0, "process_time": 7.0}
    fake = {name: lambda name=name: clocks[name] for name in clocks}
    monkeypatch.setattr(measure, "time", SimpleNamespace(**fake))
    found, module = measure.StepTimer(), SimpleNamespace(device=torch.device("cpu"))
    for n, (wall, cpu) in enumerate(steps):
        found.on_train_batch_start(None, module, None, n)
        clocks["perf_counter"] += wall
        clocks["process_time"] += cpu
        found.on_train_batch_end(None, module, None, None, n)
        clocks["perf_counter"] += 50.0  # data is waited for
        clocks["process_time"] += 20.0
    return found


def test_the_median_step_by_both_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [(90.0, 80.0)] * 3
    found = timer(monkeypatch, [*first, (1.0, 4.0), (30.0, 5.0), (2.0, 9.0)])
    assert found.step_seconds == pytest.approx(2.0)
    assert found.step_cpu_seconds == pytest.approx(5.0)


def test_too_few_steps_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timer(monkeypatch, [(1.0, 1.0)] * 3)
    assert found.step_seconds is None
    assert found.step_cpu_seconds is None
