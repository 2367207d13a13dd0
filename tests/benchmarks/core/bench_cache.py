"""Size of a teacher cache, and how fast it is written and read.

    python tests/benchmarks/core/bench_cache.py [--out docs/results/bench-cache.json]

Two caches: the 64 top classes of 100,000 answers over 32,000 classes, and dense maps of 8 classes
over 96³ voxels in float16. The teachers are formulas, so that their answers can be asked again and
what is read is compared bit by bit. Random reads come from a DataLoader with four workers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cohobate.core.cache import TeacherCache, write_cache
from cohobate.core.fused import TopK
from cohobate.core.testing.bench import write_rows

ROOT = Path(__file__).parents[3]
CLASSES = 32000


class Numbers:
    """Samples that are their own index."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if index >= self.size:
            raise IndexError(index)
        return int(index)

    def sample_key(self, index: int) -> tuple[str, str]:
        return str(int(index)), ""


WAVE = torch.randn(2 * CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def wide(batch: Tensor) -> Tensor:
    """Logits (B, 32000): a window of one noise, sharper or flatter."""
    starts = batch * 7919 % CLASSES
    rows = torch.stack([WAVE[i : i + CLASSES] for i in starts.tolist()])
    return rows * (0.5 + batch[:, None] % 5 * 0.25)


def voxels(batch: Tensor) -> Tensor:
    """Logits (B, 8, 96, 96, 96)."""
    line = torch.linspace(0, 6, 96**3).view(96, 96, 96)
    return torch.stack(
        [torch.stack([torch.sin(line * (i % 7 + c)) for c in range(8)]) for i in batch.tolist()]
    )


def cases(small: bool) -> dict[str, dict[str, Any]]:
    """Options of the two caches."""
    return {
        "top 64 of 32000 classes, float16": {
            "dataset": Numbers(2000 if small else 100_000), "ask": wide, "batch_size": 32,
            "logits": CLASSES, "checked": 100_000,
        },
        "dense, 8 x 96 x 96 x 96, float16": {
            "dataset": Numbers(8 if small else 32), "ask": voxels, "form": "dense", "batch_size": 1,
            "logits": 8 * 96**3, "checked": 2,
        },
    }  # fmt: skip


def write(folder: Path, options: dict[str, Any]) -> tuple[TeacherCache, float]:
    """Write a cache; also the seconds it took."""
    began = time.perf_counter()
    options = {name: options[name] for name in options if name not in ("logits", "checked")}
    cache = write_cache(folder, teacher="formula", transform="none", **options)
    assert cache is not None
    return cache, time.perf_counter() - began


def check(cache: TeacherCache, options: dict[str, Any]) -> int:
    """Ask the teacher again, in another order, and compare every bit; the number compared."""
    count = min(len(cache), options["checked"])
    picks = torch.randperm(len(cache), generator=torch.Generator().manual_seed(1))[:count]
    for batch in picks.split(options["batch_size"]):
        again = cache.spec.decode(*cache.spec.encode(options["ask"](batch)))
        read = cache.read([str(int(i)) for i in batch])
        pairs = zip(again, read, strict=True) if isinstance(read, TopK) else [(again, read)]
        assert all(torch.equal(a, b) for a, b in pairs)
    return count


def read_rate(cache: TeacherCache, batch_size: int, workers: int, passes: int) -> float:
    """MB of records a second, in random order, after the workers have started."""
    order = torch.cat(
        [
            torch.randperm(len(cache), generator=torch.Generator().manual_seed(i))
            for i in range(passes)
        ]
    )
    batches = [batch.tolist() for batch in order.split(batch_size)]
    loader = DataLoader(
        cache, batch_sampler=batches, num_workers=workers, collate_fn=lambda batch: batch
    )
    size = sum(file.stat().st_size for file in cache.path.glob("*.safetensors")) / len(cache)
    stream = iter(loader)
    next(stream)
    began = time.perf_counter()
    count = sum(len(batch[0] if isinstance(batch, TopK) else batch) for batch in stream)
    return count * size / 1e6 / (time.perf_counter() - began)


def measure(name: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One row."""
    cache, written = write(folder, options)
    checked = check(cache, options)
    began = time.perf_counter()
    cache.verify()
    verified = time.perf_counter() - began
    total = sum(file.stat().st_size for file in folder.iterdir())
    dense = cache.spec.form == "dense"
    speeds = [
        f"{read_rate(cache, size, 4, 2 if dense else 10):.0f} in batches of {size}"
        for size in ([1] if dense else [256, 2048])
    ]
    return {
        "cache": name,
        "samples": len(cache),
        "MB": round(total / 1e6, 1),
        "bytes a sample": round(total / len(cache)),
        "share of float32 logits": f"{total / len(cache) / (4 * options['logits']):.2%}",
        "written, samples/s": round(len(cache) / written),
        "verified, MB/s": round(total / 1e6 / verified),
        "random reads, 4 workers, MB/s": ", ".join(speeds),
        "read again bit by bit": "all" if checked == len(cache) else checked,
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-cache.json")
    parser.add_argument("--small", action="store_true", help="try the script on little data")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, options in cases(asked.small).items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, options, Path(folder)))
    packages = ("torch", "cohobate-core")
    script = "tests/benchmarks/core/bench_cache.py"
    conditions = "1 thread a process, files in the page cache"
    write_rows(asked.out, script, packages, rows, conditions)
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
