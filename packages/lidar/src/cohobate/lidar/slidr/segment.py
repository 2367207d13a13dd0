"""What a pre-trained point network is worth: linear probe and fine-tuning on labelled points."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.core.io import fitting_weights
from cohobate.core.module import DistillModule
from cohobate.lidar.data import Batch, Intensity, Voxels
from cohobate.lidar.metrics import confusion, intersection_over_union
from cohobate.lidar.nets import Network, build
from cohobate.lidar.plots import bird_eye
from cohobate.lidar.predict import Segmenter
from cohobate.lidar.slidr.checkpoint import backbone_weights, check_settings, read_backbone
from cohobate.lidar.slidr.losses import segmentation_loss
from cohobate.lidar.slidr.method import Contrast
from cohobate.lidar.slidr.optimizer import Sgd, sgd
from cohobate.lidar.sparse import Backend


class Segment(DistillModule):
    """Trains a point network to name the class of every point.

    The loss is cross-entropy plus Lovász-softmax over the voxels that have a label. With
    ``probe`` only the last layer is trained, and normalisation keeps its statistics.

    Args:
        class_names: Names of the classes, the ignored one first; from the data.
        voxels: Shape of the voxels; from the data.
        intensity: What becomes of the intensity; from the data.
        layout: Whose label ids ``predict`` writes; from the data.
        network: The point network by name; that of pre-training.
        network_args: Widths and depths of a U-Net.
        bn_momentum: Batch-normalisation momentum outside residual blocks.
        backend: What computes the sparse convolutions.
        pretrained: A backbone from elsewhere: a released checkpoint, a run folder, or a
            ``student.safetensors``. A stage that starts from an earlier one needs none.
        contrast: Which loss has taught the backbone; an earlier stage or a run folder that says
            otherwise is refused.
        probe: Train the last layer alone.
        optimizer: Settings of SGD; ``lr`` is that of the backbone, and with ``probe`` of all.
        lr_head: Learning rate of the last layer in fine-tuning; ``None`` takes ``optimizer.lr``.
        lr_scratch: Learning rate of everything where the backbone was not pre-trained; ``None``
            takes the same rates as with pre-training.
        distill: Whether the backbone was pre-trained; the baseline's was not.

    References:
        Sautier et al., arXiv:2203.16258, sections 4.2 and 4.3.
    """

    from_data: ClassVar[tuple[str, ...]] = ("class_names", "voxels", "intensity", "layout")
    monitor: ClassVar[str] = "step"  # the last weights, so that no epoch is chosen on test scenes
    mode: ClassVar[str] = "max"

    def __init__(
        self,
        *,
        class_names: list[str],
        voxels: Voxels | None = None,
        intensity: Intensity | None = None,
        layout: str = "nuscenes",
        network: Literal["res16unet34c", "unet-small"] = "res16unet34c",
        network_args: dict[str, Any] | None = None,
        bn_momentum: float = 0.02,
        backend: Backend = "torch",
        pretrained: Path | None = None,
        contrast: Contrast = "superpixel",
        probe: bool = False,
        optimizer: Sgd | None = None,
        lr_head: float | None = None,
        lr_scratch: float | None = None,
        distill: bool = True,
    ) -> None:
        super().__init__(distill=distill)
        name: Network = network
        self.network = build(
            name,
            len(class_names),
            momentum=bn_momentum,
            backend=backend,
            arguments=network_args,
        )
        self.pretrained, self.contrast, self.probe = pretrained, contrast, probe
        self.optimizer = optimizer or Sgd(lr=0.02)
        self.lr_head, self.lr_scratch = lr_head, lr_scratch
        self.voxels = voxels or Voxels()
        self.segmenter = Segmenter(
            self.network, list(class_names), self.voxels, intensity or Intensity(), layout
        )
        self._matrix: Tensor | None = None
        self._shown: tuple[Tensor, Tensor, Tensor] | None = None
        if probe:
            self.network.requires_grad_(False)
            self.network.get_submodule("final").requires_grad_(True)
            self.network.eval()  # Lightning keeps the modes it finds

    @property
    def student(self) -> nn.Module:
        """The point network with its classifier."""
        return self.network

    def example_input(self) -> tuple[Tensor, ...]:
        """Eight voxels in a row."""
        row = torch.arange(8)
        zero = torch.zeros_like(row)
        return torch.stack([zero, row, zero, zero], 1), torch.ones(8, 1)

    def setup(self, stage: str) -> None:
        """Take over a backbone from a file; a resumed run then overwrites it with its own."""
        if stage == "fit" and self.pretrained is not None:
            contrast = self.contrast if self.distill else None
            weights = read_backbone(self.pretrained, self.voxels, contrast)
            self._take(weights, str(self.pretrained))

    def load_stage(self, weights: dict[str, Tensor]) -> None:
        """Take over pre-training but its last layer, or all of an earlier stage of this class.

        Raises:
            InputError: The backbone is another, or was trained otherwise than this run says.
        """
        own = {k.removeprefix("network."): v for k, v in weights.items()}
        if "settings" not in weights:
            source = Path("the earlier stage")
            self.network.load_state_dict(fitting_weights(self.network, own, source))
            return
        # the baseline's backbone was taught by nothing
        contrast = self.contrast if self.distill else None
        check_settings(weights["settings"], self.voxels, contrast, "the earlier stage")
        self._take(own, "the earlier stage")

    def _take(self, weights: dict[str, Tensor], source: str) -> None:
        self.network.load_state_dict(backbone_weights(self.network, weights, source), strict=False)

    def train(self, mode: bool = True) -> Segment:
        """A probed network stays in eval mode."""
        super().train(mode)
        if self.probe:
            self.network.eval()
        return self

    def forward_train(self, batch: Batch) -> Tensor:
        """Logits of the voxels (V, C)."""
        return self.network(*batch["inputs"])

    def task_loss(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and Lovász-softmax."""
        return segmentation_loss(outputs, batch["labels"])

    def configure_optimizers(self) -> Any:
        """SGD with one learning rate for the backbone and one for the last layer."""
        head = list(self.network.get_submodule("final").parameters())
        owned = {id(p) for p in head}
        rest = [p for p in self.network.parameters() if id(p) not in owned]
        lr, lr_head = self.optimizer.lr, self.lr_head or self.optimizer.lr
        if not self.distill and self.lr_scratch is not None:
            lr = lr_head = self.lr_scratch
        groups: list[dict[str, Any]] = [{"params": head, "lr": lr_head}]
        if not self.probe:
            groups.append({"params": rest, "lr": lr})
        return sgd(groups, self.optimizer, self.trainer)

    # --- evaluation --------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count right and wrong points."""
        self._count(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count right and wrong points."""
        prediction = self._count(batch)
        if batch_idx == 0:
            points = batch["clouds"][0].cpu()
            first = slice(len(points))
            self._shown = points, prediction[first].cpu(), batch["point_labels"][first].cpu()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._log("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics and the IoU of every class."""
        self._log("test", self.segmenter.class_names)

    def _count(self, batch: Batch) -> Tensor:
        prediction = best_class(self.network(*batch["inputs"]))[batch["rows"]]
        classes = len(self.segmenter.class_names)
        counts = confusion(prediction, batch["point_labels"], classes)
        self._matrix = counts if self._matrix is None else self._matrix + counts
        return prediction

    def _log(self, split: str, names: list[str] | None = None) -> None:
        if self._matrix is None:
            raise InputError("no labelled sweep to evaluate on")
        matrix, self._matrix = self._matrix, None
        if self.trainer.world_size > 1:
            matrix = torch.as_tensor(self.all_gather(matrix)).sum(0)
        found = intersection_over_union(matrix.cpu(), names=names)
        # in percent, as every table of the field
        self.log_dict({f"{split}/{name}": 100 * value for name, value in found.items()})

    def predict_files(
        self,
        inputs: list[Path],
        out: Path,
        *,
        root: Path | None = None,
        version: str | None = None,
        columns: int | None = None,
        pictures: bool = True,
    ) -> list[Path]:
        """Label sweeps.

        Args:
            inputs: Sweeps (``.pcd.bin``, ``.bin``), or folders of them.
            out: Folder for the results.
            root: A nuScenes folder that the sweeps belong to, for pictures of their cameras.
                KITTI's images are found beside the sweeps.
            version: nuScenes: folder of the tables.
            columns: Numbers a point in the files; by default told from the name.
            pictures: Draw each sweep from above and in its cameras.

        Returns:
            The files written.
        """
        return self.segmenter.predict(
            inputs, out, root=root, version=version, columns=columns, pictures=pictures
        )

    def pictures(self, out: Path) -> None:
        """A test sweep from above, predicted and true."""
        if self._shown is not None:
            points, prediction, truth = (x.numpy() for x in self._shown)
            panels = {"predicted": prediction, "labelled": truth}
            bird_eye(points, panels, self.segmenter.class_names, out / "segmentation.png")


def best_class(logits: Tensor) -> Tensor:
    """The likeliest class but the ignored one, 0.

    Args:
        logits: (V, C).

    Returns:
        (V,), from 1 to C − 1.

    Differences:
        The official evaluation at the end forgets to leave class 0 out; its validation does not.
    """
    return logits[:, 1:].argmax(1) + 1
