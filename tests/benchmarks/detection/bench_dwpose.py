"""What DWPose's stages cost: a step of each, and the second stage's share of the training.

    python tests/benchmarks/detection/bench_dwpose.py

All sides run in one process in turn on the same crops, with one thread, and the seconds are those
of the process, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cohobate.core.testing.bench import in_turn, medians, times_faster, write_rows
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
    stages = {s: stepper(s, batch, options, asked.teacher) for s in ("plain", "distil", "head")}
    times = in_turn(stages, asked.repeat, "steps")
    pair = f"{asked.teacher} → {asked.student}, {asked.people} people of 256 × 192"
    first, second = ([n * t for t in times[s]] for n, s in ((FIRST, "distil"), (SECOND, "head")))
    share = statistics.median(b / (a + b) for a, b in zip(first, second, strict=True))
    rows = [
        row(f"step of stage 1, {pair}", times["distil"], times["plain"], "student alone"),
        row(f"step of stage 2, {asked.student}", times["head"], times["distil"], "stage 1"),
        row(
            f"{SECOND} epochs of stage 2, a step each: {100 * share:.0f} % of both stages",
            second, first, f"{FIRST} epochs of stage 1",
        ),
        inference_row(asked.student, asked.repeat),
    ]  # fmt: skip
    script = "tests/benchmarks/detection/bench_dwpose.py"
    write_rows(asked.out, script, ["torch", "cohobate-detection"], rows)
    print(*rows, sep="\n")


def crops(people: int) -> Batch:
    """Noise with points anywhere."""
    return Batch(
        torch.randn(people, SIZE[1], SIZE[0], 3).permute(0, 3, 1, 2),
        torch.rand(people, 133, 2) * 190,
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
    plain = RTMPose(variant, 133, SIZE).eval().to(memory_format=torch.channels_last)  # type: ignore[arg-type]
    image = torch.randn(1, 3, SIZE[1], SIZE[0]).to(memory_format=torch.channels_last)
    student = module.student.eval()

    @torch.no_grad()
    def run(network: nn.Module) -> Tensor:
        return network(image).x

    runs = {"ours": lambda: run(student), "plain": lambda: run(plain)}
    times = in_turn(runs, 3 * repeat, "inference")
    what = f"inference of a distilled {variant}, one person"
    return row(what, times["ours"], times["plain"], "the network alone")


def row(what: str, ours: Sequence[float], other: Sequence[float], name: str) -> Row:
    """One line of the table."""
    middle = medians({"ours": ours, "other": other})
    return {
        "what": what,
        "here (s)": round(middle["ours"], 4),
        "against": name,
        "that (s)": round(middle["other"], 4),
        "times faster, median (least to most)": times_faster(ours, other),
    }


if __name__ == "__main__":
    main()
