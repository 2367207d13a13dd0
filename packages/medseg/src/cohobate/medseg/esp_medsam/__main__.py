"""``python -m cohobate.medseg.esp_medsam``: released checkpoints, and one modality as ONNX."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from jsonargparse import CLI

from cohobate.core.errors import InputError, guard
from cohobate.core.export import to_onnx
from cohobate.core.io import save_atomic
from cohobate.core.runs import RunFolder, load_run
from cohobate.medseg.esp_medsam.method import ESPMedSAM
from cohobate.medseg.esp_medsam.network import Network, OneModality
from cohobate.medseg.esp_medsam.official import MODALITIES, load_official, save_official


def take(file: Path, modality: str, out: Path = Path("runs/esp-medsam-official")) -> None:
    """Make a run folder of a released checkpoint, for predict, validate and export.

    Args:
        file: The released checkpoint of one modality.
        modality: Which.
        out: The run folder.
    """
    network, _ = load_official(file, modality)
    run = RunFolder(out)
    if run.config.exists():
        raise InputError(f"{out}: there is a run already")
    options = {
        "modalities": [modality],
        "slots": list(MODALITIES),
        "image_size": 1024,
        "normalization": "official",
        "stage": "modality",
    }
    model = {"class_path": "cohobate.medseg.esp_medsam.ESPMedSAM", "init_args": options}
    data = {
        "class_path": "cohobate.medseg.esp_medsam.data.ImageData",
        "init_args": {"normalization": "official"},
    }
    with save_atomic(run.best) as temporary:
        state = {f"network.{name}": value for name, value in network.state_dict().items()}
        torch.save({"state_dict": state}, temporary)
    with save_atomic(run.config) as temporary:
        temporary.write_text(yaml.safe_dump({"model": model, "data": data}, sort_keys=False))
    print(f"{out}: {sum(p.numel() for p in network.parameters()):,} parameters")


def give(run: Path, modality: str, file: Path) -> None:
    """Write one modality of a run in the released layout.

    Args:
        run: A run folder, or a checkpoint in one.
        modality: Which.
        file: The file to write.
    """
    save_official(_network(run), modality, file)
    print(file)


def onnx(run: Path, modality: str, file: Path) -> None:
    """Write one modality of a run as ONNX: image in, mask logits out, any batch size.

    Args:
        run: A run folder, or a checkpoint in one.
        modality: Which.
        file: The file to write.
    """
    model = load_run(run)
    network = OneModality(_network(run), modality)
    print(to_onnx(network, model.example_input(), file, open_axes=model.open_axes()))


def _network(run: Path) -> Network:
    model = load_run(run)
    if not isinstance(model, ESPMedSAM):
        raise InputError(f"{run}: no run of ESP-MedSAM")
    return model.network


def main() -> int:
    """Run the command."""
    return guard(lambda: CLI([take, give, onnx]), "python -m cohobate.medseg.esp_medsam")


if __name__ == "__main__":
    raise SystemExit(main())
