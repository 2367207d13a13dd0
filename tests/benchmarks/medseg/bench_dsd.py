"""What DSD costs: a training step against the baseline's, the loss against the official code's.

    python tests/benchmarks/medseg/bench_dsd.py [--official DIR] [--out docs/results/bench-dsd.json]

The official repository (soumbane/DualSelfDistillation) and its dependency torchmanager are not part
of this project; without them the row that needs them is left out. All variants run in one process
in turn, and the seconds are those of the process, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cohobate.core.testing.bench import in_turn, medians, write_rows
from cohobate.medseg.data import Preprocess
from cohobate.medseg.dsd import DSD, dice_ce, distillation, prepare

ROOT = Path(__file__).parents[3]
CLASSES = 8


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", type=Path, default=os.environ.get("OFFICIAL_DSD"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-dsd.json")
    parser.add_argument("--size", type=int, default=96, help="edge of a patch")
    parser.add_argument("--batch", type=int, default=2, help="patches a step")
    parser.add_argument("--repeat", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = [step_row(asked.size, asked.batch, asked.repeat)]
    rows += loss_rows(asked.size, asked.batch, 2 * asked.repeat, asked.official)
    packages = ("torch", "monai", "cohobate-medseg")
    write_rows(asked.out, "tests/benchmarks/medseg/bench_dsd.py", packages, rows)
    print(*rows, sep="\n")


def step_row(size: int, batch: int, repeat: int) -> dict[str, object]:
    """Forward, loss, backward and optimiser step of DynUNet 32..320, with and without DSD."""
    models = {"baseline": model(size, distill=False), "DSD": model(size, distill=True)}
    data = patches(size, batch)
    steps = {name: step(module, data) for name, module in models.items()}
    seconds = medians(in_turn(steps, repeat, f"training step, {batch} × {size}³"))
    added = sum(p.numel() for p in models["DSD"].model.heads.parameters())
    students = sum(p.numel() for p in models["DSD"].student.parameters())
    return row(
        f"training step, DynUNet 32..320, {batch} × {size}³, K = {CLASSES}",
        "DSD", seconds["DSD"], "baseline", seconds["baseline"],
        f"{added:,} parameters added ({added / students:.3%})",
    )  # fmt: skip


def loss_rows(size: int, batch: int, repeat: int, official: Path | None) -> list[dict[str, object]]:
    """All eleven loss terms with their gradients, ours against the official code and MONAI's."""
    logits = [torch.randn(batch, CLASSES, size, size, size, requires_grad=True) for _ in range(9)]
    label = patches(size, batch)["label"].long()
    losses = {"ours": lambda: ours(logits, label)}
    reference = official_loss(official)
    if reference is None:
        return []
    losses["official"] = lambda: reference(logits, label)
    values = {}
    for name, loss in losses.items():
        values[name] = loss().item()
        grads = torch.autograd.grad(loss(), logits)
        values[name + " gradient"] = torch.stack([g.norm() for g in grads])
    gap = (values["ours gradient"] / values["official gradient"] - 1).abs().max().item()
    runs = {name: backward(loss, logits) for name, loss in losses.items()}
    seconds = medians(in_turn(runs, repeat, "loss"))
    note = (
        f"value {values['ours']:.6f} against {values['official']:.6f}, "
        f"gradient norms within {gap:.1e}"
    )
    name = f"loss and its gradients, 9 outputs, {batch} × {size}³, K = {CLASSES}"
    return [row(name, "ours", seconds["ours"], "official code", seconds["official"], note)]


def model(size: int, distill: bool) -> DSD:
    """The paper's DynUNet."""
    torch.manual_seed(0)
    return DSD(
        num_classes=CLASSES,
        in_channels=1,
        class_names=[str(k) for k in range(CLASSES)],
        roi_size=(size,) * 3,
        preprocess=Preprocess(),
        distill=distill,
    ).train()


def patches(size: int, batch: int) -> dict[str, Tensor]:
    """Noise with a label of smooth regions, as a segmentation has."""
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(batch, 1, size, size, size, generator=rng)
    coarse = torch.randn(batch, CLASSES, 6, 6, 6, generator=rng)
    label = torch.nn.functional.interpolate(coarse, (size,) * 3, mode="trilinear").argmax(1)
    return {"image": image, "label": label[:, None].to(torch.uint8)}


def step(module: DSD, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One optimiser step."""
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)

    def run() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()  # type: ignore[arg-type]
        optimizer.step()

    return run


def ours(logits: list[Tensor], label: Tensor) -> Tensor:
    """The total loss, outputs in the official order: main, D4..D1, E1..E4."""
    main, d4, d3, d2, d1, e1, e2, e3, e4 = logits
    target = prepare(label, main)
    total = torch.stack([dice_ce(z, target) for z in (main, d4, d3, d2, d1)]).sum()
    return total + distillation([d4, d3, d2], d1).sum() + distillation([e1, e2, e3], e4).sum()


def official_loss(folder: Path | None) -> Callable[[list[Tensor], Tensor], Tensor] | None:
    """The official loss objects, made as the official training script makes them."""
    if folder is None:
        return None
    sys.path.insert(0, str(folder))
    try:
        import loss_functions as code
        from monai.losses import DiceCELoss
        from torchmanager import losses
    except ImportError as error:
        print(f"the official code is left out: {error}")
        return None
    part = {"include_background": True, "to_onehot_y": True, "softmax": True}
    dice = code.Self_Distillation_Loss_Dice(
        [losses.Loss(DiceCELoss(**part)) for _ in range(5)], weight=1.0, target="out"
    )
    kl = code.Self_Distillation_Loss_KL(
        [losses.Loss(code.PixelWiseKLDiv(log_target=False)) for _ in range(3)], weight=1.0, T=3
    )
    dice.train()
    kl.train()

    def total(logits: list[Tensor], label: Tensor) -> Tensor:
        return dice({"out": logits}, {"out": label}) + kl({"out": logits}, {"out": label})

    return total


def backward(loss: Callable[[], Tensor], logits: list[Tensor]) -> Callable[[], None]:
    """Value and gradients, the gradients dropped."""

    def run() -> None:
        torch.autograd.grad(loss(), logits)

    return run


def row(name: str, left: str, a: float, right: str, b: float, note: str) -> dict[str, object]:
    """One line of the table."""
    return {
        "what": name,
        "seconds": f"{left} {a:.3g}, {right} {b:.3g}",
        "ratio": round(a / b, 3),
        "note": note,
    }


if __name__ == "__main__":
    main()
