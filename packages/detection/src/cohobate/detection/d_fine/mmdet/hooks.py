"""The second stage of D-FINE's training for mmengine's runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic


@HOOKS.register_module()
class EMARestartHook(Hook):
    """At ``stop_epoch`` training goes on from the best epoch so far, with another EMA decay.

    After it, every validation that brings nothing better takes the best of the first stage up again
    and lowers the decay. mmdet's ``PipelineSwitchHook`` at the same epoch ends the augmentation.
    An ``EMAHook`` is needed; D-FINE's warm-up is ``ExpMomentumEMA`` with ``gamma=1000``.

    Args:
        stop_epoch: First epoch of the second stage.
        decay: EMA decay from then on, 1 - momentum.
        metric: What the best epoch is chosen by; higher is better.
        step: What each fruitless validation takes off the decay.

    References:
        arXiv 2410.13842, appendix A.1; the order of the steps follows the official code.
    """

    priority = "LOW"  # an EMAHook has given the weights in training back by then

    def __init__(
        self,
        stop_epoch: int,
        decay: float = 0.9999,
        metric: str = "coco/bbox_mAP",
        step: float = 1e-4,
    ) -> None:
        self.stop_epoch, self.metric, self.step = stop_epoch, metric, step
        self.decay, self.best = decay, -1.0
        self._stale = False

    def before_run(self, runner: Any) -> None:
        """Find the moving average.

        Raises:
            InputError: There is none.
        """
        found = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        if not found:
            raise InputError("EMARestartHook: custom_hooks has no EMAHook to restart")
        self._ema = found[0]

    def before_train_epoch(self, runner: Any) -> None:
        """Begin the second stage, or the first stage's best anew."""
        if runner.epoch == self.stop_epoch or self._stale:
            if self._stale:
                self._stale, self.best, self.decay = False, -1.0, self.decay - self.step
            self._take_up(runner)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Judge the epoch that has just ended.

        Raises:
            InputError: The evaluation does not give the metric.
        """
        if metrics is None or self.metric not in metrics:
            given = ", ".join(metrics or ()) or "none"
            raise InputError(f"EMARestartHook: validation gives no {self.metric!r}, only {given}")
        better = metrics[self.metric] > self.best
        if better:
            self.best = metrics[self.metric]
        if runner.epoch > self.stop_epoch:
            self._stale = not better
        elif better:
            self._keep(runner)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """What has been seen so far goes with the weights."""
        checkpoint["ema_restart"] = [self.decay, self.best, self._stale]

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Go on where a run was stopped."""
        if runner._resume and "ema_restart" in checkpoint:
            self.decay, self.best, self._stale = checkpoint["ema_restart"]
            if runner.epoch > self.stop_epoch:
                self._ema.ema_model.momentum = 1 - self.decay

    def _file(self, runner: Any) -> Path:
        return Path(runner.work_dir) / "first_stage.pth"

    def _keep(self, runner: Any) -> None:
        if is_main_process():
            state = {
                "model": _network(runner).state_dict(),
                "ema": self._ema.ema_model.state_dict(),
                "optimizer": runner.optim_wrapper.state_dict(),
            }
            with save_atomic(self._file(runner)) as temporary:
                torch.save(state, temporary)

    def _take_up(self, runner: Any) -> None:
        self._ema.ema_model.momentum = 1 - self.decay
        barrier()
        if self._file(runner).exists():
            state = torch.load(self._file(runner), map_location="cpu", weights_only=True)
            _network(runner).load_state_dict(state["model"])
            self._ema.ema_model.load_state_dict(state["ema"])
            runner.optim_wrapper.load_state_dict(state["optimizer"])


def _network(runner: Any) -> Any:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
