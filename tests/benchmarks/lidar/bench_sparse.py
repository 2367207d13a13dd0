"""What the sparse engine costs: a U-Net beside spconv's CPU build, and how it grows with voxels.

    python tests/benchmarks/lidar/bench_sparse.py [--out docs/results/bench-sparse.json]

Kernel maps, forward and backward are measured together, both libraries in turn in one process and
with the same weights; seconds are those the process got, the median of the repetitions. The clouds
are SYNTHETIC full-density sweeps. The growth is also drawn beside the JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from cohobate.core.testing.bench import in_turn, medians, write_rows
from cohobate.lidar.data import Simulator
from cohobate.lidar.data.files import read_sweep
from cohobate.lidar.data.simulator import write_frame
from cohobate.lidar.data.voxels import Voxels, voxelize
from cohobate.lidar.nets import ResUNet

ROOT = Path(__file__).parents[3]
SIZES: dict[str, tuple[int, tuple[int, int], tuple[int, int]]] = {
    "16-32-64": (16, (32, 64), (32, 32)),
    "32-64-128": (32, (64, 128), (64, 64)),
}
COUNTS = (10_000, 20_000, 50_000, 100_000, 200_000)
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "gather": ("aten::index_select",),
    "scatter": ("aten::scatter_add_", "aten::index_add_"),
    "normalisation": ("aten::native_batch_norm", "aten::native_batch_norm_backward"),
    "maps": ("aten::searchsorted", "aten::sort", "aten::nonzero", "aten::_unique2", "aten::eq"),
}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-sparse.json")
    parser.add_argument("--scratch", type=Path, default=Path("runs/bench-sparse"))
    parser.add_argument("--repeat", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cloud = sweeps(asked.scratch, max(COUNTS))
    rows = [unet_row(name, cloud[:32_000], asked.repeat) for name in SIZES]
    growth = growth_seconds(cloud, asked.repeat)
    rows.append(growth_row(growth))
    draw(growth, asked.out.with_suffix(".png"))
    script = f"tests/benchmarks/lidar/bench_sparse.py --repeat {asked.repeat}"
    write_rows(asked.out, script, ("torch", "spconv", "cohobate-lidar"), rows)
    print(*rows, sep="\n")


def sweeps(folder: Path, count: int) -> Tensor:
    """Coordinates (N, 4) of at least so many voxels, one sweep after another."""
    found: list[Tensor] = []
    sim = Simulator(azimuths=1080, height=8, width=8)
    while sum(map(len, found)) < count:
        seed = len(found)
        path = folder / f"samples/LIDAR_TOP/sim-{seed:04d}__LIDAR_TOP.pcd.bin"
        if not path.exists():
            write_frame(sim, folder, seed)
        coordinates = torch.from_numpy(voxelize(read_sweep(path), Voxels()).coordinates)
        found.append(torch.nn.functional.pad(coordinates, (1, 0), value=seed))
    return torch.cat(found)


def unet_row(name: str, coordinates: Tensor, repeat: int) -> dict[str, Any]:
    """Both libraries on one cloud."""
    from spconv_unet import SpconvUNet

    stem, encoder, decoder = SIZES[name]
    torch.manual_seed(0)
    ours = ResUNet(1, 64, stem, encoder, (1, 1), decoder, (1, 1))
    theirs = SpconvUNet(stem, encoder, decoder)
    theirs.take(ours)
    features = torch.randn(len(coordinates), 1)
    runs = {n: step(net, coordinates, features) for n, net in (("ours", ours), ("s", theirs))}
    outputs = [run() for run in runs.values()]
    gap = float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
    assert gap < 1e-3, gap
    seconds = medians(in_turn(runs, repeat, f"U-Net {name}"))
    return {
        "what": f"U-Net {name}, {len(coordinates):,} voxels: maps, forward, backward",
        "seconds": f"ours {seconds['ours']:.3f}, spconv {seconds['s']:.3f}",
        "ratio": round(seconds["ours"] / seconds["s"], 3),
        "note": f"outputs within {gap:.0e}; of our time {profile(runs['ours'])}",
    }


def growth_seconds(cloud: Tensor, repeat: int) -> dict[int, float]:
    """Seconds by number of voxels, widths 16-32-64."""
    torch.manual_seed(0)
    stem, encoder, decoder = SIZES["16-32-64"]
    network = ResUNet(1, 64, stem, encoder, (1, 1), decoder, (1, 1))
    runs = {str(n): step(network, cloud[:n], torch.randn(n, 1)) for n in COUNTS}
    return {int(n): value for n, value in medians(in_turn(runs, repeat, "growth")).items()}


def growth_row(seconds: dict[int, float]) -> dict[str, Any]:
    """Seconds for each count, and the exponent of a power law through them."""
    exponent = float(np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0])
    each = [1e6 * value / n for n, value in seconds.items()]
    return {
        "what": f"U-Net 16-32-64, {min(COUNTS):,} to {max(COUNTS):,} voxels",
        "seconds": ", ".join(f"{n // 1000}k {value:.3f}" for n, value in seconds.items()),
        "ratio": round(max(each) / min(each), 3),
        "note": f"the ratio is that of the seconds a voxel; seconds grow as voxels^{exponent:.2f}",
    }


def draw(seconds: dict[int, float], path: Path) -> None:
    """Seconds against voxels, with the line through the largest cloud."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    counts = np.array(list(seconds))
    most = counts.max()
    axes.plot(counts, counts * seconds[int(most)] / most, "--", color="0.6", label="in proportion")
    axes.plot(counts, list(seconds.values()), "o-", label="maps, forward, backward")
    axes.set(xlabel="voxels", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)


def step(network: Any, coordinates: Tensor, features: Tensor) -> Callable[[], Tensor]:
    """A pass with gradients, on coordinates as they come from the data."""

    def run() -> Tensor:
        network.zero_grad()
        out: Tensor = network(coordinates, features)
        out.square().mean().backward()
        return out.detach()

    return run


def profile(run: Callable[[], Tensor]) -> str:
    """Shares of the time by kind of work."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        run()
    own = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    total = sum(own.values())
    shares = {part: sum(own.get(k, 0) for k in keys) / total for part, keys in PARTS.items()}
    return ", ".join(f"{part} {share:.0%}" for part, share in shares.items())


if __name__ == "__main__":
    main()
