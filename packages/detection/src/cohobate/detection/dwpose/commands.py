"""Commands for released pose models: take them in, give them out, run them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.core.runs import load_run, make_run
from cohobate.detection.dwpose.checkpoint import load_into, read_weights
from cohobate.detection.dwpose.keypoints import KeypointSet
from cohobate.detection.dwpose.method import DWPose
from cohobate.detection.dwpose.network import Variant
from cohobate.detection.dwpose.predict import Poser, boxes_from
from cohobate.detection.dwpose.serving import kinds_of, open_onnx, to_onnx


def take_pose(
    file: Path, variant: Variant, out: Path, input: Literal["256x192", "384x288"] = "256x192"
) -> int | None:
    """Make a run folder of released RTMPose or DWPose weights, for predict, validate and export.

    Args:
        file: A ``.pth``.
        variant: Size of the network.
        out: The run folder.
        input: Height and width of its input.
    """
    height, width = (int(n) for n in input.split("x"))
    weights = read_weights(file)
    if "head.final_layer.bias" not in weights:
        raise InputError(f"{file}: has no head of RTMPose")
    kinds = kinds_of(len(weights["head.final_layer.bias"]))
    model = DWPose(keypoints=kinds, size=(width, height), stage="plain", variant=variant)
    load_into(model.network, file)
    options = {
        "keypoints": asdict(kinds), "size": [width, height], "stage": "plain", "variant": variant,
    }  # fmt: skip
    config = {"class_path": "cohobate.detection.dwpose.DWPose", "init_args": options}
    seen = {"size": [width, height]}
    data = {"class_path": "cohobate.detection.dwpose.PoseData", "init_args": seen}
    make_run(out, model.state_dict(), config, data)
    print(f"{out}: {sum(p.numel() for p in model.network.parameters()):,} parameters")
    return None


def give_pose(run: Path, out: Path) -> int | None:
    """Write a run's pose network for other programs; the suffix of ``out`` says for which.

    ``.onnx``: ``input`` → ``simcc_x``, ``simcc_y``, as ControlNet preprocessors and rtmlib run it,
    checked in ONNX Runtime. ``.pth``: the names of mmpose.

    Args:
        run: A run folder, or a checkpoint in one.
        out: A file.
    """
    model = load_run(run)
    if not isinstance(model, DWPose):
        raise InputError(f"{run}: not a run of detection/dwpose")
    if out.suffix == ".onnx":
        print(to_onnx(model.network, out))
    elif out.suffix == ".pth":
        with save_atomic(out) as temporary:
            torch.save({"state_dict": model.network.state_dict(), "meta": {}}, temporary)
        print(out)
    else:
        raise InputError(f"{out}: ends in none of .onnx, .pth")
    return None


def pose(
    model: Path,
    input: Path,
    out: Path,
    detector: Path | None = None,
    boxes: Path | None = None,
    sure: float = 0.4,
    threshold: float = 0.3,
    picture: bool = True,
    black: bool = False,
    openpose: bool = False,
    keypoints: KeypointSet | None = None,
) -> int | None:
    """Find key points with a released ONNX model, on the CPU.

    Args:
        model: An ``.onnx`` such as ``dw-ll_ucoco_384.onnx``.
        input: A picture, a clip, or a folder of them.
        out: Folder for the results.
        detector: Run folder of a detector.
        boxes: JSON of file name → list of [x, y, width, height].
        sure: Lowest score of a detected person.
        threshold: Lowest score of a point that is drawn.
        picture: Whether to draw the people on a copy.
        black: Draw on black instead.
        openpose: Write the points in the order of ControlNet's preprocessors.
        keypoints: What the points are, when they are neither 17 nor 133.
    """
    network, size = open_onnx(model)
    device = torch.device("cpu")
    probe = network(torch.zeros(1, 3, size[1], size[0]))
    kinds = keypoints or kinds_of(probe.x.shape[1])
    poser = Poser(network, size, kinds, threshold=threshold, black=black, openpose=openpose)
    where = boxes_from(detector, boxes, sure, device)
    print(*poser.files([input], out, device, where, picture=picture), sep="\n")
    return None
