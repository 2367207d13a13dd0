"""The sizes of D-FINE as configurations of transformers' network."""

from __future__ import annotations

from typing import Any, Literal

from transformers import DFineConfig, HGNetV2Config

from cohobate.core.errors import InputError

Size = Literal["n", "s", "m", "l", "x", "tiny"]

_STAGES = {  # the stem's channels, then (in, mid, out, blocks) of each stage, layers a block
    "b0": (
        (3, 16, 16),
        ((16, 16, 64, 1), (64, 32, 256, 1), (256, 64, 512, 2), (512, 128, 1024, 1)),
        3,
    ),
    "b2": (
        (3, 24, 32),
        ((32, 32, 96, 1), (96, 64, 384, 1), (384, 128, 768, 3), (768, 256, 1536, 1)),
        4,
    ),
    "b4": (
        (3, 32, 48),
        ((48, 48, 128, 1), (128, 96, 512, 1), (512, 192, 1024, 3), (1024, 384, 2048, 1)),
        6,
    ),
    "b5": (
        (3, 32, 64),
        ((64, 64, 128, 1), (128, 128, 512, 2), (512, 256, 1024, 5), (1024, 512, 2048, 2)),
        6,
    ),
    "tiny": ((3, 16, 16), ((16, 16, 32, 1), (32, 24, 64, 1), (64, 32, 96, 1)), 2),
}

_SIZES: dict[str, dict[str, Any]] = {
    "n": {
        "backbone": "b0", "strides": (16, 32), "encoder": (128, 512), "decoder": (128, 512),
        "hidden_expansion": 0.34, "depth_mult": 0.5, "decoder_layers": 3, "points": [6, 6],
    },
    "s": {
        "backbone": "b0", "encoder": (256, 1024), "hidden_expansion": 0.5, "depth_mult": 0.34,
        "decoder_layers": 3,
    },
    "m": {"backbone": "b2", "encoder": (256, 1024), "depth_mult": 0.67, "decoder_layers": 4},
    "l": {"backbone": "b4", "encoder": (256, 1024)},
    "x": {"backbone": "b5", "encoder": (384, 2048), "reg_scale": 8.0},
    "tiny": {
        "backbone": "tiny", "strides": (8, 16), "encoder": (64, 128), "decoder": (64, 128),
        "hidden_expansion": 0.5, "depth_mult": 0.34, "decoder_layers": 3, "points": [4, 4],
    },
}  # fmt: skip


def config_of(
    size: Size, num_classes: int, *, num_queries: int = 300, decoder_layers: int | None = None
) -> DFineConfig:
    """A size's configuration.

    Args:
        size: ``n``, ``s``, ``m``, ``l``, ``x`` of the paper, or ``tiny`` (half a million
            parameters, strides 8 and 16) for small images on a CPU.
        num_classes: C.
        num_queries: Q.
        decoder_layers: L; by default the size's.

    Raises:
        InputError: A number is out of range.
    """
    if num_classes < 1 or num_queries < 1 or (decoder_layers is not None and decoder_layers < 1):
        raise InputError("D-FINE needs at least one class, one query and one decoder layer")
    about = dict(_SIZES[size])
    backbone, (hidden, ffn) = str(about.pop("backbone")), about.pop("encoder")
    strides = list(about.pop("strides", (8, 16, 32)))
    width, decoder_ffn = about.pop("decoder", (256, 1024))
    levels = len(strides)
    channels = [stage[2] for stage in _STAGES[backbone][1]][-levels:]
    options: dict[str, Any] = {
        "backbone_config": _backbone(backbone, levels),
        "freeze_backbone_batch_norms": size in ("l", "x"),
        "initializer_bias_prior_prob": 0.01,
        "num_labels": num_classes,
        "num_queries": num_queries,
        "decoder_layers": decoder_layers or about.pop("decoder_layers", 6),
        "feat_strides": strides,
        "num_feature_levels": levels,
        "encoder_in_channels": channels,
        "encode_proj_layers": [levels - 1],
        "encoder_hidden_dim": hidden,
        "encoder_ffn_dim": ffn,
        "decoder_in_channels": [hidden] * levels,
        "d_model": width,
        "decoder_ffn_dim": decoder_ffn,
        "decoder_n_points": about.pop("points", [3, 6, 3]),
        **{k: v for k, v in about.items() if k != "decoder_layers"},
    }
    return DFineConfig(**options)


def _backbone(name: str, levels: int) -> HGNetV2Config:
    stem, stages, layers = _STAGES[name]
    options: dict[str, Any] = {
        key: [stage[place] for stage in stages]
        for place, key in enumerate(("stage_in_channels", "stage_mid_channels",
                                     "stage_out_channels", "stage_num_blocks"))
    }  # fmt: skip
    options["out_indices"] = list(range(1, len(stages) + 1))[-levels:]
    return HGNetV2Config(
        stem_channels=list(stem),
        embedding_size=stem[2],
        hidden_sizes=options["stage_out_channels"],
        depths=[3, 4, 6, 3][: len(stages)],
        stage_downsample=[False, True, True, True][: len(stages)],
        stage_light_block=[False, False, True, True][: len(stages)],
        stage_kernel_size=[3, 3, 5, 5][: len(stages)],
        stage_numb_of_layers=[layers] * len(stages),
        use_learnable_affine_block=name not in ("b4", "b5"),
        **options,
    )
