"""``python -m cohobate.video.selfdrsc``: released weights as a run folder, and back."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import CLI

from cohobate.core.errors import guard
from cohobate.core.runs import load_run, make_run
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
    options = {"network": "paper", "bgr": True, "perceptual": 0.0, "border": 20}
    model = {"class_path": "cohobate.video.selfdrsc.SelfDRSC", "init_args": options}
    data = {"class_path": "cohobate.video.data.DualShutterData", "init_args": {}}
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    make_run(out, weights, model, data)
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
