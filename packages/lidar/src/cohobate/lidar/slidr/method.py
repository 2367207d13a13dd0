"""SLidR: a frozen image network teaches a point network, superpixel by superpixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.core.module import DistillModule
from cohobate.core.teachers import FrozenTeacher
from cohobate.lidar.data import Batch, Intensity, Voxels
from cohobate.lidar.nets import Architecture, ImageNetwork, Network, UnitPixels, WeightsOf, build
from cohobate.lidar.plots import superpixel_picture
from cohobate.lidar.slidr.checkpoint import settings_tensor
from cohobate.lidar.slidr.losses import pixel_contrast, superpixel_contrast
from cohobate.lidar.slidr.optimizer import Sgd, sgd
from cohobate.lidar.sparse import Backend

Contrast = Literal["superpixel", "pixel"]


class Features(NamedTuple):
    """Both networks' unit features.

    Attributes:
        points: Of voxels or points (N, D).
        pixels: Of pixels (I, D, H, W), not held; ``None`` where nothing is distilled.
    """

    points: Tensor
    pixels: UnitPixels | None


class Pretrain(DistillModule):
    """Trains a point network on images alone; no label is read.

    ``L = −1/|S| Σ log( exp⟨F_i, G_i⟩/τ / Σ_k exp⟨F_i, G_k⟩/τ )`` with F and G the mean features of
    the points and pixels of a superpixel. The image encoder is frozen; its 1 × 1 head is trained.

    Args:
        voxels: Shape of the voxels; from the data.
        intensity: What becomes of the intensity; from the data.
        form: What the data prepares; from the data.
        network: The point network by name.
        network_args: Widths and depths of a U-Net.
        out_channels: D of both networks.
        bn_momentum: Batch-normalisation momentum of the U-Nets.
        backend: What computes the sparse convolutions.
        image: The image network by name.
        image_weights: Local file with the encoder's weights. Without, the encoder is random, and
            its normalisation is set by ``calibration_frames``.
        image_weights_of: Which method wrote the file.
        calibration_frames: Frames for the statistics of a random encoder.
        contrast: ``superpixel`` is SLidR, ``pixel`` its baseline PPKT.
        temperature: τ.
        samples: Pairs a step for PPKT.
        optimizer: Learning rates and schedule.
        distill: False teaches nothing: the network stays as it was drawn, and its normalisation
            sees the same clouds. The baseline "random initialisation" of the paper.

    References:
        Sautier et al., "Image-to-Lidar Self-Supervised Distillation for Autonomous Driving Data",
        CVPR 2022, arXiv:2203.16258, section 3.
    """

    from_data: ClassVar[tuple[str, ...]] = ("voxels", "intensity", "form")
    monitor: ClassVar[str] = "step"  # the paper goes on from the last weights
    mode: ClassVar[str] = "max"

    def __init__(
        self,
        *,
        voxels: Voxels | None = None,
        intensity: Intensity | None = None,
        form: str = "voxels",
        network: Network = "res16unet34c",
        network_args: dict[str, Any] | None = None,
        out_channels: int = 64,
        bn_momentum: float = 0.05,
        backend: Backend = "torch",
        image: Architecture = "resnet50",
        image_weights: Path | None = None,
        image_weights_of: WeightsOf = "plain",
        calibration_frames: int = 16,
        contrast: Contrast = "superpixel",
        temperature: float = 0.07,
        samples: int = 4096,
        optimizer: Sgd | None = None,
        distill: bool = True,
    ) -> None:
        super().__init__(distill=distill)
        if (network == "voxelnet") != (form == "pillars"):
            raise InputError(f"network {network} does not take data.form {form}")
        self.network = build(
            network,
            out_channels,
            normalize=True,
            momentum=bn_momentum,
            backend=backend,
            arguments=network_args,
        )
        self.contrast, self.temperature, self.samples = contrast, temperature, samples
        self.optimizer = optimizer or Sgd()
        self.calibration_frames = 0 if image_weights is not None else calibration_frames
        self.register_buffer("settings", settings_tensor(voxels or Voxels(), contrast))
        self._shown: Batch | None = None
        if distill:
            with torch.random.fork_rng(devices=[]):  # both arms go on with the same random numbers
                teacher = ImageNetwork(image, out_channels, image_weights, image_weights_of)
            self.head = teacher.decoder
            self.teacher = FrozenTeacher(_Encoder(teacher))

    @property
    def student(self) -> nn.Module:
        """The point network."""
        return self.network

    def example_input(self) -> tuple[Tensor, ...]:
        """Eight voxels in a row, or a point in each of them."""
        row = torch.arange(8)
        zero = torch.zeros_like(row)
        if self.network.in_channels == 1:
            return torch.stack([zero, row, zero, zero], 1), torch.ones(8, 1)
        points = torch.zeros(8, 4)
        return torch.stack([zero, zero, zero, row], 1), torch.ones(8, 4), points

    def on_fit_start(self) -> None:
        """Set the normalisation of a random image encoder, which would otherwise know nothing."""
        if not self.distill or not self.calibration_frames:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        images = data.calibration_images(self.calibration_frames)
        calibrate(self.teacher.networks[0], images.to(self.device))

    def forward_train(self, batch: Batch) -> Features:
        """Features of points and pixels."""
        points = self.network(*batch["inputs"])
        return Features(points, self.head(self.teacher(batch["images"])) if self.distill else None)

    def task_loss(self, outputs: Features, batch: Batch) -> dict[str, Tensor]:
        """Nothing: there are no labels. Zero for the baseline, which must return something."""
        return {} if self.distill else {"idle": outputs.points.sum() * 0}

    def distill_loss(self, outputs: Features, batch: Batch) -> dict[str, Tensor]:
        """The contrast of superpixels, or that of single pixels."""
        assert outputs.pixels is not None
        pairs = batch["pairing_points"], batch["pairing_pixels"]
        if self.contrast == "pixel":
            loss = pixel_contrast(
                outputs.points,
                outputs.pixels,
                *pairs,
                temperature=self.temperature,
                samples=self.samples,
            )
        else:
            loss = superpixel_contrast(
                outputs.points,
                outputs.pixels,
                *pairs,
                batch["superpixels"],
                temperature=self.temperature,
            )
        return {self.contrast: loss}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same loss on scenes that are not trained on."""
        if batch_idx == 0:
            self._shown = batch
        if self.distill:
            (loss,) = self.distill_loss(self.forward_train(batch), batch).values()
            self.log("val/loss", loss, batch_size=len(batch["images"]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """SGD with a cosine to 0; nothing moves in the baseline."""
        rate = self.optimizer.lr if self.distill else 0.0
        groups = [{"params": list(self.parameters()), "lr": rate}]
        return sgd(groups, self.optimizer, self.trainer)

    def pictures(self, out: Path) -> None:
        """Superpixels and the points that fall into them."""
        if self._shown is not None:
            superpixel_picture(self._shown, out / "superpixels.png")


class _Encoder(nn.Module):
    """An image network without its head."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: ImageNetwork) -> None:
        super().__init__()
        self.encoder = network.encoder
        self.register_buffer("mean", network.mean)
        self.register_buffer("std", network.std)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] → (B, C, h, w)."""
        return self.encoder((images - self.mean) / self.std)


@torch.no_grad()
def calibrate(network: nn.Module, images: Tensor, chunk: int = 16) -> None:
    """Set running statistics of batch normalisation to those of some images; weights stay.

    Args:
        network: In eval mode before and after.
        images: (I, 3, H, W).
        chunk: Images a pass.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all passes
        layer.train()
    for part in images.split(chunk):
        network(part)
    for layer, momentum in zip(layers, before, strict=True):
        layer.momentum = momentum
        layer.eval()
