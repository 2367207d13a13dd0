"""Frozen networks that turn snippets and sound into features, by name or from local weights."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models, video
from torchvision.transforms import InterpolationMode

from cohobate.avviolence.features.logmel import log_mel
from cohobate.avviolence.features.media import SAMPLE_RATE
from cohobate.avviolence.features.vggish import WEIGHTS, VGGish
from cohobate.core.errors import InputError
from cohobate.core.io import fitting_weights, load_weights

Weights = dict[str, Tensor]


class Extractor(nn.Module):
    """A frozen network with an identity.

    Attributes:
        name: What was asked for.
        id: Name and a fingerprint of the weights: features of two extractors with the same id are
            comparable, others are not.
    """

    id: str

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self.name, self.network = name, network.eval().requires_grad_(False)
        self.id = identity(name, network)

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Features of a batch."""


def identity(name: str, network: nn.Module) -> str:
    """Name and fingerprint of a network's weights, ``s3d@3f2a...``; the name alone without any."""
    state = network.state_dict()
    if not state:
        return name
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return f"{name}@{digest.hexdigest()[:12]}"


# --- picture ---------------------------------------------------------------------------------


class VisualExtractor(Extractor):
    """Features of snippets of pictures.

    Args:
        name: What was asked for.
        network: Takes ``(N, 3, F, S, S)`` clips (or ``(N, F, 3, S, S)`` when ``frames_first``).
        frames: Frames F that the network takes; others are chosen evenly.
        resize: Size of the picture before cropping: short side, or height and width.
        size: Side S of the crop.
        mean: Mean of each colour.
        std: Standard deviation of each colour.
        frames_first: Layout of the clips.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        frames: int,
        resize: list[int],
        size: int,
        mean: list[float],
        std: list[float],
        frames_first: bool,
    ) -> None:
        super().__init__(name, network)
        self.frames, self.resize, self.size, self.frames_first = frames, resize, size, frames_first
        self.mean, self.std = mean, std

    def crops(self, snippet: Tensor, count: int) -> Tensor:
        """Prepare a snippet.

        Args:
            snippet: ``(16, H, W, 3)``, 8-bit.
            count: 1 for the centre, 5 for the centre and the corners.

        Returns:
            ``(count, F, 3, S, S)``, normalised.
        """
        places = torch.linspace(0, len(snippet) - 1, self.frames).round().long()
        pictures = snippet[places].permute(0, 3, 1, 2)
        # torchvision's video transforms resize without antialiasing
        pictures = TF.resize(pictures, self.resize, InterpolationMode.BILINEAR, antialias=False)
        if count == 1:
            views = [TF.center_crop(pictures, [self.size])]
        else:
            *corners, centre = TF.five_crop(pictures, [self.size])
            views = [centre, *corners]
        stacked = TF.to_dtype(torch.stack(views), torch.float32, scale=True)
        return TF.normalize(stacked, self.mean, self.std)

    def forward(self, inputs: Tensor) -> Tensor:
        """Features ``(N, V)`` of clips ``(N, F, 3, S, S)``."""
        device = next(self.network.parameters()).device
        clips = inputs.to(device)
        found = self.network(clips if self.frames_first else clips.transpose(1, 2))
        # transformers' video models give tokens; their mean stands for the clip
        tokens = getattr(found, "last_hidden_state", None)
        features: Tensor = found if tokens is None else tokens.mean(1)
        return features.cpu()


def visual_extractor(name: str = "s3d", weights: Path | None = None) -> VisualExtractor:
    """Load a visual extractor.

    Args:
        name: A video model of torchvision (``s3d`` 1024 wide, ``r3d_18`` 512, ``mvit_v2_s`` 768,
            ...), or a transformers video model by folder or hub name (VideoMAE, V-JEPA 2).
        weights: A file of weights for torchvision's model; by default its Kinetics-400 weights.

    Raises:
        InputError: There is no such model, or its weights cannot be had.
    """
    if _is_hugging_face(name):
        return _visual_transformer(name, weights)
    known = list_models(module=video)
    if name not in known:
        raise InputError(
            f"visual extractor '{name}' is neither a video model of torchvision "
            f"({', '.join(known)}) nor a transformers model by folder or owner/name"
        )
    network = get_model(name, weights=None)
    default = get_model_weights(name).DEFAULT
    preset = default.transforms()
    state = load_weights(weights) if weights else _download(name, default.url)
    network.load_state_dict(fitting_weights(network, state, weights or Path(name)))
    last = [child for child, _ in network.named_children()][-1]
    setattr(network, last, nn.Identity())  # the classifier
    return VisualExtractor(
        name,
        network,
        frames=16,
        resize=list(preset.resize_size),
        size=preset.crop_size[0],
        mean=list(preset.mean),
        std=list(preset.std),
        frames_first=False,
    )


def _visual_transformer(name: str, weights: Path | None) -> VisualExtractor:
    from transformers import AutoConfig, AutoModel

    if weights is not None:
        raise InputError(f"visual extractor {name}: give its folder, weights included")
    config = _from_hub(AutoConfig, name)
    network = _from_hub(AutoModel, name)
    size = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    if size is None or frames is None:
        raise InputError(f"visual extractor {name}: {config.model_type} is no video model")
    return VisualExtractor(
        _short(name),
        network,
        frames=frames,
        resize=[size],
        size=size,
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
        frames_first=True,
    )


# --- sound -----------------------------------------------------------------------------------


class AudioExtractor(Extractor):
    """Features ``(N, A)`` of sounds ``(N, 15600)`` at 16 kHz."""


class _LogMelStatistics(AudioExtractor):
    """Mean and standard deviation of each log-mel band over a patch: 128 numbers, no weights."""

    def forward(self, inputs: Tensor) -> Tensor:
        mel = log_mel(inputs)
        return torch.cat((mel.mean(1), mel.std(1)), 1)


class _VGGishExtractor(AudioExtractor):
    def forward(self, inputs: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        features: Tensor = self.network(log_mel(inputs).to(device))
        return features.cpu()


class _AudioTransformer(AudioExtractor):
    """A transformers audio model behind its own feature extractor."""

    def __init__(self, name: str, network: nn.Module, prepare: Any) -> None:
        super().__init__(name, network)
        self.prepare = prepare

    def forward(self, inputs: Tensor) -> Tensor:
        rate = self.prepare.sampling_rate
        sounds = inputs.numpy()
        if rate != SAMPLE_RATE:
            import soxr

            sounds = soxr.resample(sounds.T, SAMPLE_RATE, rate).T
        # CLAP without fusion takes one channel, but its feature extractor makes four by default
        single = getattr(self.network.config, "enable_fusion", None) is False
        options = {"truncation": "rand_trunc"} if single else {}
        found = self.prepare(list(sounds), sampling_rate=rate, return_tensors="pt", **options)
        device = next(self.network.parameters()).device
        output = self.network(**{key: value.to(device) for key, value in found.items()})
        pooled = getattr(output, "pooler_output", None)
        features: Tensor = output.last_hidden_state.mean(1) if pooled is None else pooled
        return features.cpu()


def audio_extractor(name: str = "vggish", weights: Path | None = None) -> AudioExtractor:
    """Load an audio extractor.

    Args:
        name: ``vggish`` (128 wide), ``vggish-pca`` (with AudioSet's post-processing), ``logmel``
            (mean and spread of 64 log-mel bands, 128 wide, needs no weights), or a transformers
            audio model by folder or hub name (AST, CLAP).
        weights: A file of VGGish weights; by default the public ones.

    Raises:
        InputError: There is no such model, or its weights cannot be had.
    """
    if name == "logmel":
        return _LogMelStatistics(name, nn.Identity())
    if name in ("vggish", "vggish-pca"):
        network = VGGish(postprocess=name == "vggish-pca")
        urls = WEIGHTS[: 1 + network.postprocess]
        state = load_weights(weights) if weights else _download(name, *urls)
        state = {key.removeprefix("pproc."): value for key, value in state.items()}
        if not network.postprocess:
            state = {key: value for key, value in state.items() if not key.startswith("pca_")}
        network.load_state_dict(fitting_weights(network, state, weights or Path(name)))
        return _VGGishExtractor(name, network)
    if not _is_hugging_face(name):
        raise InputError(
            f"audio extractor '{name}' is neither vggish, vggish-pca nor logmel, "
            "nor a transformers model by folder or owner/name"
        )
    from transformers import AutoFeatureExtractor, AutoModel, ClapAudioModel

    prepare = _from_hub(AutoFeatureExtractor, name)
    kind = ClapAudioModel if "Clap" in type(prepare).__name__ else AutoModel
    return _AudioTransformer(_short(name), _from_hub(kind, name), prepare)


def _is_hugging_face(name: str) -> bool:
    return "/" in name or Path(name).is_dir()


def _short(name: str) -> str:
    """A hub name as it is, a local folder by its own name."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _from_hub(kind: Any, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"extractor {name}: {reason}") from None


def _download(name: str, *urls: str) -> Weights:
    state: Weights = {}
    for url in urls:
        try:
            state |= torch.hub.load_state_dict_from_url(
                url, map_location="cpu", check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"weights of {name} could not be downloaded ({error}); give a file of them"
            ) from None
    return state
