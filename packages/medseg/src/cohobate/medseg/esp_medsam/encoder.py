"""The two image encoders: TinyViT (student) and SAM's ViT (teacher), each with controllers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.models.tiny_vit import Attention, TinyVit, TinyVitBlock
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from cohobate.medseg.esp_medsam.controller import Controller, Controllers, check_modalities

STRIDE = 16  # pixels a position of the embedding


@dataclass(frozen=True)
class TinyViTSize:
    """Sizes of the student's encoder; the default is TinyViT-5M, as in MobileSAM.

    Args:
        embed_dims: Channels of the four stages.
        depths: Blocks of the four stages; the first is convolutional.
        num_heads: Attention heads of the four stages (the first has none).
        window_sizes: Side of the attention windows of the four stages.
    """

    embed_dims: tuple[int, int, int, int] = (64, 128, 160, 320)
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    num_heads: tuple[int, int, int, int] = (2, 4, 5, 10)
    window_sizes: tuple[int, int, int, int] = (7, 7, 14, 7)


@dataclass(frozen=True)
class ViTSize:
    """Sizes of the teacher's encoder; the default is SAM ViT-B.

    Args:
        hidden_size: Channels.
        num_hidden_layers: Blocks.
        num_attention_heads: Attention heads.
        window_size: Side of the attention windows.
        global_attn_indexes: Blocks that attend everywhere.
        image_size: Side of the image that the positions were learnt for; interpolated for others.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    window_size: int = 14
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    image_size: int = 1024


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(B, C, H, W)``, at each position."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; the shape stays."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ControlledAttention(Attention):
    """TinyViT's window attention to which a controller may add a key and a value."""

    attention_bias_idxs: Tensor

    def train(self, mode: bool = True) -> ControlledAttention:
        """As for any module; timm's own returns nothing."""
        super().train(mode)
        return self

    def forward(self, x: Tensor, controller: Controller | None = None) -> Tensor:
        """``(B, N, C) → (B, N, C)``, N the positions of a window."""
        # timm keeps this table per device in eval mode, also when the weights have changed
        bias = self.attention_biases[:, self.attention_bias_idxs]
        batch, count, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, count, self.num_heads, -1).transpose(1, 2)
        query, key, value = qkv.split([self.key_dim, self.key_dim, self.val_dim], -1)
        if controller is not None:
            key, value, bias = controller.extend(key, value, bias)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(y.transpose(1, 2).reshape(batch, count, self.out_dim))


class ControlledBlock(TinyVitBlock):
    """TinyViT's block: window attention, depth-wise convolution, MLP beside the expert.

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        window_size: Side of a window.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__(dim, num_heads, window_size)
        side = (window_size, window_size)
        self.attn = ControlledAttention(dim, dim // num_heads, num_heads, 1, side)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, controller: Controller | None = None) -> Tensor:
        """``(B, H, W, C) → (B, H, W, C)``."""
        windows, padded = partition(x, self.window_size)
        count = self.window_size**2
        windows = self.attn(windows.reshape(-1, count, x.shape[-1]), controller)
        x = x + unpartition(windows, self.window_size, padded, x.shape)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = x + self.mlp(x)
        return y if controller is None else y + controller.expert(x)


def partition(x: Tensor, window: int) -> tuple[Tensor, tuple[int, int]]:
    """Cut ``(B, H, W, C)`` into windows, padded with zeros on the right and below.

    Returns:
        Windows ``(B·n, window, window, C)``, and the padded height and width.
    """
    batch, height, width, channels = x.shape
    below, right = -height % window, -width % window
    if below or right:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    height, width = height + below, width + right
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window, window, channels), (height, width)


def unpartition(x: Tensor, window: int, padded: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """Undo `partition`; ``shape`` is that before the padding."""
    batch, height, width, channels = shape
    down, across = padded[0] // window, padded[1] // window
    x = x.view(batch, down, across, window, window, channels).transpose(2, 3)
    return x.reshape(batch, *padded, channels)[:, :height, :width]


class TinyViTEncoder(nn.Module):
    """TinyViT with stride 16, SAM's neck, and a controller per modality.

    Args:
        modalities: Names of the modalities that have a controller.
        width: Channels E of the embedding.
        size: Sizes of TinyViT.
        separate_kv: As for `Controller`.
    """

    def __init__(
        self,
        modalities: Iterable[str] = (),
        width: int = 256,
        size: TinyViTSize = TinyViTSize(),
        separate_kv: bool = False,
    ) -> None:
        super().__init__()
        vit: Any = TinyVit(num_classes=0, drop_path_rate=0.0, **asdict(size))
        del vit.head
        dims: list[tuple[int, int]] = []
        for stage, dim, heads, window in zip(
            list(vit.stages)[1:],
            size.embed_dims[1:],
            size.num_heads[1:],
            size.window_sizes[1:],
            strict=True,
        ):
            depth = len(stage.blocks)
            stage.blocks = nn.ModuleList(ControlledBlock(dim, heads, window) for _ in range(depth))
            dims += [(dim, heads)] * depth
        vit.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.vit: Any = vit
        self.neck = nn.Sequential(
            nn.Conv2d(size.embed_dims[-1], width, 1, bias=False),
            ChannelNorm(width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            ChannelNorm(width),
        )
        self._dims, self._separate_kv = dims, separate_kv
        self.controllers = Controllers()
        for name in check_modalities(modalities):
            self.add(name)

    def add(self, modality: str) -> None:
        """Give a modality its own controllers; nothing else changes."""
        self.controllers[modality] = nn.ModuleList(
            Controller(dim, heads, separate_kv=self._separate_kv) for dim, heads in self._dims
        )

    def forward(self, image: Tensor, modality: str | None = None) -> Tensor:
        """The embedding of images of one modality.

        Args:
            image: Normalised, ``(B, 3, H, W)``.
            modality: Whose controllers are used; ``None`` for none.

        Returns:
            ``(B, E, H / 16, W / 16)``.

        Raises:
            InputError: There is no such modality.
        """
        controllers = iter(self.controllers.of(modality, len(self._dims)))
        x = self.vit.stages[0](self.vit.patch_embed(image))
        for stage in list(self.vit.stages)[1:]:
            x = stage.downsample(x).permute(0, 2, 3, 1)
            for block in stage.blocks:
                x = block(x, next(controllers))
            x = x.permute(0, 3, 1, 2)
        return self.neck(x)


class SAMEncoder(nn.Module):
    """SAM's image encoder, to which controllers add tokens and adapters: the medical teacher.

    Args:
        modalities: Names of the modalities that have a controller.
        width: Channels E of the embedding.
        size: Sizes of the ViT.
        adapter_ratio: Hidden width of an adapter over the ViT's.
        separate_kv: As for `Controller`.

    Differences:
        The adapter's size is not published. The scheme is that of the student: one token a head
        and an adapter beside the MLP.
    """

    def __init__(
        self,
        modalities: Iterable[str] = (),
        width: int = 256,
        size: ViTSize = ViTSize(),
        adapter_ratio: float = 0.25,
        separate_kv: bool = False,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {**asdict(size), "output_channels": width}
        # SAM's own spread of initial weights, 1e-10, is for weights that are loaded afterwards
        self.vit = SamVisionEncoder(SamVisionConfig(**options, initializer_range=0.02))
        self._ratio, self._separate_kv = adapter_ratio, separate_kv
        self._dims = [(size.hidden_size, size.num_attention_heads)] * size.num_hidden_layers
        self.controllers = Controllers()
        for name in check_modalities(modalities):
            self.add(name)

    def add(self, modality: str) -> None:
        """Give a modality its own tokens and adapters; nothing else changes."""
        self.controllers[modality] = nn.ModuleList(
            Controller(dim, heads, self._ratio, self._separate_kv) for dim, heads in self._dims
        )

    def forward(self, image: Tensor, modality: str | None = None) -> Tensor:
        """The embedding, as `TinyViTEncoder.forward`; without a modality that of SAM itself."""
        controllers = self.controllers.of(modality, len(self._dims))
        x = self.vit.patch_embed.projection(image).permute(0, 2, 3, 1)
        if self.vit.pos_embed is not None:
            x = x + _resized(self.vit.pos_embed, x.shape[1:3])
        for layer, controller in zip(self.vit.layers, controllers, strict=True):
            x = _sam_layer(layer, x, controller)
        return self.vit.neck(x)


def _resized(positions: Tensor, size: Sequence[int]) -> Tensor:
    """Position embeddings ``(1, h, w, C)`` for another grid."""
    if positions.shape[1:3] == torch.Size(size):
        return positions
    grid = positions.permute(0, 3, 1, 2)
    return F.interpolate(grid, tuple(size), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


def _sam_layer(layer: Any, x: Tensor, controller: Controller | None) -> Tensor:
    """One block of SAM's ViT on ``(B, H, W, C)`` with a controller."""
    shortcut, shape = x, x.shape
    x = layer.layer_norm1(x)
    if layer.window_size > 0:
        x, padded = partition(x, layer.window_size)
    x = _sam_attention(layer.attn, x, controller)
    if layer.window_size > 0:
        x = unpartition(x, layer.window_size, padded, shape)
    x = shortcut + x
    y = x + layer.mlp(layer.layer_norm2(x))
    return y if controller is None else y + controller.expert(x)


def _sam_attention(attention: Any, x: Tensor, controller: Controller | None) -> Tensor:
    """SAM's attention with relative positions on ``(B, h, w, C)``, a controller's token added."""
    batch, height, width, channels = x.shape
    heads, count = attention.num_attention_heads, height * width
    qkv = attention.qkv(x).view(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    bias = query.new_zeros(heads, count, count)
    if attention.use_rel_pos:
        bias = attention.get_decomposed_rel_pos(
            query.reshape(batch * heads, count, -1),
            attention.rel_pos_h,
            attention.rel_pos_w,
            (height, width),
            (height, width),
        ).reshape(batch, heads, count, count)
    if controller is not None:
        key, value, bias = controller.extend(key, value, bias)
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attention.proj(y.transpose(1, 2).reshape(batch, height, width, channels))
