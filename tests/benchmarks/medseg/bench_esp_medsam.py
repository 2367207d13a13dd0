"""What ESP-MedSAM costs: the student at 1024², against the official code where it is at hand.

    python tests/benchmarks/medseg/bench_esp_medsam.py [--official DIR]

The official repository (xq141839/ESP-MedSAM) is not part of this project; without it the rows that
need it are left out. Both networks have the same weights, run in one process in turn, and the
seconds are those of the process, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cohobate.core.testing.bench import in_turn, medians, write_rows
from cohobate.medseg.esp_medsam import MODALITIES, Network, save_official
from cohobate.medseg.esp_medsam.official import official_network

ROOT = Path(__file__).parents[3]
MODALITY = "ultrasound"


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", type=Path, default=os.environ.get("OFFICIAL_ESP_MEDSAM"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-esp-medsam.json")
    parser.add_argument("--size", type=int, default=1024, help="side of the image")
    parser.add_argument("--repeat", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = official_network(MODALITY).eval()
    rows = [forward_row(network, asked.size, asked.repeat, asked.official), size_row(network)]
    packages = ("torch", "timm", "transformers", "cohobate-medseg")
    write_rows(asked.out, "tests/benchmarks/medseg/bench_esp_medsam.py", packages, rows)
    print(*rows, sep="\n")


def forward_row(network: Network, size: int, repeat: int, folder: Path | None) -> dict[str, object]:
    """One image through the student, ours and the official code's."""
    image = torch.randn(1, 3, size, size)
    runs: dict[str, Callable[[], Tensor]] = {"ours": lambda: network(image, MODALITY).masks}
    note = "official code not at hand"
    if folder is not None:
        theirs = official(network, folder)
        query = MODALITIES.index(MODALITY)
        runs["official code"] = lambda: theirs(image, domain_seq=query)[0]
    with torch.inference_mode():
        outputs = {name: run() for name, run in runs.items()}
        seconds = medians(in_turn(runs, repeat, "one image"))
    if folder is not None:
        difference = float((outputs["ours"] - outputs["official code"]).abs().max())
        scale = float(outputs["official code"].abs().max())
        note = f"largest difference of the logits {difference:.2g}, largest logit {scale:.3g}"
    ratio = seconds["ours"] / seconds["official code"] if folder is not None else "–"
    return {
        "what": f"forward pass of one image, {size}², one modality",
        "measured": ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items()),
        "ratio": ratio,
        "note": note,
    }


def size_row(network: Network) -> dict[str, object]:
    """Parameters of the network and of a modality."""
    own = sum(p.numel() for p in network.encoder.controllers[MODALITY].parameters())
    mlp = sum(p.numel() for p in network.decoder.mlps[MODALITY].parameters())
    everything = sum(p.numel() for p in network.parameters())
    return {
        "what": "parameters, one modality",
        "measured": f"{everything:,}",
        "ratio": "–",
        "note": f"a further modality adds {own:,} in the encoder and {mlp:,} in the decoder",
    }


def official(network: Network, folder: Path) -> nn.Module:
    """The official network with our weights."""
    sys.path.insert(0, str(folder.resolve()))
    sys.modules.setdefault("cv2", types.ModuleType("cv2"))  # imported there, not used
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = importlib.import_module("model").ESPMedSAM().eval()
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "weights.pth"
        save_official(network, MODALITY, file)
        theirs.load_state_dict(torch.load(file, weights_only=True))
    return theirs


if __name__ == "__main__":
    main()
