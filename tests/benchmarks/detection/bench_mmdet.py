"""DINO in mmdet with and without FDR and GO-LSD: short paired runs on one small set.

    python tests/benchmarks/detection/bench_mmdet.py [--root DIR] [--seeds N] [--arms ARM ...]

``--root`` takes a folder with VOC XML files; by default the SYNTHETIC shapes are used. A small
network is made of the shipped configuration; every arm has the same data order, steps and
learning rate. Runs that stand in the JSON are not repeated. Seconds are those of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cohobate.core.testing.bench import write_rows
from cohobate.detection.data import Annotated
from cohobate.detection.data.synthetic import shapes
from cohobate.detection.data.voc import find_voc, read_voc

ROOT = Path(__file__).parents[3]
SCRIPT = "tests/benchmarks/detection/bench_mmdet.py"
SIZE = (128, 96)
BATCH = 4
ARMS: dict[str, dict[str, Any]] = {
    "DINO": {"type": "DINO", "head": {"type": "DINOHead"}},
    "FDRDINO, loss_ddf=None": {"type": "FDRDINO", "head": {"loss_ddf": None}},
    "FDRDINO": {"type": "FDRDINO", "head": {}},
}
Row = dict[str, Any]


def main() -> None:
    """Run what is asked for and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=["DINO", "FDRDINO"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-mmdet.json")
    asked = parser.parse_args()
    if find_spec("mmdet") is None:
        print("left out: mmdet is not installed")
        return
    torch.set_num_threads(1)
    parts, name = read(asked.root)
    what = f"{name}, {SIZE[0]} × {SIZE[1]}, {asked.epochs} epochs of {BATCH} images a step"
    rows = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
    rows = [row for row in rows if row["seed"] != "mean"]
    done = {(row["arm"], row["seed"], row["data"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        files = {part: as_coco(found, Path(folder) / part) for part, found in parts.items()}
        for seed in range(asked.seeds):
            for arm in asked.arms:
                if (arm, seed, what) not in done:
                    found = run(arm, seed, asked.epochs, files, parts, Path(folder) / "run")
                    rows.append({"arm": arm, "seed": seed, **found, "data": what})
                    print(rows[-1], flush=True)
                    write(asked.out, rows)  # as they are measured


def read(root: Path | None) -> tuple[dict[str, Annotated], str]:
    """Training and validation pictures, and what they are."""
    if root is None:
        return {"train": shapes(192, 0), "val": shapes(64, 1)}, "SYNTHETIC shapes"
    listed = find_voc(root)
    train = read_voc(*listed["train"])
    val = read_voc(*listed["val"], train.categories)
    counts = f"{len(train.pictures)} + {len(val.pictures)} images"
    return {"train": train, "val": val}, f"{root.name.upper()}, {counts}"


def as_coco(found: Annotated, folder: Path) -> Path:
    """The pictures as mmdet's ``CocoDataset`` reads them."""
    folder.mkdir()
    images, annotations = [], []
    for n, picture in enumerate(found.pictures):
        file = picture.path
        if file is None:
            file = folder / f"{n}.png"
            Image.fromarray(picture.read()).save(file)
        size = {"width": picture.width, "height": picture.height}
        images.append({"id": n, "file_name": str(file.resolve()), **size})
        for (x1, y1, x2, y2), label in zip(
            picture.boxes.tolist(), picture.labels.tolist(), strict=True
        ):
            annotations.append({
                "id": len(annotations), "image_id": n, "category_id": label, "iscrowd": 0,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
            })  # fmt: skip
    categories = [{"id": n, "name": kind.name} for n, kind in enumerate(found.categories)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file = folder / "instances.json"
    file.write_text(json.dumps(content))
    return file


def run(
    arm: str,
    seed: int,
    epochs: int,
    files: dict[str, Path],
    parts: dict[str, Annotated],
    work: Path,
) -> Row:
    """Train one arm and score it at the end."""
    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    from cohobate.detection.d_fine.mmdet import CONFIGS

    seconds: list[float] = []

    class Clock(Hook):
        def before_train_iter(self, *_: Any, **__: Any) -> None:
            self.start = time.process_time()

        def after_train_iter(self, *_: Any, **__: Any) -> None:
            seconds.append(time.process_time() - self.start)

    cfg = Config.fromfile(CONFIGS / "dino_r50_12e_coco.py")
    small(cfg, len(parts["train"].categories))
    cfg.model.type = ARMS[arm]["type"]
    cfg.model.bbox_head.update(ARMS[arm]["head"])
    if arm == "DINO":
        del cfg.model.bbox_head.loss_fgl, cfg.model.bbox_head.loss_ddf
    data(cfg, files, tuple(kind.name for kind in parts["train"].categories))
    cfg.work_dir, cfg.log_level = str(work), "WARNING"
    cfg.randomness = {"seed": seed}
    cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    cfg.default_hooks.checkpoint.interval = -1
    cfg.optim_wrapper.optimizer.lr = 3e-4
    cfg.optim_wrapper.paramwise_cfg = {}
    cfg.param_scheduler = [{"type": "LinearLR", "start_factor": 0.02, "by_epoch": False, "end": 50}]
    runner = Runner.from_cfg(cfg)
    runner.register_hook(Clock())
    runner.train()
    scores = {key: value.item() if hasattr(value, "item") else value
              for key, value in runner.message_hub.log_scalars.items()
              if key.startswith("val/coco")
              for value in [value.current()]}  # fmt: skip
    names = {"AP": "bbox_mAP", "AP50": "bbox_mAP_50", "AP75": "bbox_mAP_75"}
    row: Row = {key: round(float(scores[f"val/coco/{name}"]), 4) for key, name in names.items()}
    trained = sum(p.numel() for p in runner.model.parameters() if p.requires_grad)
    return {**row, "s a step": round(statistics.median(seconds), 3), "parameters": trained}


def small(cfg: Any, classes: int) -> None:
    """A network that trains on one core: 5 million parameters, three decoder layers."""
    model = cfg.model
    model.backbone.update(
        depth=18, base_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None
    )
    model.backbone.norm_cfg.requires_grad = True
    model.neck.in_channels = [32, 64, 128]
    model.encoder.num_layers, model.decoder.num_layers = 1, 3
    for part in (model.encoder, model.decoder):
        part.layer_cfg.ffn_cfg.feedforward_channels = 512
    model.num_queries = 60
    model.dn_cfg.group_cfg.num_dn_queries = 40
    model.bbox_head.num_classes = classes
    model.test_cfg.max_per_img = 100


def data(cfg: Any, files: dict[str, Path], classes: tuple[str, ...]) -> None:
    """One size of images; flips are the only augmentation."""
    load = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}]
    resize, flip = {"type": "Resize", "scale": SIZE}, {"type": "RandomFlip", "prob": 0.5}
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    pack = {"type": "PackDetInputs", "meta_keys": keys}
    pipelines = {"train": [*load, resize, flip, pack], "val": [*load, resize, pack]}
    for loader, part in (("train", "train"), ("val", "val"), ("test", "val")):
        cfg[f"{loader}_dataloader"].update(
            batch_size=BATCH, num_workers=0, persistent_workers=False
        )
        cfg[f"{loader}_dataloader"].dataset.update(
            data_root="",
            ann_file=str(files[part]),
            data_prefix={"img": ""},
            metainfo={"classes": classes},
            pipeline=pipelines[part],
        )
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = str(files["val"])


def write(out: Path, rows: list[Row]) -> None:
    """Write all rows and the arms' means."""
    means = []
    for kind in dict.fromkeys((row["arm"], row["data"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["data"]) == kind]
        if len(own) == 1:
            continue
        mean = {k: round(statistics.mean(r[k] for r in own), 4) for k in ("AP", "AP50", "AP75")}
        step = round(statistics.mean(row["s a step"] for row in own), 3)
        means.append({**own[0], "seed": "mean", **mean, "s a step": step})
    packages = ("torch", "mmdet", "mmengine", "cohobate-detection")
    write_rows(out, f"{SCRIPT} --root BCCD", packages, [*rows, *means])


if __name__ == "__main__":
    main()
