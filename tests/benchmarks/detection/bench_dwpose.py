"""What DWPose's stages cost: a step of each, and the second stage's share of the training.

    python tests/benchmarks/detection/bench_dwpose.py

All sides run in one process in turn on the same crops, with one thread, and the seconds are those
of the process, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from cohobate.detection.dwpose import WHOLEBODY, DWPose, RTMPose
from cohobate.detection.dwpose.data import Batch

ROOT = Path(__file__).parents[3]
SIZE = (192, 256)
FIRST, SECOND = 270, 60  # epochs of the two stages in the released settings
Row = dict[str, object]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-dwpose.json")
    parser.add_argument("--student", default="t")
    parser.add_argument("--teacher", default="s")
    parser.add_argument("--people", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = crops(asked.people)
    options = {"variant": asked.student, "teacher_variant": asked.teacher, "ema": None}
    alone, first, second = (
        stepper(stage, batch, options, asked.teacher) for stage in ("plain", "distil", "head")
    )
    times = alternate(asked.repeat, alone, first, second)
    pair = f"{asked.teacher} → {asked.student}, {asked.people} people of 256 × 192"
    spent = [[FIRST * t for t in times[1]], [SECOND * t for t in times[2]]]
    share = statistics.median(b / (a + b) for a, b in zip(*spent, strict=True))
    rows = [
        row(f"step of stage 1, {pair}", times[1], times[0], "student alone"),
        row(f"step of stage 2, {asked.student}", times[2], times[1], "step of stage 1"),
        row(
            f"stage 2, {SECOND} epochs of one step: {100 * share:.0f} % of both stages",
            spent[1], spent[0], f"stage 1, {FIRST} epochs of one step",
        ),
        inference_row(asked.student, asked.repeat),
    ]  # fmt: skip
    content = {
        "command": "python tests/benchmarks/detection/bench_dwpose.py",
        "machine": f"{platform.machine()}, 1 thread, process seconds",
        "versions": {n: version(n) for n in ("torch", "cohobate-detection")},
        "rows": rows,
    }
    asked.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


def crops(people: int) -> Batch:
    """Noise with points anywhere."""
    return Batch(
        torch.randn(people, 3, SIZE[1], SIZE[0]), torch.rand(people, 133, 2) * 190,
        torch.ones(people, 133), torch.arange(people), torch.ones(people, 4),
    )  # fmt: skip


def stepper(
    stage: str, batch: Batch, options: dict[str, object], teacher: str
) -> Callable[[], None]:
    """A training step with the optimiser's."""
    module = DWPose(keypoints=WHOLEBODY, size=SIZE, stage=stage, **options)  # type: ignore[arg-type]
    if stage != "plain":
        source = teacher if stage == "distil" else str(options["variant"])
        weights = RTMPose(source, 133, SIZE).state_dict()  # type: ignore[arg-type]
        module._teach(weights, Path("random weights"))
    module.train()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)

    def step() -> None:
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def inference_row(variant: str, repeat: int) -> Row:
    """The student of a distilled run, and a network that was never distilled."""
    module = DWPose(
        keypoints=WHOLEBODY,
        size=SIZE,
        stage="distil",
        variant=variant,
        teacher_variant="l",  # type: ignore[arg-type]
    )
    plain, image = RTMPose(variant, 133, SIZE).eval(), torch.randn(1, 3, SIZE[1], SIZE[0])  # type: ignore[arg-type]
    student = module.student.eval()

    @torch.no_grad()
    def run(network: nn.Module) -> Tensor:
        return network(image).x

    times = alternate(3 * repeat, lambda: run(student), lambda: run(plain))
    return row(f"inference, {variant}, one person", *times, "the network alone")


def alternate(repeat: int, *actions: Callable[[], object]) -> list[list[float]]:
    """Process seconds of each action, taken in turn after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in actions]
    for turn in range(repeat + 1):
        for action, found in zip(actions, seconds, strict=True):
            start = time.process_time()
            action()
            if turn:
                found.append(time.process_time() - start)
    return seconds


def row(what: str, ours: list[float], other: list[float], name: str) -> Row:
    """One line of the table: the ratio is the median of the ratios of each turn."""
    ratios = [b / a for a, b in zip(ours, other, strict=True)]
    return {
        "what": what,
        "here (s)": round(statistics.median(ours), 4),
        "against": name,
        "that (s)": round(statistics.median(other), 4),
        "times faster, median (least to most)": f"{statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
    }


if __name__ == "__main__":
    main()
