"""A U-shaped network with a light head on every encoder and decoder stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from monai.networks import nets
from monai.networks.layers.factories import Conv
from torch import Tensor, nn
from torch.nn import functional as F

from cohobate.core.errors import InputError
from cohobate.core.taps import Taps

Upsample = Literal["deconv", "deconv_once", "linear"]
Share = Literal["auto", "always", "never"]


class Outputs(NamedTuple):
    """Logits of one training pass, all of shape ``(B, K, *S)``.

    Attributes:
        main: Y, the network's own output.
        decoder: D₁ … D_Z; D₁ is the stage nearest the output.
        encoder: E₁ … E_Z; E_Z is the deepest stage.
    """

    main: Tensor
    decoder: tuple[Tensor, ...]
    encoder: tuple[Tensor, ...]


@dataclass(frozen=True)
class Stage:
    """One supervised stage.

    Attributes:
        name: ``enc1`` … or ``dec1`` … .
        path: Module path inside the network, as `cohobate.core.taps.Taps` takes it.
        channels: Channels of the feature.
        stride: Input size divided by feature size, per axis.
        head: Name of the head that reads it; shared heads have several stages.
    """

    name: str
    path: str
    channels: int
    stride: tuple[int, ...]
    head: str


class Head(nn.Module):
    """Feature at a stride to class logits at full size (the paper's bottleneck module).

    A 1×1×1 convolution to K channels, then one transposed convolution (kernel = stride = 2) whose
    weights are used again until the input size is reached. No norm, no activation. At stride 1 the
    transposed convolution has kernel 1.

    Args:
        in_channels: Channels C of the feature.
        out_channels: Classes K.
        stride: Stride of the feature per axis, powers of 2.
        upsample: ``deconv`` as above; ``deconv_once`` one transposed convolution with kernel =
            stride; ``linear`` one untrained linear interpolation with aligned corners.

    Differences:
        Unequal strides are not in the official code: there an axis that has reached its size takes
        kernel 1, and each kernel shape has weights of its own.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Sequence[int],
        upsample: Upsample = "deconv",
    ) -> None:
        super().__init__()
        dims = len(stride)
        self.stride = tuple(stride)
        self.conv = Conv["conv", dims](in_channels, out_channels, kernel_size=1)
        kernels = self._doublings() if upsample == "deconv" else [self.stride]
        if upsample == "linear":
            kernels = []
        shapes = list(dict.fromkeys(kernels))
        self.deconv = nn.ModuleList(
            Conv["convtrans", dims](out_channels, out_channels, kernel_size=k, stride=k)
            for k in shapes
        )
        self.steps = [shapes.index(kernel) for kernel in kernels]

    def _doublings(self) -> list[tuple[int, ...]]:
        """Kernels from low to full resolution: 2 on the axes that still need it."""
        steps = max(int(math.log2(s)) for s in self.stride)
        kernels = [tuple(2 if s >= 2 << i else 1 for s in self.stride) for i in range(steps)]
        return kernels or [(1,) * len(self.stride)]

    def forward(self, feature: Tensor) -> Tensor:
        """``(B, C, *S/stride)`` → ``(B, K, *S)``."""
        x = self.conv(feature)
        for step in self.steps:
            x = self.deconv[step](x)
        if not self.steps:
            size = [n * s for n, s in zip(feature.shape[2:], self.stride, strict=True)]
            mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
            x = F.interpolate(x, size, mode=mode, align_corners=True)
        return x


def stage_paths(network: nn.Module) -> tuple[list[str], list[str]]:
    """Module paths of the stages of a known network class.

    Args:
        network: An instance of one of the MONAI classes in `cohobate.medseg.nets`.

    Returns:
        Paths of E₁ … E_Z and of D₁ … D_Z.

    Raises:
        InputError: The class is not known.
    """
    if isinstance(network, nets.DynUNet):
        z = len(network.downsamples) + 1
        encoder = ["input_block"] + [f"downsamples.{i}" for i in range(z - 1)]
        return encoder, ["skip_layers" + ".next_layer" * i for i in range(1, z)] + ["bottleneck"]
    if isinstance(network, nets.UNETR):
        decoder = ["decoder3", "decoder4", "decoder5", "decoder5:input"]
        return [f"encoder{i}" for i in range(1, 5)], decoder
    if isinstance(network, nets.SwinUNETR):
        return [f"encoder{i}" for i in range(1, 5)], [f"decoder{i}" for i in range(2, 6)]
    if isinstance(network, nets.VNet):
        encoder = ["in_tr", "down_tr32", "down_tr64", "down_tr128"]
        return encoder, ["up_tr64", "up_tr128", "up_tr256", "down_tr256"]
    if isinstance(network, nets.BasicUNet):
        return ["conv_0", "down_1", "down_2", "down_3"], ["upcat_2", "upcat_3", "upcat_4", "down_4"]
    if isinstance(network, nets.UNet):
        levels = ["model" + ".1.submodule" * i for i in range(len(network.channels))]
        return [f"{level}.0" for level in levels[:-1]], levels[1:]
    if isinstance(network, nets.SegResNet):
        z = len(network.up_layers)
        decoder = [f"up_layers.{i}" for i in reversed(range(z - 1))] + [f"down_layers.{z}"]
        return [f"down_layers.{i}" for i in range(z)], decoder
    raise InputError(
        f"{type(network).__name__}: no preset for this class; give the module paths of its stages "
        "as encoder (E1 to EZ) and decoder (D1 to DZ)"
    )


class SelfDistilled(nn.Module):
    """A U-shaped network with the heads of dual self-distillation.

    In training the forward pass returns `Outputs`; in evaluation it returns exactly what the
    network returns, and the heads cost nothing.

    Args:
        network: The backbone, ``(B, C, *S) → (B, K, *S)``; its ``state_dict`` stays its own.
        in_channels: Channels of its input.
        out_channels: Classes K.
        roi_size: Input size for the dry run that finds channels and strides.
        encoder: Module paths of E₁ … E_Z; by default those of the class (`stage_paths`). With
            ``:input`` appended, the first input of the module is taken.
        decoder: Module paths of D₁ … D_Z, from high to low resolution.
        share_heads: One head for an encoder and a decoder stage of equal channels and stride:
            ``auto`` does so for DynUNet and SwinUNETR as the official code does.
        upsample: How heads reach the input size, see `Head`.
        encoder_heads: Whether encoder heads are built; without a loss on them they would only
            hold parameters that never get a gradient.
        decoder_heads: Whether decoder heads are built.

    Raises:
        InputError: The class has no preset, a path does not exist, a stride is not a power of 2,
            or the network refuses an input of ``roi_size``.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        in_channels: int,
        out_channels: int,
        roi_size: Sequence[int],
        encoder: Sequence[str] | None = None,
        decoder: Sequence[str] | None = None,
        share_heads: Share = "auto",
        upsample: Upsample = "deconv",
        encoder_heads: bool = True,
        decoder_heads: bool = True,
    ) -> None:
        super().__init__()
        self.network = network
        self.in_channels, self.out_channels = in_channels, out_channels
        if (encoder is None and encoder_heads) or (decoder is None and decoder_heads):
            preset = stage_paths(network)
            encoder, decoder = encoder or preset[0], decoder or preset[1]
        sides = {"enc": (encoder_heads and encoder) or [], "dec": (decoder_heads and decoder) or []}
        named = {
            f"{side}{i}": path for side, paths in sides.items() for i, path in enumerate(paths, 1)
        }
        self.taps = Taps(network, named)
        features = _probe(network, self.taps, (1, in_channels, *roi_size), out_channels)
        share = share_heads == "always" or (
            share_heads == "auto" and isinstance(network, nets.DynUNet | nets.SwinUNETR)
        )
        self.stages = _stages(named, features, roi_size, share)
        self.heads = nn.ModuleDict()
        for stage in self.stages:
            if stage.head not in self.heads:
                head = Head(stage.channels, out_channels, stage.stride, upsample)
                self.heads[stage.head] = head
        if isinstance(network, nets.DynUNet):
            self.heads.apply(network.initialize_weights)  # the rule of the rest of the network
        self.divisor = tuple(
            max((stage.stride[axis] for stage in self.stages), default=1)
            for axis in range(len(roi_size))
        )

    def forward(self, image: Tensor) -> Tensor | Outputs:
        """Segment ``image`` of shape ``(B, C, *S)``.

        Returns:
            `Outputs` in training, the main logits ``(B, K, *S)`` in evaluation.

        Raises:
            InputError: In training: the image's channels or size do not fit.
        """
        if not self.training:
            return self.network(image)
        self._check(image)
        with self.taps as taps:
            main = self.network(image)
            _check_logits(self.network, main, image.shape, self.out_channels)
            logits = {s.name: self.heads[s.head](taps[s.name]) for s in self.stages}
        decoder = tuple(logits[s.name] for s in self.stages if s.name.startswith("dec"))
        encoder = tuple(logits[s.name] for s in self.stages if s.name.startswith("enc"))
        return Outputs(main, decoder, encoder)

    def table(self) -> str:
        """The stages found: name, module, channels, stride and head, one a line."""
        rows = [
            ("stage", "module", "channels", "stride", "head"),
            *(
                (s.name, s.path, str(s.channels), "×".join(map(str, s.stride)), s.head)
                for s in self.stages
            ),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        return "\n".join(line.rstrip() for line in lines)

    def _check(self, image: Tensor) -> None:
        if image.shape[1] != self.in_channels:
            raise InputError(
                f"image {tuple(image.shape)} has {image.shape[1]} channels, "
                f"the network takes {self.in_channels}"
            )
        if any(n % d for n, d in zip(image.shape[2:], self.divisor, strict=True)):
            raise InputError(
                f"image {tuple(image.shape)}: every size must be divisible by the largest stride "
                f"{self.divisor}"
            )


def _stages(
    named: dict[str, str], features: dict[str, torch.Size], roi_size: Sequence[int], share: bool
) -> list[Stage]:
    found = [
        (name, path, features[name][1], _stride(path, features[name][2:], roi_size))
        for name, path in named.items()
    ]
    stages = []
    for name, path, channels, stride in found:
        label = str(stride[0]) if len(set(stride)) == 1 else "x".join(map(str, stride))
        peers = [(n[:3], c) for n, _, c, s in found if s == stride]
        alike = len({c for _, c in peers}) == 1 and len({side for side, _ in peers}) == len(peers)
        head = f"s{label}" if share and alike else name
        stages.append(Stage(name, path, channels, stride, head))
    return stages


def _stride(path: str, feature: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    stride = tuple(n // max(m, 1) for n, m in zip(size, feature, strict=True))
    exact = all(s * m == n for s, m, n in zip(stride, feature, size, strict=True))
    if not exact or any(s < 1 or s & (s - 1) for s in stride):
        raise InputError(
            f"stage '{path}': feature size {tuple(feature)} at input size {tuple(size)} is not "
            "a stride that is a power of 2 on every axis"
        )
    return stride


def _probe(
    network: nn.Module, taps: Taps, shape: tuple[int, ...], classes: int
) -> dict[str, torch.Size]:
    """Shapes of all tapped features for an input of ``shape``, from one dry run."""
    with _evaluation(network), torch.no_grad(), taps:
        try:
            output = network(torch.zeros(shape, device=next(network.parameters()).device))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{type(network).__name__} refuses an image of shape {shape}: {reason}"
            ) from error
        _check_logits(network, output, shape, classes)
        return {name: feature.shape for name, feature in taps.all().items()}


def _check_logits(network: nn.Module, output: object, shape: Sequence[int], classes: int) -> None:
    expected = (shape[0], classes, *shape[2:])
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if got != expected:
        raise InputError(
            f"{type(network).__name__} gives {got} for an image of shape {tuple(shape)}, expected "
            f"logits {expected} (its own deep supervision must be off)"
        )


@contextmanager
def _evaluation(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a moment; every module gets its own mode back."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
