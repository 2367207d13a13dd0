"""The released checkpoint's layout (``macil_sd.pkl``, a plain state dict), read and written."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cohobate.avviolence.macil_sd.network import AudioVisualNet, VisualNet
from cohobate.core.errors import InputError
from cohobate.core.io import fitting_weights, load_weights, save_atomic

OFFICIAL_EXTRACTORS = {"visual": "i3d", "audio": "vggish"}
"""Features that the released weights were trained on."""

_MODULES = {
    "fc_v": "fc_v",
    "fc_a": "fc_a",
    "layer.query": "cma.layer.self_attn.linears.0",
    "layer.key": "cma.layer.self_attn.linears.1",
    "layer.value": "cma.layer.self_attn.linears.2",
    "layer.output": "cma.layer.self_attn.linears.3",
    "layer.w_1": "cma.layer.feed_forward.w_1",
    "layer.w_2": "cma.layer.feed_forward.w_2",
    "layer.norm_attention": "cma.layer.sublayer.0.norm",
    "layer.norm_ffn": "cma.layer.sublayer.1.norm",
    "head": "att_mmil.fc",
}


def official_names(visual_only: bool = False) -> dict[str, str]:
    """Parameter names of this package to those of the released code.

    Args:
        visual_only: Names of the visual-only network, whose head is called ``fc`` there.
    """
    modules = dict(_MODULES, head="fc") if visual_only else _MODULES
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in modules.items()
        if not (visual_only and ours == "fc_a")
        for kind in ("weight", "bias")
    }


def network_of(weights: dict[str, Tensor], source: Path, *, heads: int = 4) -> AudioVisualNet:
    """Build the audio-visual network that official weights are for, sized by their shapes.

    Args:
        weights: Tensors by official names. Those that no forward pass reads (``multiheadattn.*``,
            ``feedforward.*``, ``cma.layer.self_attn.layer_norm.*``) may be there.
        source: The file, for messages.
        heads: Attention heads, which shapes do not tell.

    Raises:
        InputError: A live tensor is missing, or one has no place in the network.
    """
    names = official_names()
    for theirs in names.values():
        if theirs not in weights:
            raise InputError(f"{source}: no weights for {theirs}")
    hidden, visual_width = weights["fc_v.weight"].shape
    network = AudioVisualNet(
        visual_width,
        weights["fc_a.weight"].shape[1],
        hidden=hidden,
        heads=heads,
        ffn=len(weights["cma.layer.feed_forward.w_1.weight"]),
    )
    for name in weights:
        if name not in names.values() and name not in dead_shapes(network):
            raise InputError(f"{source}: {name} is not part of a MACIL-SD checkpoint")
    ours = {mine: weights[theirs] for mine, theirs in names.items()}
    network.load_state_dict(fitting_weights(network, ours, source))
    return network


def load_official(path: Path) -> AudioVisualNet:
    """Read a checkpoint in the released layout, as data.

    Args:
        path: ``macil_sd.pkl`` or a file written by `save_official`.

    Raises:
        InputError: The file cannot be read, or is not such a checkpoint.
    """
    weights = {name.removeprefix("module."): w for name, w in load_weights(path).items()}
    return network_of(weights, path)


def is_official(weights: dict[str, Tensor]) -> bool:
    """Whether a state dict has the released layout."""
    return any(name.removeprefix("module.").startswith("att_mmil.") for name in weights)


def save_official(network: AudioVisualNet, path: Path) -> None:
    """Write a network in the released layout, so that the released code loads it strictly.

    Args:
        network: What to write.
        path: Target, by custom ``.pkl``; dead tensors are written as zeros.
    """
    own = network.state_dict()
    live = {theirs: own[mine].cpu() for mine, theirs in official_names().items()}
    dead = {name: torch.zeros(shape) for name, shape in dead_shapes(network).items()}
    with save_atomic(path) as temporary:
        torch.save({**dead, **live}, temporary)


def dead_shapes(network: AudioVisualNet | VisualNet) -> dict[str, tuple[int, ...]]:
    """Tensors of the released state dict that no forward pass reads, by official name."""
    hidden, ffn = network.fc_v.out_features, network.layer.w_1.out_features
    linear = {"weight": (hidden, hidden), "bias": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {
        f"multiheadattn.linears.{i}.{kind}": s for i in range(4) for kind, s in linear.items()
    }
    for place in ("multiheadattn.layer_norm", "cma.layer.self_attn.layer_norm"):
        shapes |= {f"{place}.weight": (hidden,), f"{place}.bias": (hidden,)}
    shapes |= {"feedforward.w_1.weight": (ffn, hidden), "feedforward.w_1.bias": (ffn,)}
    return shapes | {"feedforward.w_2.weight": (hidden, ffn), "feedforward.w_2.bias": (hidden,)}


def count_parameters(network: AudioVisualNet | VisualNet) -> dict[str, int]:
    """Parameters that a forward pass uses (``live``) and as the released code counts them.

    Example:
        >>> count_parameters(AudioVisualNet())
        {'live': 247425, 'official': 347009}
    """
    live = sum(p.numel() for p in network.parameters())
    dead = sum(torch.Size(shape).numel() for shape in dead_shapes(network).values())
    return {"live": live, "official": live + dead}
