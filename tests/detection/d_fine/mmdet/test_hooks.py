"""The second stage of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")
pytest.importorskip("cohobate.detection.d_fine.mmdet")

from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper

from cohobate.core.errors import InputError
from cohobate.detection.d_fine.mmdet import EMARestartHook

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., tuple[Any, EMARestartHook]]:
    def make() -> tuple[Any, EMARestartHook]:
        model, average = nn.Linear(2, 1), EMAHook(ema_type="mmdet.ExpMomentumEMA", gamma=1000)
        hook = EMARestartHook(stop_epoch=2, decay=0.99, metric="ap")
        optimizer = torch.optim.AdamW(model.parameters())
        runner = SimpleNamespace(
            model=model, hooks=[average, hook], epoch=0, work_dir=str(tmp_path), _resume=False,
            optim_wrapper=OptimWrapper(optimizer),
        )  # fmt: skip
        average.before_run(runner)
        hook.before_run(runner)
        return runner, hook

    return make


def epoch(runner: Any, hook: EMARestartHook, ap: float) -> float:
    """Train one epoch; the weight that training began with."""
    hook.before_train_epoch(runner)
    began = runner.model.weight[0, 0].item()
    runner.model(torch.ones(1, 2)).sum().backward()
    runner.optim_wrapper.optimizer.step()
    runner.optim_wrapper.zero_grad()
    runner.hooks[0].ema_model.update_parameters(runner.model)
    runner.epoch += 1
    hook.after_val_epoch(runner, {"ap": ap})
    return began


def test_the_second_stage_begins_with_the_best_of_the_first(stage: Any) -> None:
    runner, hook = stage()
    average = runner.hooks[0].ema_model
    epoch(runner, hook, 0.5)
    best, averaged = runner.model.weight[0, 0].item(), average.module.weight.clone()
    steps = int(average.steps)
    assert epoch(runner, hook, 0.4) == best  # the second epoch is worse
    assert runner.model.weight[0, 0].item() != best
    assert epoch(runner, hook, 0.6) == best
    assert average.momentum == pytest.approx(0.01)
    assert int(average.steps) == steps + 1
    assert not torch.equal(average.module.weight, averaged)
    better = runner.model.weight[0, 0].item()
    assert epoch(runner, hook, 0.55) == better  # an improvement goes on, then nothing better
    assert epoch(runner, hook, 0.3) == best
    assert hook.decay == pytest.approx(0.9899)
    assert average.momentum == pytest.approx(0.0101)
    entry = runner.optim_wrapper.state_dict()["state"][0]
    assert int(entry["step"]) == 2  # the optimiser's state came back too


def test_a_resumed_run_goes_on_with_its_decay(stage: Any) -> None:
    runner, hook = stage()
    for ap in (0.5, 0.4, 0.6, 0.5, 0.4):
        epoch(runner, hook, ap)
    saved: dict[str, Any] = {}
    hook.before_save_checkpoint(runner, saved)
    other, again = stage()
    other.epoch, other._resume = runner.epoch, True
    again.after_load_checkpoint(other, saved)
    assert (again.decay, again.best, again._stale) == (hook.decay, hook.best, hook._stale)
    assert other.hooks[0].ema_model.momentum == pytest.approx(1 - hook.decay)


def test_what_is_missing_is_named(stage: Any) -> None:
    runner, hook = stage()
    with pytest.raises(InputError, match="gives no 'ap', only loss"):
        hook.after_val_epoch(runner, {"loss": 1.0})
    runner.hooks = []
    with pytest.raises(InputError, match="EMAHook"):
        hook.before_run(runner)
