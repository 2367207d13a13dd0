"""What D-FINE costs: criterion, training step and inference against the official code's.

    python tests/benchmarks/detection/bench_d_fine.py [--official DIR] [--only ROW ...]

The official repository (Peterande/D-FINE) is not part of this project; without it the rows that
need it are left out. Both sides run in one process in turn on the same tensors, with one thread,
and the seconds are those of the process, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cohobate.core.testing.bench import in_turn, times_faster, write_rows
from cohobate.detection.boxes import Targets, pad_targets
from cohobate.detection.d_fine import Criterion, Denoising, DFineNet, Outputs, deploy
from cohobate.detection.d_fine.checkpoint import to_official
from cohobate.detection.d_fine.optim import RATES, adamw
from cohobate.detection.d_fine.sizes import config_of

ROOT = Path(__file__).parents[3]
WEIGHTS = {"vfl": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}
IMAGES, QUERIES, CLASSES, LAYERS, OBJECTS = 4, 300, 80, 6, 7
Row = dict[str, object]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", type=Path, default=os.environ.get("OFFICIAL_D_FINE"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-d-fine.json")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    official = load(asked.official) if asked.official is not None else None
    for name in asked.only:
        if official is None and name != "plain":
            continue
        found = ROWS[name](official, asked.repeat)
        print(found)
        packages = ("torch", "transformers", "cohobate-detection")
        script = "tests/benchmarks/detection/bench_d_fine.py"
        write_rows(asked.out, script, packages, [found], update=True)  # as they are measured


def row(
    what: str, here: Callable[[], Any], name: str, there: Callable[[], Any], repeat: int
) -> Row:
    """One line of the table, timed."""
    ours, other = in_turn({"here": here, name: there}, repeat, what).values()
    return {
        "what": what,
        "here (s)": round(statistics.median(ours), 4),
        "against": name,
        "that (s)": round(statistics.median(other), 4),
        "times faster, median (least to most)": times_faster(ours, other),
    }


def objects(images: int = IMAGES) -> Targets:
    """As many objects an image as COCO has on average."""
    labels = [torch.randint(0, CLASSES, (OBJECTS,)) for _ in range(images)]
    boxes = [torch.rand(OBJECTS, 4) * 0.3 + torch.tensor([0.3, 0.3, 0.05, 0.05]) for _ in labels]
    return pad_targets(labels, boxes)


def official_targets(targets: Targets) -> list[dict[str, Tensor]]:
    """The same objects as the official code takes them."""
    rows = zip(targets.labels, targets.boxes, targets.counts, strict=True)
    return [{"labels": label[:n], "boxes": box[:n]} for label, box, n in rows]


def load(folder: Path) -> dict[str, Any]:
    """The official modules that are measured, without the packages' own imports of all others."""
    for name in ("src", "src.zoo", "src.zoo.dfine", "src.nn", "src.nn.backbone", "src.misc"):
        module = ModuleType(name)
        module.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = module
    core = ModuleType("src.core")
    core.register = lambda *_, **__: lambda kind: kind  # type: ignore[attr-defined]
    data = ModuleType("src.data")
    data.DataLoader = torch.utils.data.DataLoader  # type: ignore[attr-defined]
    sys.modules |= {"src.core": core, "src.data": data}
    names = {
        "src.zoo.dfine.dfine_criterion": "DFINECriterion",
        "src.zoo.dfine.matcher": "HungarianMatcher",
        "src.zoo.dfine.dfine": "DFINE",
        "src.zoo.dfine.dfine_decoder": "DFINETransformer",
        "src.zoo.dfine.hybrid_encoder": "HybridEncoder",
        "src.nn.backbone.hgnetv2": "HGNetv2",
        "src.zoo.dfine.postprocessor": "DFINEPostProcessor",
    }
    return {name: getattr(importlib.import_module(path), name) for path, name in names.items()}


def official_criterion(official: dict[str, Any]) -> Any:
    """With the settings of the released configurations."""
    matcher = official["HungarianMatcher"](
        weight_dict={"cost_class": 2, "cost_bbox": 5, "cost_giou": 2}, alpha=0.25, gamma=2.0
    )
    return official["DFINECriterion"](
        matcher, {f"loss_{k}": v for k, v in WEIGHTS.items()}, ["vfl", "boxes", "local"],
        alpha=0.75, gamma=2.0, num_classes=CLASSES, reg_max=32,
    )  # fmt: skip


def official_network(official: dict[str, Any], size: int) -> Any:
    """D-FINE-N."""
    backbone = official["HGNetv2"](
        "B0", use_lab=True, return_idx=[2, 3], freeze_at=-1, freeze_norm=False, pretrained=False
    )
    encoder = official["HybridEncoder"](
        in_channels=[512, 1024], feat_strides=[16, 32], hidden_dim=128, use_encoder_idx=[1],
        dim_feedforward=512, expansion=0.34, depth_mult=0.5, eval_spatial_size=[size, size],
    )  # fmt: skip
    decoder = official["DFINETransformer"](
        num_classes=CLASSES, feat_channels=[128, 128], feat_strides=[16, 32], hidden_dim=128,
        dim_feedforward=512, num_levels=2, num_layers=3, num_points=[6, 6], reg_max=32, reg_scale=4,
        eval_spatial_size=[size, size],
    )  # fmt: skip
    return official["DFINE"](backbone, encoder, decoder)


def criterion_row(official: dict[str, Any], repeat: int) -> Row:
    """Matching, all 62 terms and their gradients, on given outputs."""
    targets = objects()
    noised = Denoising()(targets, CLASSES, QUERIES)
    assert noised is not None

    def outputs(queries: int, others: tuple[str, ...]) -> Outputs:
        count = LAYERS + len(others)
        base = torch.randn(IMAGES, queries, CLASSES) - 4, torch.rand(IMAGES, queries, 4) * 0.3 + 0.2
        leaves = [  # layers that nearly agree, as those of a network do
            base[0] + 0.1 * torch.randn(count, IMAGES, queries, CLASSES),
            base[1] + 0.01 * torch.rand(count, IMAGES, queries, 4),
            torch.randn(LAYERS, IMAGES, queries, 4, 33),
        ]
        reference = torch.rand(IMAGES, queries, 4) * 0.3 + 0.2
        return Outputs(*(x.requires_grad_() for x in leaves), reference, others)

    main_, dn = outputs(QUERIES, ("pre", "enc_0")), outputs(noised.labels.shape[1], ("pre",))
    ours, theirs = Criterion(), official_criterion(official)
    leaves = [*main_[:3], *dn[:3]]

    def here() -> Tensor:
        matched = ours.match(main_, targets, (dn, noised.match, noised.groups))
        terms = {**ours.task(matched, targets), **ours.distill(matched)}
        total = torch.stack([v * WEIGHTS[k.partition("_")[0]] for k, v in terms.items()]).sum()
        torch.autograd.grad(total, leaves)
        return total.detach()

    positive = [(row_ >= 0).nonzero()[:, 0] for row_ in noised.match]
    listed = official_targets(targets)

    def there() -> Tensor:
        given = official_outputs(main_, dn, positive, noised.groups)
        total = sum(theirs(given, listed).values())
        torch.autograd.grad(total, leaves)
        return total.detach()

    # of objects given equally often to a query the official sort takes any
    torch.testing.assert_close(here(), there(), rtol=1e-2, atol=0)
    what = f"criterion, {IMAGES} × {QUERIES} queries, 6 layers"
    return row(what, here, "official", there, repeat)


def official_outputs(main_: Outputs, dn: Outputs, positive: list[Tensor], groups: int) -> Any:
    """The same tensors in the official dictionary."""

    def part(source: Outputs, n: int) -> dict[str, Tensor]:
        found = {"pred_logits": source.logits[n], "pred_boxes": source.boxes[n]}
        if n < LAYERS:
            assert source.edges is not None
            assert source.reference is not None
            last = LAYERS - 1
            found |= {
                "pred_corners": source.edges[n].flatten(-2), "ref_points": source.reference,
                "teacher_corners": source.edges[last].flatten(-2),
                "teacher_logits": source.logits[last],
            }  # fmt: skip
        return found

    last = part(main_, LAYERS - 1)
    del last["teacher_corners"], last["teacher_logits"]
    return {
        **last, "up": torch.tensor([0.5]), "reg_scale": torch.tensor([4.0]),
        "aux_outputs": [part(main_, n) for n in range(LAYERS - 1)],
        "pre_outputs": part(main_, LAYERS), "enc_aux_outputs": [part(main_, LAYERS + 1)],
        "enc_meta": {"class_agnostic": False},
        "dn_outputs": [part(dn, n) for n in range(LAYERS)], "dn_pre_outputs": part(dn, LAYERS),
        "dn_meta": {"dn_positive_idx": positive, "dn_num_group": groups},
    }  # fmt: skip


def stepper(network: DFineNet, criterion: Criterion, images: Tensor, targets: Targets) -> Any:
    """A training step of ours."""
    optimizer = adamw(network, RATES["n"])

    def step() -> None:
        outputs, noised = network.outputs(images, targets, Denoising())
        matched = criterion.match(outputs, targets, noised)
        terms = {**criterion.task(matched, targets), **criterion.distill(matched)}
        total = torch.stack([v * WEIGHTS[k.partition("_")[0]] for k, v in terms.items()]).sum()
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()

    return step


def step_row(official: dict[str, Any], repeat: int) -> Row:
    """A whole training step of D-FINE-N."""
    size = 320
    network, images, targets = (
        DFineNet(config_of("n", CLASSES)),
        torch.rand(4, 3, size, size),
        objects(),
    )
    network.train()
    theirs = official_network(official, size).train()
    theirs.load_state_dict(to_official(network), strict=False)
    criterion, listed = official_criterion(official), official_targets(targets)
    optimizer = torch.optim.AdamW(theirs.parameters(), 8e-4)

    def there() -> None:
        total = sum(criterion(theirs(images, listed), listed).values())
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimizer.step()

    here = stepper(network, Criterion(), images, targets)
    return row("training step, N, 4 images of 320 × 320", here, "official", there, repeat)


@torch.no_grad()
def inference_row(official: dict[str, Any], repeat: int) -> Row:
    """The deployed D-FINE-N with what comes after it, one image."""
    size = 640
    network = DFineNet(config_of("n", CLASSES)).eval()
    theirs = official_network(official, size)
    theirs.load_state_dict(to_official(network), strict=False)
    slim, theirs = deploy(network), theirs.deploy().eval()
    after = official["DFINEPostProcessor"](num_classes=CLASSES, num_top_queries=300)
    images, sizes = torch.rand(1, 3, size, size), torch.tensor([[640.0, 480.0]])
    what = "inference, deployed N, 640 × 640"
    return row(
        what, lambda: slim(images, sizes), "official", lambda: after(theirs(images), sizes), repeat
    )


def plain_row(_: Any, repeat: int) -> Row:
    """What FDR and GO-LSD add to a training step over plain regression, six layers."""
    images, targets = torch.rand(2, 3, 320, 320), objects(2)
    config = config_of("n", CLASSES, decoder_layers=LAYERS)
    fdr, plain = (
        stepper(DFineNet(config, regression=kind).train(), Criterion(distillation), images, targets)
        for kind, distillation in (("fdr", "go_lsd"), ("plain", "none"))
    )
    what = "training step, FDR + GO-LSD, 6 layers, 300 queries"
    return row(what, fdr, "plain regression", plain, repeat)


ROWS: dict[str, Callable[[Any, int], Row]] = {
    "criterion": criterion_row,
    "step": step_row,
    "inference": inference_row,
    "plain": plain_row,
}

if __name__ == "__main__":
    main()
