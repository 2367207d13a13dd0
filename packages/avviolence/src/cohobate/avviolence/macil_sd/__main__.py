"""``python -m cohobate.avviolence.macil_sd``: the released checkpoint as a run folder, and back."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import CLI

from cohobate.avviolence.macil_sd.checkpoint import (
    OFFICIAL_EXTRACTORS,
    count_parameters,
    load_official,
    save_official,
)
from cohobate.avviolence.macil_sd.network import AudioVisualNet
from cohobate.core.errors import InputError, guard
from cohobate.core.runs import load_run, make_run


def take(file: Path, out: Path = Path("runs/macil-sd-official")) -> None:
    """Make a run folder of a checkpoint in the released layout, for predict, validate and export.

    Args:
        file: The released macil_sd.pkl, or one written by `give`.
        out: The run folder.
    """
    network = load_official(file)
    layer = network.layer
    sizes = {
        "visual_width": network.fc_v.in_features,
        "audio_width": network.fc_a.in_features,
        "visual_extractor": OFFICIAL_EXTRACTORS["visual"],
        "audio_extractor": OFFICIAL_EXTRACTORS["audio"],
        "hidden": network.fc_v.out_features,
        "heads": layer.heads,
        "ffn": layer.w_1.out_features,
        "distill": False,
    }
    model = {"class_path": "cohobate.avviolence.macil_sd.MACILSD", "init_args": sizes}
    data = {"class_path": "cohobate.avviolence.data.BagData", "init_args": {}}
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    make_run(out, weights, model, data)
    counts = count_parameters(network)
    print(f"{out}: {counts['official']:,} parameters officially, {counts['live']:,} live")


def give(run: Path, file: Path) -> None:
    """Write a run's network in the released layout.

    Args:
        run: A run folder, or a checkpoint in one.
        file: The file to write.
    """
    network = load_run(run).student
    if not isinstance(network, AudioVisualNet):
        raise InputError(f"{run}: trained {type(network).__name__}, which the layout cannot hold")
    save_official(network, file)
    print(file)


if __name__ == "__main__":
    raise SystemExit(guard(lambda: CLI([take, give]), "python -m cohobate.avviolence.macil_sd"))
