"""Commands of this package beside the common ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from cohobate.core.errors import InputError
from cohobate.core.io import write_json
from cohobate.core.runs import load_run, make_run
from cohobate.detection.d_fine import DFine
from cohobate.detection.d_fine.checkpoint import load_weights_into, save_hub, save_official
from cohobate.detection.d_fine.serving import to_onnx
from cohobate.detection.d_fine.sizes import Size
from cohobate.detection.data.annotations import Category
from cohobate.detection.data.coco import COCO_CATEGORIES
from cohobate.detection.dwpose.commands import give_pose, pose, take_pose


def take(file: Path, variant: Size, out: Path, names: Path | None = None) -> int | None:
    """Make a run folder of released D-FINE weights, for predict, validate and export.

    Args:
        file: An official ``.pth``, or a folder of the Hub.
        variant: Size of the network.
        out: The run folder.
        names: A COCO JSON with the categories; by default a Hub folder's own, else COCO's 80.
    """
    categories = _categories(file, names)
    model = DFine(categories=categories, size=640, variant=variant)
    load_weights_into(model.network, file)
    options = {"variant": variant, "size": 640, "categories": [asdict(c) for c in categories]}
    config = {"class_path": "cohobate.detection.d_fine.DFine", "init_args": options}
    data = {"class_path": "cohobate.detection.data.DetectionData", "init_args": {}}
    make_run(out, model.state_dict(), config, data)
    print(f"{out}: {sum(p.numel() for p in model.network.parameters()):,} parameters")
    return None


def give(run: Path, out: Path) -> int | None:
    """Write a run's D-FINE for other programs; the suffix of ``out`` says for which.

    ``.onnx``: the form for inference with what comes after the network, checked in ONNX Runtime.
    ``.pth``: the official code's names. No suffix: a folder that transformers loads.

    Args:
        run: A run folder, or a checkpoint in one.
        out: A file, or a folder.
    """
    model = load_run(run)
    if not isinstance(model, DFine):
        raise InputError(f"{run}: not a run of detection/d-fine")
    if out.suffix == ".onnx":
        to_onnx(model.network, model.size, out)
        found = {"size": model.size, "categories": [asdict(c) for c in model.categories]}
        print(f"{out}\n{write_json(out.with_suffix('.json'), found)}")
        return None
    if model.network.regression != "fdr":
        raise InputError(
            f"{run}: plain regression, which neither the official code nor the Hub has"
        )
    if out.suffix == ".pth":
        print(save_official(model.network, out))
    elif out.suffix:
        raise InputError(f"{out}: ends in none of .onnx, .pth, and is no folder")
    else:
        names = dict(enumerate(c.name for c in model.categories))
        print(*save_hub(model.network, out, names), sep="\n")
    return None


def _categories(file: Path, names: Path | None) -> list[Category]:
    source = names or file / "config.json"
    if names is None and not source.exists():
        return list(COCO_CATEGORIES)
    try:
        content = json.loads(source.read_text())
        if names is None:
            return [Category(int(k), str(v)) for k, v in content["id2label"].items()]
        listed = [Category(int(c["id"]), str(c["name"])) for c in content["categories"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{source}: no categories found in it: {error}") from None
    return sorted(listed, key=lambda c: c.id)


COMMANDS: tuple[Callable[..., int | None], ...] = (take, give, take_pose, give_pose, pose)
