"""Small detectors and batches for mmdet's interfaces."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

collect_ignore_glob = [] if find_spec("mmdet") else ["test_*.py"]

CLASSES = ("disc", "box", "triangle")
SIZE = (64, 80)
NAMES = ("dino_r50_12e_coco", "deformable_detr_r50_50e_coco", "dab_detr_r50_50e_coco")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """One of the shipped configurations."""
    return request.param


@pytest.fixture
def config() -> Callable[..., Any]:
    """A shipped configuration, made small."""
    from mmengine.config import Config

    from cohobate.detection.d_fine.mmdet import CONFIGS

    def make(name: str) -> Any:
        cfg = Config.fromfile(CONFIGS / f"{name}.py")
        model = cfg.model
        model.backbone.update(depth=18, base_channels=16, init_cfg=None)
        model.neck.in_channels = [channels // 16 for channels in model.neck.in_channels]
        model.encoder.num_layers, model.decoder.num_layers = 1, 3
        for part in (model.encoder, model.decoder):
            part.layer_cfg.ffn_cfg.feedforward_channels = 256
        model.num_queries = 20
        model.bbox_head.num_classes = len(CLASSES)
        model.test_cfg.max_per_img = 20
        return cfg

    return make


@pytest.fixture
def batch() -> Callable[..., Any]:
    """Images and samples with the given numbers of objects."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    def make(*counts: int) -> tuple[torch.Tensor, list[Any]]:
        samples = []
        height, width = SIZE
        for count in counts:
            corner = torch.rand(count, 2) * torch.tensor([width, height]) * 0.6
            side = torch.rand(count, 2) * torch.tensor([width, height]) * 0.3 + 4
            boxes, labels = torch.cat([corner, corner + side], 1), torch.arange(count) % 3
            sample = DetDataSample(gt_instances=InstanceData(bboxes=boxes, labels=labels))
            sample.set_metainfo(
                {"img_shape": SIZE, "batch_input_shape": SIZE, "scale_factor": (1.0, 1.0)}
            )
            samples.append(sample)
        return torch.randn(len(counts), 3, *SIZE), samples

    return make


@pytest.fixture
def detector(config: Callable[..., Any]) -> Callable[..., Any]:
    """A small detector, optionally with changes of its head."""
    from mmdet.registry import MODELS

    def make(name: str, **head: Any) -> Any:
        torch.manual_seed(0)
        cfg = config(name)
        for key, value in head.items():
            cfg.model.bbox_head[key] = value
        model = MODELS.build(cfg.model)
        model.init_weights()
        return model

    return make


@pytest.fixture
def runner(config: Callable[..., Any], coco: Path, tmp_path: Path) -> Callable[..., Any]:
    """A runner of a shipped configuration on a folder in COCO's layout."""
    from mmengine.runner import Runner

    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True},
        {"type": "Resize", "scale": SIZE[::-1]},
    ]
    for file in (coco / "annotations").glob("*.json"):
        content = json.loads(file.read_text())
        for entry in content["annotations"]:
            entry["area"] = entry["bbox"][2] * entry["bbox"][3]  # which mmdet asks for
        file.write_text(json.dumps(content))
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")

    def make(name: str, epochs: int, resume: bool = False) -> Any:
        cfg = config(name)
        cfg.work_dir, cfg.resume = str(tmp_path / "run"), resume
        cfg.train_cfg.max_epochs = epochs
        for part in ("train", "val", "test"):
            folder = "train" if part == "train" else "val"
            loader = cfg[f"{part}_dataloader"]
            loader.update(num_workers=0, persistent_workers=False)
            pack = {"type": "PackDetInputs", "meta_keys": keys}
            loader.dataset.update(
                data_root=str(coco),
                ann_file=f"annotations/instances_{folder}2017.json",
                data_prefix={"img": f"{folder}2017/"},
                metainfo={"classes": CLASSES},
                pipeline=[*pipeline, pack],
            )
        file = str(coco / "annotations" / "instances_val2017.json")
        cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = file
        return Runner.from_cfg(cfg)

    return make
