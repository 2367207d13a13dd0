"""Self-prompting segmentation: patch prompts and the query-decoupled decoder on an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import (
    SamFeedForward,
    SamPositionalEmbedding,
    SamTwoWayTransformer,
)

from cohobate.core.errors import InputError
from cohobate.medseg.esp_medsam.controller import check_modalities, unknown_modality
from cohobate.medseg.esp_medsam.encoder import STRIDE, ChannelNorm, SAMEncoder, TinyViTEncoder

Sharing = Literal["modality", "shared", "none"]
SHARED = "shared"  # name of the controllers that all modalities share
PATCH = 32  # pixels a side of a patch that the prompt speaks of


@dataclass(frozen=True)
class DecoderSize:
    """Sizes of the decoder beside its width.

    Args:
        num_heads: Attention heads of the two-way transformer.
        mlp_dim: Hidden width of its MLP.
        depth: Its blocks.
        patch_dim: Hidden channels of the patch-prompt generator.
    """

    num_heads: int = 8
    mlp_dim: int = 2048
    depth: int = 2
    patch_dim: int = 64


class Outputs(NamedTuple):
    """What the network gives.

    Attributes:
        masks: Mask logits ``(B, 1, H, W)``.
        patches: Logits of the patches ``(B, 1, H / 32, W / 32)``.
        embedding: The encoder's embedding ``(B, E, H / 16, W / 16)``.
    """

    masks: Tensor
    patches: Tensor
    embedding: Tensor


class PatchPrompt(nn.Module):
    """Self-patch prompt generator (SPPG): which 32 × 32 patches hold foreground, as a dense prompt.

    Args:
        width: Channels E of the embedding.
        hidden: Channels inside.

    References:
        Xu et al., arXiv 2407.14153, self-patch prompt generator.
    """

    def __init__(self, width: int = 256, hidden: int = 64) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(width, hidden, 2, stride=2),
            ChannelNorm(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, 1, 1),
        )
        self.prompt = nn.Sequential(nn.Conv2d(1, width, 1), ChannelNorm(width), nn.GELU())

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Patch logits and the prompt made of them.

        The prompt is cut off from the gradient: only the patches' own loss trains the patches.

        Args:
            embedding: ``(B, E, h, w)``.

        Returns:
            Logits ``(B, 1, h / 2, w / 2)`` and a dense prompt ``(B, E, h, w)``.
        """
        logits = self.patches(embedding)
        chosen = (logits.detach() >= 0).to(embedding.dtype)  # sigmoid ≥ 0.5
        return logits, self.prompt(F.interpolate(chosen, scale_factor=2, mode="nearest"))


class MaskDecoder(nn.Module):
    """Query-decoupled modality decoder (QDMD): a learned query and an MLP per modality.

    All queries of ``slots`` and a free one attend together. A modality beyond the slots, added
    later, brings its own query, which takes part for that modality alone: the masks of the others
    stay as they were.

    Args:
        modalities: Names of the modalities that have a mask.
        slots: Names of the queries that attend together; default ``modalities``.
        width: Channels E of the embedding.
        size: Other sizes.

    References:
        Xu et al., arXiv 2407.14153, query-decoupled modality decoder.

    Differences:
        An MLP per modality as the paper's figure has it; the released code has a single one.
    """

    def __init__(
        self,
        modalities: Iterable[str],
        slots: Sequence[str] | None = None,
        width: int = 256,
        size: DecoderSize = DecoderSize(),
    ) -> None:
        super().__init__()
        names = check_modalities(modalities)
        self.slots = check_modalities(names if slots is None else slots)
        self.width = width
        config = SamMaskDecoderConfig(
            hidden_size=width,
            num_hidden_layers=size.depth,
            num_attention_heads=size.num_heads,
            mlp_dim=size.mlp_dim,
            layer_norm_eps=1e-5,  # transformers' default is 1e-6
        )
        config._attn_implementation = "sdpa"
        self.transformer = SamTwoWayTransformer(config)
        positions = SamPositionalEmbedding(_PositionConfig(width // 2))
        # the Fourier matrix is never trained, so it is a buffer and no parameter
        self.fourier: Tensor
        self.register_buffer("fourier", positions.positional_embedding.detach().clone())
        self.upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, stride=2),
            ChannelNorm(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, stride=2),
            nn.GELU(),
        )
        self.queries = nn.Parameter(torch.randn(len(self.slots) + 1, width))
        self.own_queries = nn.ParameterDict()
        self.mlps = nn.ModuleDict()
        for name in names:
            self.add(name)

    def add(self, modality: str) -> None:
        """Give a modality an MLP, and a query when it has no slot."""
        self.mlps[modality] = SamFeedForward(self.width, self.width, self.width // 8, 3)
        if modality not in self.slots:
            self.own_queries[modality] = nn.Parameter(torch.randn(self.width))

    def forward(self, embedding: Tensor, modality: str) -> Tensor:
        """Masks of one modality.

        Args:
            embedding: With the prompt added, ``(B, E, h, w)``.
            modality: Which mask.

        Returns:
            Logits ``(B, 1, 4h, 4w)``.

        Raises:
            InputError: There is no such modality.
        """
        if modality not in self.mlps:
            raise unknown_modality(modality, self.mlps)
        queries: Tensor = self.queries
        place = len(queries)
        if modality in self.own_queries:
            queries = torch.cat([queries, self.own_queries[modality][None]])
        else:
            place = self.slots.index(modality)
        batch, _, height, width = embedding.shape
        tokens, keys = self.transformer(
            point_embeddings=queries.expand(batch, 1, -1, -1),
            image_embeddings=embedding,
            image_positional_embeddings=self.positions(height, width).to(embedding.dtype),
            attention_similarity=None,
        )
        grid = keys[:, 0].transpose(1, 2).reshape(batch, self.width, height, width)
        kernel = self.mlps[modality](tokens[:, 0, place])
        return torch.einsum("bc,bchw->bhw", kernel, self.upscaling(grid))[:, None]

    def positions(self, height: int, width: int) -> Tensor:
        """Random Fourier features of a grid's positions, ``(1, E, height, width)``.

        References:
            Kirillov et al., Segment anything, arXiv 2304.02643.
        """
        like = self.fourier
        y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
        places = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)  # (height, width, xy)
        angles = 2 * torch.pi * ((2 * places - 1) @ like)
        return torch.cat([angles.sin(), angles.cos()], -1).permute(2, 0, 1)[None]


@dataclass
class _PositionConfig:
    """What `SamPositionalEmbedding` reads."""

    num_pos_feats: int
    scale: float = 1.0


class Network(nn.Module):
    """Encoder, patch prompt and decoder: the teacher with SAM's encoder, the student with TinyViT.

    Args:
        encoder: Images to an embedding of E channels.
        prompter: The patch prompt.
        decoder: The masks.
        controllers: Whether each modality has its own controllers in the encoder, all share those
            named ``shared``, or there is none.
    """

    def __init__(
        self,
        encoder: TinyViTEncoder | SAMEncoder,
        prompter: PatchPrompt,
        decoder: MaskDecoder,
        controllers: Sharing = "modality",
    ) -> None:
        super().__init__()
        self.encoder, self.prompter, self.decoder = encoder, prompter, decoder
        self.controllers = controllers

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities that have a mask."""
        return list(self.decoder.mlps)

    def own_parts(self, modality: str) -> list[nn.Module | nn.Parameter]:
        """What belongs to one modality alone."""
        decoder = self.decoder
        parts: list[nn.Module | nn.Parameter] = [decoder.mlps[modality]]
        if modality in self.encoder.controllers:
            parts.append(self.encoder.controllers[modality])
        if modality in decoder.own_queries:
            parts.append(decoder.own_queries[modality])
        return parts

    def forward(
        self, image: Tensor, modality: str | Sequence[str] | None = None, prompted: bool = True
    ) -> Outputs:
        """Segment images.

        Args:
            image: Normalised, ``(B, 3, H, W)``; H and W divisible by 32.
            modality: One for all images, or one for each; default the network's first.
            prompted: Whether the prompt is added to the embedding.

        Raises:
            InputError: A size is not divisible by 32, or a modality is unknown.
        """
        names = self.modalities[0] if modality is None else modality
        return self.decode(self.embed(image, names), names, prompted)

    def embed(self, image: Tensor, modality: str | Sequence[str]) -> Tensor:
        """The embedding ``(B, E, H / 16, W / 16)`` of images, as for `forward`."""
        check_size(image)
        return self._grouped(self._embed, image, modality)[0]

    def decode(
        self, embedding: Tensor, modality: str | Sequence[str], prompted: bool = True
    ) -> Outputs:
        """Masks and patches of embeddings ``(B, E, h, w)``, as for `forward`."""
        patches, prompt = self.prompter(embedding)
        (low,) = self._grouped(
            lambda x, name: (self.decoder(x, name),),
            embedding + prompt if prompted else embedding,
            modality,
        )
        size = [STRIDE * n for n in embedding.shape[2:]]
        masks = F.interpolate(low, size, mode="bilinear", align_corners=False)
        return Outputs(masks, patches, embedding)

    def _embed(self, image: Tensor, modality: str) -> tuple[Tensor]:
        if modality not in self.decoder.mlps:
            raise unknown_modality(modality, self.decoder.mlps)
        names = {"modality": modality, "shared": SHARED, "none": None}
        return (self.encoder(image, names[self.controllers]),)

    @staticmethod
    def _grouped(
        ask: Callable[[Tensor, str], tuple[Tensor, ...]], x: Tensor, modality: str | Sequence[str]
    ) -> tuple[Tensor, ...]:
        """Ask for the images of each modality together: a loop over modalities, not images."""
        if isinstance(modality, str):
            return ask(x, modality)
        if len(modality) != len(x):
            raise InputError(f"modality: {len(modality)} names for {len(x)} images")
        names = sorted(set(modality))
        if len(names) == 1:
            return ask(x, names[0])
        groups = [
            torch.tensor([i for i, m in enumerate(modality) if m == name], device=x.device)
            for name in names
        ]
        parts = [ask(x[group], name) for name, group in zip(names, groups, strict=True)]
        back = torch.cat(groups).argsort()
        return tuple(torch.cat(tensors)[back] for tensors in zip(*parts, strict=True))


class OneModality(nn.Module):
    """A network for one modality: image to mask logits, as it is exported.

    Args:
        network: The whole network.
        modality: The modality.
    """

    def __init__(self, network: Network, modality: str) -> None:
        super().__init__()
        if modality not in network.modalities:
            raise unknown_modality(modality, network.modalities)
        self.network, self.modality = network, modality

    def forward(self, image: Tensor) -> Tensor:
        """``(B, 3, H, W) → (B, 1, H, W)``."""
        return self.network(image, self.modality).masks


def check_size(image: Tensor) -> None:
    """Refuse what is no batch of colour images in whole patches.

    Raises:
        InputError: Says what.
    """
    if image.dim() != 4 or image.shape[1] != 3:
        raise InputError(f"image {tuple(image.shape)}: expected (B, 3, H, W)")
    if any(n % PATCH or n == 0 for n in image.shape[2:]):
        raise InputError(
            f"image {tuple(image.shape)}: height and width must be divisible by {PATCH}"
        )
