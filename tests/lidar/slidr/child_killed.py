"""Run a command in which pre-training kills its own process: python child_killed.py STEP WORD..."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from cohobate.core.cli import main
from cohobate.lidar.slidr import Pretrain


def _dying(step: int) -> None:
    whole = Pretrain.training_step

    def training_step(model: Pretrain, batch: Any, batch_idx: int) -> Any:
        if model.trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(model, batch, batch_idx)

    Pretrain.training_step = training_step  # type: ignore[method-assign]


if __name__ == "__main__":
    _dying(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
