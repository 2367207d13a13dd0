"""What MACIL-SD costs: a training step and the contrastive terms against the official code's.

    python tests/benchmarks/avviolence/bench_macil_sd.py [--official DIR] [--repeat N] [--out FILE]

The official repository (JustinYuu/MACIL_SD) is not part of this project; without it the row that
needs it is left out. Both sides run in one process in turn on the same tensors, with one thread,
and the seconds are those of the process, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.avviolence.macil_sd import MACILSD, AudioVisualNet, contrast_semi_bags
from cohobate.core.testing.bench import in_turn, times_faster, write_rows

ROOT = Path(__file__).parents[3]
BAGS, SNIPPETS, VISUAL, AUDIO, HIDDEN = 128, 200, 1024, 128, 128
Row = dict[str, object]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", type=Path, default=os.environ.get("OFFICIAL_MACIL_SD"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-macil-sd.json")
    parser.add_argument("--repeat", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [contrast_row(asked.repeat), inference_row(asked.repeat)]
    if asked.official is not None:
        rows.append(step_row(asked.official, asked.repeat))
    packages = ("torch", "cohobate-avviolence")
    write_rows(asked.out, "tests/benchmarks/avviolence/bench_macil_sd.py", packages, rows)
    print(*rows, sep="\n")


def row(what: str, ours: list[float], other: list[float] | None = None, name: str = "") -> Row:
    """One line of the table: the ratio is the median of the ratios of each turn."""
    return {
        "what": what,
        "here (s)": round(statistics.median(ours), 4),
        "against": name or "-",
        "that (s)": round(statistics.median(other), 4) if other else "-",
        "times faster, median (least to most)": times_faster(ours, other) if other else "-",
    }


def batch() -> dict[str, Tensor]:
    """Bags that two classes of prediction come of: otherwise nothing is contrasted."""
    label = (torch.arange(BAGS) % 2).float()
    length = torch.randint(30, SNIPPETS + 1, (BAGS,))
    length[: BAGS // 3] = SNIPPETS
    inside = (torch.arange(SNIPPETS) < length[:, None])[..., None]
    visual = torch.rand(BAGS, SNIPPETS, VISUAL) + label[:, None, None] * torch.linspace(
        0, 1, VISUAL
    )
    audio = torch.rand(BAGS, SNIPPETS, AUDIO) + label[:, None, None]
    return {"visual": visual * inside, "audio": audio * inside, "label": label, "length": length}


def contrast_row(repeat: int) -> Row:
    """Contrastive terms, forward and backward, against a loop over the bags."""
    data = batch()
    scores = torch.rand(2, BAGS, SNIPPETS).unbind(0)
    reps = [torch.randn(BAGS, SNIPPETS, HIDDEN, requires_grad=True) for _ in range(2)]
    violent = data["label"] > 0

    def run(function: Callable[..., Any]) -> None:
        loss = sum(function(violent, *scores, data["length"], *reps))
        torch.autograd.grad(loss, reps)

    runs = {"here": lambda: run(contrast_semi_bags), "loop": lambda: run(loop)}
    seconds = in_turn(runs, repeat)
    return row("contrastive terms, 128 × 200 × 128", *seconds.values(), "a loop over bags")


def loop(
    violent: Tensor,
    audio_scores: Tensor,
    visual_scores: Tensor,
    lengths: Tensor,
    a: Tensor,
    v: Tensor,
) -> list[Tensor]:
    """The same terms bag by bag, as one would write them first."""
    pools: dict[str, list[Tensor]] = {kind + part: [] for kind in "av" for part in ("+", "-", "0")}
    for i in range(len(lengths)):
        n = int(lengths[i])
        k = n // 16 + 1
        for kind, scores, rep in (("a", audio_scores, a), ("v", visual_scores, v)):
            top = rep[i][scores[i, :n].topk(k).indices]
            pools[kind + "-"].append(rep[i][scores[i, :n].topk(k, largest=False).indices])
            if violent[i]:
                pools[kind + "+"].append(top.mean(0, keepdim=True).expand(k, -1))
            else:
                pools[kind + "0"].append(top)
    rows = {name: F.normalize(torch.cat(parts), dim=-1) for name, parts in pools.items()}

    def loss(query: str, positive: str, negatives: str) -> Tensor:
        q, p, z = rows[query], rows[positive], rows[negatives]
        logits = torch.cat(((q * p).sum(1, keepdim=True), q @ z.T), 1) / 0.1
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))

    return [
        loss("a+", "v+", "v-"),
        loss("a+", "v+", "v0"),
        loss("v+", "a+", "a-"),
        loss("v+", "a+", "a0"),
    ]


def inference_row(repeat: int) -> Row:
    """Scores of a video of 400 snippets with five crops."""
    network = AudioVisualNet().eval()
    inputs = torch.randn(5, 400, VISUAL), torch.randn(5, 400, AUDIO)

    @torch.inference_mode()
    def run() -> None:
        network(*inputs)

    return row("inference, 5 crops × 400 snippets", *in_turn({"here": run}, repeat).values())


def step_row(official: Path, repeat: int) -> Row:
    """A whole training step, both networks, against the official loop."""
    data = batch()
    method = MACILSD().train()
    method.weights = dict.fromkeys(method.weights, lambda progress: 1.0)
    assert method.partner is not None
    groups = [(method.network, 4e-4), (method.partner, 8e-5)]
    optimizer = torch.optim.Adam([{"params": list(n.parameters()), "lr": r} for n, r in groups])

    def here() -> None:
        loss = method.training_step(data, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    there, log = official_step(official, data)
    for _ in range(4):  # until both networks predict both classes
        here(), there()
    seconds = in_turn({"here": here, "official": there}, repeat)
    assert "A2V_A2B: 0.0000" not in log[-1], "the official step contrasted nothing"
    return row("training step, 128 × 200", *seconds.values(), "official step")


def official_step(folder: Path, data: dict[str, Tensor]) -> tuple[Callable[[], None], list[str]]:
    """The official loop over one batch, kept on the CPU, and what it logs."""
    sys.path.insert(0, str(folder))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    from avce_network import AVCE_Model, Single_Model
    from train import avce_train

    options = SimpleNamespace(
        dropout=0.1, nhead=4, hid_dim=HIDDEN, ffn_dim=HIDDEN, num_classes=1, v_feature_size=VISUAL
    )
    both, alone = AVCE_Model(options), Single_Model(options)
    optimizers = [torch.optim.Adam(n.parameters(), r) for n, r in ((both, 4e-4), (alone, 8e-5))]
    log: list[str] = []
    logger = SimpleNamespace(info=log.append)

    class Once(list[tuple[Tensor, ...]]):
        """One batch whose length lets the official loop log at it."""

        def __len__(self) -> int:
            return 2

    loader = Once([(data["visual"], data["audio"], data["label"])])
    criterion = torch.nn.BCELoss()
    return lambda: avce_train(loader, both, alone, *optimizers, criterion, 1.0, 1.0, logger), log


if __name__ == "__main__":
    main()
