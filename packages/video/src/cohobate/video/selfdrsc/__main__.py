"""``python -m cohobate.video.selfdrsc``: released weights as a run folder, and back."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from jsonargparse import CLI

from cohobate.core.errors import InputError, guard
from cohobate.core.io import save_atomic
from cohobate.core.runs import RunFolder, load_run
from cohobate.video.selfdrsc.checkpoint import load_official, save_official
from cohobate.video.selfdrsc.network import CorrectionNet


def take(file: Path, out: Path = Path("runs/selfdrsc-official")) -> None:
    """Make a run folder of released weights, for predict, validate and export.

    Args:
        file: The released ``.pth`` file.
        out: The run folder.
    """
    network = CorrectionNet()
    load_official(network, file)
    run = RunFolder(out)
    if run.config.exists():
        raise InputError(f"{out}: there is a run already")
    options = {"network": "paper", "bgr": True, "perceptual": 0.0, "border": 20}
    model = {"class_path": "cohobate.video.selfdrsc.SelfDRSC", "init_args": options}
    data = {"class_path": "cohobate.video.data.DualShutterData", "init_args": {}}
    with save_atomic(run.best) as temporary:
        state = {f"network.{name}": value for name, value in network.state_dict().items()}
        torch.save({"state_dict": state}, temporary)
    with save_atomic(run.config) as temporary:
        temporary.write_text(yaml.safe_dump({"model": model, "data": data}, sort_keys=False))
    print(f"{out}: {sum(p.numel() for p in network.parameters()):,} parameters")


def give(run: Path, file: Path) -> None:
    """Write a run's network under the released names.

    Args:
        run: A run folder, or a checkpoint in one.
        file: The file to write.
    """
    network = load_run(run).student
    assert isinstance(network, CorrectionNet)
    save_official(network, file)
    print(file)


if __name__ == "__main__":
    raise SystemExit(guard(lambda: CLI([take, give]), "python -m cohobate.video.selfdrsc"))
