"""What the tests of this paper share: small folders as BUSI comes, and small networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cohobate.medseg.tsddnet import Detector, Diagnoser

SMALL: dict[str, Any] = {
    "channels": 8,
    "levels": 2,
    "hidden": 16,
    "anchors": [16, 32],
    "box_batch_size_per_image": 8,
    "rpn_pre_nms_top_n_train": 20,
    "rpn_post_nms_top_n_train": 20,
    "rpn_pre_nms_top_n_test": 10,
    "rpn_post_nms_top_n_test": 10,
}


def write_busi(root: Path, count: int = 12, side: int = 64) -> Path:
    """``count`` images of each class: noise with a dark box, whose mask lies beside it."""
    rng = np.random.default_rng(5)
    for kind in ("benign", "malignant"):
        (root / kind).mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            image = rng.integers(90, 255, (side, side - 10)).astype(np.uint8)
            mask = np.zeros_like(image)
            y, x = rng.integers(4, side // 2 - 10, 2)
            height, width = (16, 24) if kind == "benign" else (24, 16)
            mask[y : y + height, x : x + width] = 255
            image[mask > 0] //= 4
            Image.fromarray(image).save(root / kind / f"{kind} ({number}).png")
            Image.fromarray(mask).save(root / kind / f"{kind} ({number})_mask.png")
    return root


@pytest.fixture
def make_busi() -> Callable[..., Path]:
    """Write a folder as BUSI comes: ``make(root, count, side)``."""
    return write_busi


@pytest.fixture
def busi(tmp_path: Path) -> Path:
    """A small folder as BUSI comes."""
    return write_busi(tmp_path / "busi")


@pytest.fixture
def small_args() -> dict[str, Any]:
    """Arguments of a detector small enough for a test."""
    return dict(SMALL)


@pytest.fixture
def net() -> Diagnoser:
    """A small network on canvases of 64 pixels."""
    torch.manual_seed(0)
    detector = Detector("test_resnet", SMALL, 64)
    return Diagnoser(detector, "test_resnet", 2, 32, roi_hidden=16, width=8, fused_width=6)
