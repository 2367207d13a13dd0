"""Official checkpoints and Hub folders into this network, and back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.io import load_checkpoint, save_atomic
from cohobate.detection.d_fine.network import DFineNet
from cohobate.detection.weights import fill

Weights = dict[str, Tensor]

_RENAMED = (  # official name → transformers' name, applied in order
    (r"^backbone\.stem\.", "backbone.model.embedder."),
    (r"^backbone\.stages\.", "backbone.model.encoder.stages."),
    (r"^(backbone\..*)\.conv\.(?=weight$)", r"\1.convolution."),
    (r"^(backbone\..*)\.bn\.", r"\1.normalization."),
    (r"^(encoder|decoder)\.input_proj\.(\d+)\.conv\.", r"\1_input_proj.\2.0."),
    (r"^(encoder|decoder)\.input_proj\.(\d+)\.norm\.", r"\1_input_proj.\2.1."),
    (r"^encoder\.encoder\.", "encoder.aifi."),
    (r"^encoder\.downsample_convs\.(\d+)\.0\.cv", r"encoder.downsample_convs.\1.conv"),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\.cv1\.", r"\1.conv1."),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\.cv2\.0\.", r"\1.csp_rep1."),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\.cv2\.1\.", r"\1.conv2."),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\.cv3\.0\.", r"\1.csp_rep2."),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\.cv3\.1\.", r"\1.conv3."),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\.cv4\.", r"\1.conv4."),
    (r"^decoder\.(enc_output\.)proj\.", r"\g<1>0."),
    (r"^decoder\.(enc_output\.)norm\.", r"\g<1>1."),
    (r"^decoder\.(enc_score_head|enc_bbox_head|denoising_class_embed)\.", r"\1."),
    (r"^decoder\.dec_score_head\.", "decoder.class_embed."),
    (r"^decoder\.dec_bbox_head\.", "decoder.bbox_embed."),
    (r"^decoder\.decoder\.", "decoder."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.linear([12])\.", lambda m: f".mlp.layers.{int(m[1]) - 1}."),
    (r"(layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(layers\.\d+)\.norm[23]\.", r"\1.final_layer_norm."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
)
_CLASS_HEAD = re.compile(r"^(enc_score_head|decoder\.class_embed\.\d+)\.")
# where COCO's 80 classes, in their order, stand among the classes of Objects365
_COCO_IN_OBJECTS365 = (
    0, 46, 5, 58, 114, 55, 116, 65, 21, 40, 176, 127, 249, 24, 56, 139, 92, 78, 99, 96, 144, 295,
    178, 180, 38, 39, 13, 43, 120, 219, 148, 173, 165, 154, 137, 113, 145, 146, 204, 8, 35, 10, 88,
    84, 93, 26, 112, 82, 265, 104, 141, 152, 234, 143, 150, 97, 2, 50, 25, 75, 98, 153, 37, 73, 115,
    132, 106, 61, 163, 134, 277, 81, 133, 18, 94, 30, 169, 70, 328, 226,
)  # fmt: skip
_OBJECTS365 = 366  # rows of its released heads: ids from 1
# made anew from the input's size, or stored twice
_LEFT_OUT = re.compile(r"^decoder\.(anchors|valid_mask|up|reg_scale)$")
_SKIPPED = ("num_batches_tracked",)


def from_official(weights: Weights) -> Weights:
    """Rename an official state dict.

    Args:
        weights: Tensors by the official names.

    Returns:
        Tensors by the names in ``DFineNet.model``; query, key and value projections are split.
    """
    found: Weights = {}
    for name, tensor in weights.items():
        if _LEFT_OUT.match(name):
            continue
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)  # type: ignore[arg-type]
        if "in_proj_" in name:
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("in_proj_", f"{part}_proj.")] = value
        else:
            found[name] = tensor
    return found


def to_official(network: DFineNet) -> Weights:
    """The network's weights by the official names, without the anchors of one input size.

    Args:
        network: With ``fdr`` regression.
    """
    own = network.model.state_dict()
    found: Weights = {}
    for name, tensor in own.items():
        official = official_name(name)
        if "in_proj_" in official:
            if ".q_proj." in name:
                parts = [own[name.replace(".q_proj.", f".{p}_proj.")] for p in "qkv"]
                found[official] = torch.cat(parts)
        else:
            found[official] = tensor
    for name in ("up", "reg_scale"):
        found[f"decoder.{name}"] = found[f"decoder.decoder.{name}"]
    return found


def official_name(name: str) -> str:
    """The official name of a parameter of ``DFineNet.model``.

    Example:
        >>> official_name("decoder.layers.0.self_attn.k_proj.weight")
        'decoder.decoder.layers.0.self_attn.in_proj_weight'
    """
    for pattern, new in _BACK:
        name = re.sub(pattern, new, name)
    return name


_BACK: tuple[tuple[str, Any], ...] = (
    (r"^backbone\.model\.embedder\.", "backbone.stem."),
    (r"^backbone\.model\.encoder\.", "backbone."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".bn."),
    (r"^(encoder|decoder)_input_proj\.(\d+)\.0\.", r"\1.input_proj.\2.conv."),
    (r"^(encoder|decoder)_input_proj\.(\d+)\.1\.", r"\1.input_proj.\2.norm."),
    (r"^encoder\.aifi\.", "encoder.encoder."),
    (r"^encoder\.downsample_convs\.(\d+)\.conv(?=\d)", r"encoder.downsample_convs.\1.0.cv"),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\.conv1\.", r"\1.cv1."),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\.csp_rep1\.", r"\1.cv2.0."),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\.conv2\.", r"\1.cv2.1."),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\.csp_rep2\.", r"\1.cv3.0."),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\.conv3\.", r"\1.cv3.1."),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\.conv4\.", r"\1.cv4."),
    (r"^decoder\.(layers|lqe_layers|up|reg_scale)", r"decoder.decoder.\1"),
    (r"^(enc_output\.)0\.", r"decoder.\1proj."),
    (r"^(enc_output\.)1\.", r"decoder.\1norm."),
    (r"^(enc_score_head|enc_bbox_head|denoising_class_embed)\.", r"decoder.\1."),
    (r"^decoder\.class_embed\.", "decoder.dec_score_head."),
    (r"^decoder\.bbox_embed\.", "decoder.dec_bbox_head."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.mlp\.layers\.([01])\.", lambda m: f".linear{int(m[1]) + 1}."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"^(encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
    (r"\.final_layer_norm\.", ".norm3."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    (r"\.self_attn\.[qkv]_proj\.", ".self_attn.in_proj_"),
)


def read_weights(path: Path) -> Weights:
    """Read D-FINE weights from an official file or a Hub folder.

    Args:
        path: A ``.pth`` of the official code (its averaged weights are taken where it has them), a
            ``.safetensors`` of transformers, or a folder with ``model.safetensors``.

    Returns:
        Tensors by the names in ``DFineNet.model``.

    Raises:
        InputError: The file cannot be read or holds no D-FINE.
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    content: Any = load_checkpoint(file)
    for keys in (("ema", "module"), ("model",)):
        inner = content
        for key in keys:
            inner = inner.get(key, {}) if isinstance(inner, dict) else {}
        if isinstance(inner, dict) and inner:
            content = inner
            break
    weights = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if any(name.startswith("model.") for name in weights):  # transformers', heads stored once
        heads = ("class_embed.", "bbox_embed.")
        return {
            f"decoder.{name}" if name.startswith(heads) else name.removeprefix("model."): tensor
            for name, tensor in weights.items()
        }
    found = from_official(weights)
    if "enc_score_head.weight" not in found:
        raise InputError(f"{path}: holds no D-FINE weights")
    return found


def load_weights_into(network: DFineNet, path: Path, *, strict: bool = True) -> list[str]:
    """Fill a network from a file of `read_weights`.

    Args:
        network: The network.
        path: The file or folder.
        strict: Refuse the file when a tensor is missing or has another shape. Otherwise such
            tensors keep their initial values: that is how to fine-tune on other classes. Between
            Objects365 and COCO the class heads keep the rows of COCO's classes.

    Returns:
        Names of the network's tensors that were not filled.

    Raises:
        InputError: A tensor does not fit, or nothing does.
    """
    weights = read_weights(path)
    if not strict:
        weights |= _class_heads(weights, network.model.state_dict())
    return fill(network.model, weights, path, strict=strict, skipped=_SKIPPED)


def _class_heads(weights: Weights, own: Weights) -> Weights:
    """Class heads of Objects365 for COCO's classes, or the other way round."""
    rows = torch.tensor(_COCO_IN_OBJECTS365) + 1
    found: Weights = {}
    for name, given in weights.items():
        if name not in own or not _CLASS_HEAD.match(name):
            continue
        counts = len(given), len(own[name])
        if counts == (_OBJECTS365, len(rows)):
            found[name] = given[rows]
        elif counts == (len(rows), _OBJECTS365):
            found[name] = own[name].clone().index_copy_(0, rows, given.to(own[name]))
    return found


def save_official(network: DFineNet, path: Path) -> Path:
    """Write a ``.pth`` that the official code resumes or evaluates.

    Args:
        network: With ``fdr`` regression.
        path: The file.
    """
    weights = to_official(network)
    with save_atomic(path) as temporary:
        torch.save({"model": weights, "ema": {"module": weights}}, temporary)
    return path


def save_hub(network: DFineNet, folder: Path, names: dict[int, str]) -> list[Path]:
    """Write a folder that ``DFineForObjectDetection.from_pretrained`` loads.

    Args:
        network: With ``fdr`` regression.
        folder: The folder.
        names: Class index → name.
    """
    weights = {f"model.{k}": v.detach().cpu() for k, v in network.model.state_dict().items()}
    weights = {k: v.contiguous().clone() for k, v in weights.items()}
    config = network.config.to_dict() | {
        "architectures": ["DFineForObjectDetection"],
        "id2label": {str(k): v for k, v in names.items()},
        "label2id": {v: k for k, v in names.items()},
    }
    files = [folder / "model.safetensors", folder / "config.json"]
    with save_atomic(files[0]) as temporary:
        temporary.write_bytes(save(weights, metadata={"format": "pt"}))
    with save_atomic(files[1]) as temporary:
        temporary.write_text(json.dumps(config, indent=2, default=list) + "\n")
    return files
