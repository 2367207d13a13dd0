"""Small annotated folders in the three layouts, made here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
IDS = {1: "disc", 7: "box", 90: "triangle"}


def image(path: Path, seed: int = 0, size: tuple[int, int] = (80, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def picture() -> Callable[..., Path]:
    return image


def clip_of(path: Path, count: int, size: tuple[int, int] = (66, 50)) -> Path:
    """Frames that get brighter, ten a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for n in range(count):
            pixels = np.full((size[1], size[0], 3), 40 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def make_clip() -> Callable[..., Path]:
    return clip_of


@pytest.fixture
def coco(tmp_path) -> Path:
    """COCO's layout with ids 1, 7, 90: empty, outside and crowd boxes, and an empty image."""
    root = tmp_path / "coco"
    boxes = {
        1: [(1, [10, 10, 20, 20], 0), (90, [30, 20, 40, 40], 0), (7, [5, 5, 0, 10], 0)],
        2: [(7, [-10, -10, 30, 30], 0), (7, [200, 200, 5, 5], 0), (1, [0, 0, 80, 64], 1)],
        3: [],
        4: [(1, [40, 30, 20, 20], 0)],
    }
    for part, ids in (("train", [1, 2, 3, 4]), ("val", [1, 4])):
        for n in ids:
            image(root / f"{part}2017" / f"{n}.png", n)
        content = {
            "images": [{"id": n, "file_name": f"{n}.png", "width": 80, "height": 64} for n in ids],
            "annotations": [
                {"id": 100 * n + k, "image_id": n, "category_id": c, "bbox": b, "iscrowd": crowd}
                for n in ids
                for k, (c, b, crowd) in enumerate(boxes[n])
            ],
            "categories": [{"id": k, "name": v} for k, v in reversed(IDS.items())],
        }
        file = root / "annotations" / f"instances_{part}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return root


@pytest.fixture
def voc(tmp_path) -> Path:
    root = tmp_path / "voc"
    for n in range(5):
        image(root / "images" / f"a{n}.jpg", n)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"a{n}.xml").write_text(
            f"<annotation><filename>a{n}.jpg</filename><size><width>80</width><height>64</height>"
            "</size><object><name>cell</name><bndbox><xmin>10</xmin><ymin>5</ymin><xmax>40</xmax>"
            "<ymax>50</ymax></bndbox></object></annotation>"
        )
    (root / "train.txt").write_text("a0\na1\na2\n")
    (root / "val.txt").write_text("a3\na4\n")
    return root


@pytest.fixture
def yolo(tmp_path) -> Path:
    root = tmp_path / "yolo"
    for n in range(3):
        image(root / "images" / "train" / f"{n}.png", n)
    (root / "labels" / "train").mkdir(parents=True)
    (root / "labels" / "train" / "0.txt").write_text("1 0.5 0.5 0.25 0.5\n\n0 0.1 0.1 0.4 0.4\n")
    (root / "data.yaml").write_text("train: ../elsewhere/images/train\nnames: [cat, dog]\n")
    return root


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
