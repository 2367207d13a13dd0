"""What DWPose costs: its losses and labels against the official code's, and a step of each stage.

    python tests/benchmarks/detection/bench_dwpose.py [--official DIR]

DIR is the folder ``mmpose`` of IDEA-Research/DWPose, which is not part of this project; without it
the rows that need it are left out. All sides run in one process in turn on the same tensors, with
one thread, and the seconds are those of the process, so that other work on the machine counts
little.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cohobate.core.testing.bench import in_turn, medians, times_faster, write_rows
from cohobate.detection.dwpose import (
    WHOLEBODY,
    DWPose,
    RTMPose,
    SimCC,
    encode,
    feature_loss,
    simcc_distillation,
    simcc_loss,
)
from cohobate.detection.dwpose.data import Batch

ROOT = Path(__file__).parents[3]
SIZE = (192, 256)
FIRST, SECOND = 270, 60  # epochs of the two stages in the released settings
Row = dict[str, object]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-dwpose.json")
    parser.add_argument("--official", type=Path, default=os.environ.get("OFFICIAL_DWPOSE"))
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
    if asked.official is not None:
        official = load(Path(asked.official))
        rows += [losses_row(official, asked.repeat), labels_row(official, asked.repeat)]
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


def load(folder: Path) -> dict[str, Any]:
    """The official classes that are measured, without the packages' own imports of all others."""
    for name in ("mmengine", "mmpose", "mmpose.codecs", "mmpose.models", "mmpose.models.losses"):
        module = ModuleType(name)
        module.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = module

    class Registry:
        def register_module(self) -> Callable[[Any], Any]:
            return lambda kind: kind

    stubs = {
        "mmpose.registry": {"MODELS": Registry(), "KEYPOINT_CODECS": Registry()},
        "mmengine.model": {"BaseModule": nn.Module},
        "mmpose.codecs.base": {"BaseKeypointCodec": object},
        "mmpose.codecs.utils": {"get_simcc_maximum": None},
        "mmpose.codecs.utils.refinement": {"refine_simcc_dark": None},
    }
    for name, content in stubs.items():
        module = ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
    wanted = {
        "KLDiscretLoss": "models/losses/classification_loss.py", "KDLoss": "models/losses/kd.py",
        "FeaLoss": "models/losses/fea.py", "SimCCLabel": "codecs/simcc_label.py",
    }  # fmt: skip
    found = {}
    for kind, path in wanted.items():
        name = f"mmpose.{path.removesuffix('.py').replace('/', '.')}"
        spec = importlib.util.spec_from_file_location(name, folder / "mmpose" / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[kind] = getattr(module, kind)
    return found


def losses_row(official: dict[str, Any], repeat: int, people: int = 16) -> Row:
    """All three losses of stage 1 and their gradients, on given logits and features."""
    student, teacher, labels = (
        SimCC(*(torch.randn(people, 133, 2 * n) / 10 for n in SIZE)) for _ in range(3)
    )
    features = [torch.randn(people, 384, 8, 6), torch.randn(people, 384, 8, 6)]
    leaves = [x.requires_grad_() for x in (*student, features[0])]
    weight = (torch.rand(people, 133) > 0.3).float()
    task = official["KLDiscretLoss"](beta=10.0, label_softmax=True)
    logit = official["KDLoss"](name="kd", use_this=True, weight=0.1)
    feature = official["FeaLoss"](
        name="fea", use_this=True, student_channels=384, teacher_channels=384, alpha_fea=7e-5
    )

    def ours() -> Tensor:
        total = simcc_loss(student, labels, weight) + feature_loss(*features)
        total = total + 0.1 * simcc_distillation(student, teacher)
        torch.autograd.grad(total, leaves)
        return total.detach()

    def theirs() -> Tensor:
        total = task(student, labels, weight) + feature(*features)
        total = total + logit(student, teacher, 10.0, weight)
        torch.autograd.grad(total, leaves)
        return total.detach()

    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=0)
    times = in_turn({"ours": ours, "theirs": theirs}, repeat, "losses")
    what = f"three losses with gradients, {people} people, 133 points"
    return row(what, times["ours"], times["theirs"], "official")


def labels_row(official: dict[str, Any], repeat: int, people: int = 16) -> Row:
    """Labels of a batch."""
    points, seen = torch.rand(people, 133, 2) * 192, torch.ones(people, 133)
    codec = official["SimCCLabel"](SIZE, sigma=(4.9, 5.66), normalize=False, use_dark=False)

    def theirs() -> Any:
        return codec.encode(points.numpy(), seen.numpy())

    wanted = theirs()["keypoint_x_labels"]
    torch.testing.assert_close(encode(points, seen, SIZE)[0].x, torch.from_numpy(wanted))
    runs = {"ours": lambda: encode(points, seen, SIZE), "theirs": theirs}
    times = in_turn(runs, repeat, "labels")
    return row(f"labels of {people} people", times["ours"], times["theirs"], "official")


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
