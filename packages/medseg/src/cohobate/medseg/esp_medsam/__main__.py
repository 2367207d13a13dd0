"""``python -m cohobate.medseg.esp_medsam``: released checkpoints, and one modality as ONNX."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import CLI

from cohobate.core.errors import InputError, guard
from cohobate.core.export import to_onnx
from cohobate.core.runs import load_run, make_run
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
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    make_run(out, weights, model, data)
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
