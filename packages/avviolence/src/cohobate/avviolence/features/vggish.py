"""The VGGish network, with parameter names of the public PyTorch port of its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WEIGHTS = (
    "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth",
    "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish_pca_params-970ea276.pth",
)
"""Public weights: the network, and the post-processing."""


class VGGish(nn.Module):
    """Audio embeddings of 128 numbers for patches of 0.96 s.

    Args:
        postprocess: Whiten the embeddings, clip to [-2, 2] and round to 0..255, as released with
            AudioSet.

    References:
        Hershey et al., CNN Architectures for Large-Scale Audio Classification, ICASSP 2017,
        arXiv 1609.09430.
    """

    def __init__(self, *, postprocess: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 1
        for block in ((64,), (128,), (256, 256), (512, 512)):
            for channels in block:
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU(inplace=True)]
                width = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(512 * 6 * 4, 4096), nn.ReLU(inplace=True),
            nn.Linear(4096, 4096), nn.ReLU(inplace=True),
            nn.Linear(4096, 128), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.postprocess = postprocess
        self.pca_eigen_vectors: Tensor
        self.pca_means: Tensor
        if postprocess:
            self.register_buffer("pca_eigen_vectors", torch.eye(128))
            self.register_buffer("pca_means", torch.zeros(128, 1))

    def forward(self, patches: Tensor) -> Tensor:
        """Embed log-mel patches.

        Args:
            patches: ``(N, 96, 64)``.

        Returns:
            ``(N, 128)``.
        """
        maps = self.features(patches[:, None])
        # The fully connected weights expect time, frequency, channel.
        embedding: Tensor = self.embeddings(maps.permute(0, 2, 3, 1).flatten(1))
        if not self.postprocess:
            return embedding
        whitened = (embedding - self.pca_means[:, 0]) @ self.pca_eigen_vectors.mT
        return ((whitened.clamp(-2, 2) + 2) * (255 / 4)).round()
