"""What SelfDRSC costs, against the official code, and on a 10-second clip of 720 rows.

    python tests/benchmarks/video/bench_selfdrsc.py [--official DIR] [--rows network,...]

The official repository (shangwei5/SelfDRSC) is not part of this project; without it the rows that
need it are left out. Its CUDA-only parts are kept on the CPU. Both sides run in one process in turn
on the same tensors, with one thread, and the seconds are those of the process, so that other work
on the machine counts little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from cohobate.core.testing.bench import in_turn, times_faster, write_rows
from cohobate.video.data.media import Clip, clip_writer
from cohobate.video.data.module import embedded_clip
from cohobate.video.selfdrsc import CorrectionNet, frames_at, losses, preset
from cohobate.video.selfdrsc.predict import Task
from cohobate.video.timing import encoding, row_times

ROOT = Path(__file__).parents[3]
SIZE = 256
Row = dict[str, object]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", type=Path, default=os.environ.get("OFFICIAL_SELFDRSC"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-selfdrsc.json")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rows", default="network,reconstruction,step,clip")
    parser.add_argument("--frames", type=int, default=250, help="of the 720p clip")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    official = None if asked.official is None else official_parts(asked.official)
    chosen = asked.rows.split(",")
    rows = []
    if "network" in chosen:
        rows.append(network_row(official, asked.repeat))
    if "reconstruction" in chosen:
        rows.append(reconstruction_row(official, asked.repeat))
    if "step" in chosen:
        rows.append(step_row(official, asked.repeat))
    if "clip" in chosen:
        rows.append(clip_row(asked.frames))
    packages = ("torch", "cohobate-video")
    script = "tests/benchmarks/video/bench_selfdrsc.py"
    write_rows(asked.out, script, packages, rows, update=True)
    print(*rows, sep="\n")


def compared(what: str, ours: list[float], other: list[float] | None = None) -> Row:
    """One line of the table: the ratio is the median of the ratios of each turn."""
    return {
        "what": what,
        "here (s)": round(statistics.median(ours), 4),
        "official (s)": round(statistics.median(other), 4) if other else "-",
        "times faster, median (least to most)": times_faster(ours, other) if other else "-",
        "memory": "-",
    }


def network_row(official: SimpleNamespace | None, repeat: int) -> Row:
    """The paper's network, forward and backward, one pair of 256 × 256."""
    own = CorrectionNet()
    images = torch.rand(1, 2, 3, SIZE, SIZE)
    maps = encoding(row_times(SIZE), torch.tensor([0.375]))
    wide = maps.expand(-1, -1, -1, SIZE).contiguous()

    def here() -> None:
        own.zero_grad()
        own(images, maps).square().mean().backward()

    runs = {"here": here}
    if official is not None:
        theirs = official.network()
        theirs.load_state_dict(own.state_dict())
        with torch.no_grad():
            found, wanted = own(images, maps).flatten(1, 2), theirs(images, wide)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)

        def there() -> None:
            theirs.zero_grad()
            theirs(images, wide)[0].square().mean().backward()

        runs["official"] = there
    return compared(f"network, forward + backward, {SIZE}²", *in_turn(runs, repeat).values())


def reconstruction_row(official: SimpleNamespace | None, repeat: int) -> Row:
    """Both inputs made again from three frames, forward and backward."""
    frames = torch.rand(1, 3, 3, SIZE, SIZE, requires_grad=True)
    flows = (3 * torch.randn(1, 6, 2, SIZE, SIZE)).requires_grad_()
    times, target = row_times(SIZE), torch.tensor([0.375])

    def here() -> None:
        made = losses.reconstruct(frames, flows, times, target, official_warp=True)
        torch.autograd.grad(made.images.square().mean(), (frames, flows))

    runs = {"here": here}
    if official is not None:
        wanted = official_reconstruction(official, frames, flows)
        found = losses.reconstruct(frames, flows, times, target, official_warp=True).images
        # single pixels lie on the threshold of the mask
        assert (found - wanted).abs().mean() < 1e-4

        def there() -> None:
            made = official_reconstruction(official, frames, flows)
            torch.autograd.grad(made.square().mean(), (frames, flows))

        runs["official"] = there
    return compared(f"reconstruction, forward + backward, {SIZE}²", *in_turn(runs, repeat).values())


def step_row(official: SimpleNamespace | None, repeat: int) -> Row:
    """Network and reconstruction together, with given flows between the frames."""
    own = CorrectionNet()
    images, flows = torch.rand(1, 2, 3, SIZE, SIZE), 3 * torch.randn(1, 6, 2, SIZE, SIZE)
    times, target = row_times(SIZE), torch.tensor([0.375])
    maps = encoding(times, target)
    wide = maps.expand(-1, -1, -1, SIZE).contiguous()

    def here() -> None:
        own.zero_grad()
        frames = own(images, maps)
        losses.reconstruct(frames, flows, times, target).images.square().mean().backward()

    runs = {"here": here}
    if official is not None:
        theirs = official.network()

        def there() -> None:
            theirs.zero_grad()
            frames = theirs(images, wide)[0].unflatten(1, (3, 3))
            official_reconstruction(official, frames, flows).square().mean().backward()

        runs["official"] = there
    what = f"network + reconstruction, forward + backward, {SIZE}²"
    return compared(what, *in_turn(runs, repeat).values())


def official_reconstruction(official: SimpleNamespace, frames: Tensor, flows: Tensor) -> Tensor:
    """The released loop's reconstruction, called function by function."""
    warp, reverse, pair = (
        official.warp,
        official.reverse,
        {p: k for k, p in enumerate(losses.PAIRS)},
    )
    out: dict[int, Tensor] = {}

    def between(a: int, b: int, time: Tensor) -> Tensor:
        first, second = reverse("cpu", flows[:, pair[a, b]], flows[:, pair[b, a]], time)
        return (1 - time) * warp(frames[:, a], first) + time * warp(frames[:, b], second)

    for direction in range(2):
        whole, before, after, mask = (
            x.expand(1, 1, SIZE, SIZE)
            for x in losses.row_maps(
                row_times(SIZE)[:, direction : direction + 1], torch.tensor([0.375])
            )
        )
        out[direction] = between(0, 2, whole)
        halves = between(0, 1, before) * mask + between(1, 2, after) * (1 - mask)
        out[2 + direction] = halves
    return torch.stack([out[k] for k in range(4)], 1)


def clip_row(count: int) -> Row:
    """Two clips of 1280 × 720 through `predict` with the tiny network: memory over time."""
    source = embedded_clip().with_name("bigbuckbunny.mp4")
    there = list(Clip(source))
    order = [*range(len(there)), *reversed(range(len(there)))]
    network = preset("tiny").eval()
    process, used = psutil.Process(), []

    def correct(images: Tensor, times: Any) -> Tensor:
        used.append(process.memory_info().rss)
        return frames_at(network, images, times)

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        paths = [Path(folder) / f"{side}.mp4" for side in ("t2b", "b2t")]
        for path in paths:
            with clip_writer(path, 25) as writer:
                for k in range(count):
                    writer.add(np.asarray(there[order[k % len(order)]]))
        there.clear()
        start = time.process_time()
        Task(correct, [0.5], 25.0, False, Path(folder) / "out").run(paths)
        seconds = time.process_time() - start
    early = max(used[len(used) // 10 : len(used) // 5])
    late = max(used[-len(used) // 5 :])
    return {
        "what": f"predict, {count} pairs of 1280 × 720, tiny network, one frame each",
        "here (s)": round(seconds, 1),
        "official (s)": "-",
        "times faster, median (least to most)": "-",
        "memory": f"{early >> 20} MiB in the second tenth, {late >> 20} MiB in the last fifth",
    }


def official_parts(folder: Path) -> SimpleNamespace:
    """The released network and warping functions, kept on the CPU."""
    for name in ("thop", "cupy"):
        stub = ModuleType(name)
        stub.profile = stub.util = None  # type: ignore[attr-defined]
        sys.modules.setdefault(name, stub)
    correlation = ModuleType("models.correlation")
    sys.modules["models.correlation"] = correlation
    sys.path.insert(0, str(folder))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    from models import network_rsgenerator, network_srsc_rsg, warplayer

    warplayer.multi_warp.__defaults__ = ("cpu",)
    holder = SimpleNamespace(device="cpu")
    return SimpleNamespace(
        network=lambda: network_srsc_rsg.RSG(3, 32, False, None),
        reverse=network_rsgenerator.CFR_flow_t_align,
        warp=lambda x, flow: network_rsgenerator.IFEDNet.warp(holder, x, flow),
    )


if __name__ == "__main__":
    main()
