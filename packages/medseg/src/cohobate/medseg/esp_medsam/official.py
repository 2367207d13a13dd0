"""The released checkpoints' names and ours: a network out of them, and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.io import fitting_weights, load_weights, save_atomic
from cohobate.medseg.esp_medsam.encoder import TinyViTEncoder
from cohobate.medseg.esp_medsam.network import MaskDecoder, Network, PatchPrompt

MODALITIES = ("dermoscopy", "xray", "ultrasound", "fundus", "microscopy", "colonoscopy")
"""The official query indices 0 to 5 by name."""

# Tensors of the official layout that take no part in its forward pass, with their shapes.
UNUSED = {
    "SemiTViT.norm_head.weight": (320,),
    "SemiTViT.norm_head.bias": (320,),
    "SemiTViT.head.weight": (1000, 320),
    "SemiTViT.head.bias": (1000,),
    **{f"prompt_encoder.point_embeddings.{i}.weight": (1, 256) for i in range(4)},
    "prompt_encoder.not_a_point_embed.weight": (1, 256),
    "prompt_encoder.no_mask_embed.weight": (1, 256),
    "prompt_encoder.mask_downscaling.0.weight": (4, 1, 2, 2),
    "prompt_encoder.mask_downscaling.0.bias": (4,),
    "prompt_encoder.mask_downscaling.1.weight": (4,),
    "prompt_encoder.mask_downscaling.1.bias": (4,),
    "prompt_encoder.mask_downscaling.3.weight": (16, 4, 2, 2),
    "prompt_encoder.mask_downscaling.3.bias": (16,),
    "prompt_encoder.mask_downscaling.4.weight": (16,),
    "prompt_encoder.mask_downscaling.4.bias": (16,),
    "prompt_encoder.mask_downscaling.6.weight": (256, 16, 1, 1),
    "prompt_encoder.mask_downscaling.6.bias": (256,),
}

_BLOCKS = [f"{stage}.blocks.{i}" for stage, depth in ((1, 2), (2, 6), (3, 2)) for i in range(depth)]
_MEDICAL = (
    ("attn.deep_QKV_embeddings_med", "token"),
    ("attn.med_attention_biases", "bias"),
    ("med_dah.{}", "expert.{}"),
)
_LAYERS = "decoder.transformer.layers"
# Official name and ours, {} for what they have in common; the first pair that fits is used.
_PAIRS = (
    ("SemiTViT.patch_embed.seq.0.{}", "encoder.vit.patch_embed.conv1.{}"),
    ("SemiTViT.patch_embed.seq.2.{}", "encoder.vit.patch_embed.conv2.{}"),
    # a patch merging stands at the end of the stage before it in the official names
    *(
        (f"SemiTViT.layers.{i}.downsample.{{}}", f"encoder.vit.stages.{i + 1}.downsample.{{}}")
        for i in range(3)
    ),
    # the attention blocks of stages 1 to 3 are numbered through
    *(
        (f"SemiTViT.layers.{block}.{theirs}", f"encoder.controllers.@.{place}.{ours}")
        for place, block in enumerate(_BLOCKS)
        for theirs, ours in _MEDICAL
    ),
    ("SemiTViT.layers.{}", "encoder.vit.stages.{}"),
    ("SemiTViT.neck.{}", "encoder.neck.{}"),
    ("patch_decoder.{}", "prompter.patches.{}"),
    ("dense_prompter.{}", "prompter.prompt.{}"),
    ("mask_query.weight", "decoder.queries"),
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "decoder.fourier"),
    ("mask_decoder.output_upscaling.{}", "decoder.upscaling.{}"),
    ("mask_decoder.output_hypernetworks_mlps.0.layers.0.{}", "decoder.mlps.@.proj_in.{}"),
    ("mask_decoder.output_hypernetworks_mlps.0.layers.1.{}", "decoder.mlps.@.layers.0.{}"),
    ("mask_decoder.output_hypernetworks_mlps.0.layers.2.{}", "decoder.mlps.@.proj_out.{}"),
    ("mask_decoder.transformer.norm_final_attn.{}", "decoder.transformer.layer_norm_final_attn.{}"),
    *(
        (f"mask_decoder.transformer.layers.{i}.norm{n}.{{}}", f"{_LAYERS}.{i}.layer_norm{n}.{{}}")
        for i in range(2)
        for n in range(1, 5)
    ),
    ("mask_decoder.transformer.{}", "decoder.transformer.{}"),
)


def load_official(file: Path, modality: str) -> tuple[Network, dict[str, Tensor]]:
    """Make a network of a released single-modality checkpoint.

    Args:
        file: The checkpoint.
        modality: What it was trained for, one of `MODALITIES`.

    Returns:
        The network, in eval mode, whose only modality is that; and the file's tensors that its
        forward pass does not use, for `save_official`.

    Raises:
        InputError: The file cannot be read, or a name or shape does not fit.
    """
    if modality not in MODALITIES:
        raise InputError(f"modality '{modality}': the released ones are {', '.join(MODALITIES)}")
    weights = load_weights(file)
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    network = official_network(modality)
    unused = {name: weights.pop(name) for name in UNUSED if name in weights}
    renamed = {our_name(name, modality): tensor for name, tensor in weights.items()}
    network.load_state_dict(fitting_weights(network, renamed, file))
    return network.eval(), unused


def save_official(
    network: Network, modality: str, file: Path, unused: dict[str, Tensor] | None = None
) -> None:
    """Write one modality of a network in the released layout.

    Args:
        network: A network of the official sizes.
        modality: Which modality; in the official layout its query has the index of `MODALITIES`.
        file: The file, for ``torch.load``.
        unused: Tensors of the layout that the forward pass does not use; zeros when not given.

    Raises:
        InputError: The network has other sizes, or the modality is none of the official ones.
    """
    if modality not in MODALITIES:
        raise InputError(f"modality '{modality}': the layout has {', '.join(MODALITIES)}")
    state = dict(one_modality(network, modality))
    like = official_network(modality)
    fitting_weights(like, state, file)
    weights = {official_name(name, modality): tensor for name, tensor in state.items()}
    weights |= {name: torch.zeros(shape) for name, shape in UNUSED.items()} | (unused or {})
    with save_atomic(file) as temporary:
        torch.save(weights, temporary)


def one_modality(network: Network, modality: str) -> Iterator[tuple[str, Tensor]]:
    """A network's tensors without those of other modalities, its queries in the official order."""
    decoder = network.decoder
    for name, tensor in network.state_dict().items():
        part, _, rest = name.removeprefix("encoder.").removeprefix("decoder.").partition(".")
        if part in ("controllers", "mlps") and rest.split(".")[0] != modality:
            continue
        if part == "own_queries":
            raise InputError(f"{modality}: a modality with a query of its own has no official slot")
        if name == "decoder.queries":
            tensor = _official_queries(decoder, tensor)
        yield name, tensor


def _official_queries(decoder: MaskDecoder, queries: Tensor) -> Tensor:
    if tuple(decoder.slots) != MODALITIES:
        raise InputError(
            f"the network's queries are those of {', '.join(decoder.slots)}; they attend to each "
            f"other, so the official layout needs those of {', '.join(MODALITIES)}"
        )
    return queries


def official_network(modality: str) -> Network:
    """A network of the official sizes with one modality, weights as initialised."""
    return Network(
        TinyViTEncoder([modality]), PatchPrompt(), MaskDecoder([modality], slots=MODALITIES)
    )


def load_mobile_sam(encoder: TinyViTEncoder, file: Path) -> None:
    """Take the shared weights of the encoder from a MobileSAM or TinyViT checkpoint.

    Args:
        encoder: Of MobileSAM's sizes; controllers stay as they are.
        file: With names ``image_encoder.*`` (MobileSAM), ``SemiTViT.*``, or those of MobileSAM's
            encoder alone.

    Raises:
        InputError: The file cannot be read, or a name or shape does not fit.
    """
    weights = load_weights(file)
    for prefix in ("image_encoder.", "SemiTViT."):
        chosen = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
        weights = chosen or weights
    renamed = {}
    for name, tensor in weights.items():
        ours = our_name(f"SemiTViT.{name}", "")
        if f"SemiTViT.{name}" not in UNUSED and not ours.startswith("encoder.controllers."):
            renamed[ours.removeprefix("encoder.").removeprefix("SemiTViT.")] = tensor
    own = {n: t for n, t in encoder.state_dict().items() if n.startswith("controllers.")}
    encoder.load_state_dict(fitting_weights(encoder, {**own, **renamed}, file))


def our_name(name: str, modality: str) -> str:
    """The name that an official tensor has here; another name stays as it is.

    Args:
        name: In a released checkpoint.
        modality: What the checkpoint is for.

    Example:
        >>> our_name("SemiTViT.layers.0.downsample.conv2.c.weight", "ultrasound")
        'encoder.vit.stages.1.downsample.conv2.conv.weight'
        >>> our_name("SemiTViT.layers.1.blocks.1.attn.med_attention_biases", "ultrasound")
        'encoder.controllers.ultrasound.1.bias'
    """
    for theirs, ours in _PAIRS:
        if (renamed := _renamed(name, theirs, ours)) is not None:
            return renamed.replace(".c.", ".conv.").replace(".@.", f".{modality}.")
    return name


def official_name(name: str, modality: str) -> str:
    """The official name of one of our tensors; the other way round than `our_name`.

    Example:
        >>> official_name("decoder.transformer.layers.0.layer_norm2.bias", "ultrasound")
        'mask_decoder.transformer.layers.0.norm2.bias'
    """
    name = name.replace(f".{modality}.", ".@.")
    for theirs, ours in _PAIRS:
        if (renamed := _renamed(name, ours, theirs)) is not None:
            return renamed.replace(".conv.", ".c.")
    return name


def _renamed(name: str, pattern: str, replacement: str) -> str | None:
    before, hole, after = pattern.partition("{}")
    if not hole:
        return replacement if name == pattern else None
    if not (name.startswith(before) and name.endswith(after)):
        return None
    return replacement.replace("{}", name[len(before) :])
