"""Sliding-window segmentation of volumes and of NIfTI files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.core.predict import each_file, files_in
from cohobate.medseg.data.nifti import case_name, nifti_files, read_image, write_label
from cohobate.medseg.data.preprocess import Preprocess
from cohobate.medseg.plots import overlay


@dataclass(frozen=True)
class Segmenter:
    """A trained network with what it takes to use it on volumes of any size.

    Args:
        network: ``(B, C, *roi) → (B, K, *roi)`` in evaluation mode.
        preprocess: As in training.
        in_channels: Channels C.
        class_names: Names of all K classes, the background first.
        roi_size: Size of a window.
        overlap: Share of a window that overlaps with the next.
        windows: Windows per forward pass; changes speed and memory, not the result.
    """

    network: nn.Module
    preprocess: Preprocess
    in_channels: int
    class_names: Sequence[str]
    roi_size: Sequence[int]
    overlap: float = 0.25
    windows: int = 4

    def logits(self, image: Tensor) -> Tensor:
        """Logits from overlapping windows, averaged where they overlap.

        Args:
            image: Preprocessed, ``(1, C, *S)``; smaller than a window is padded with 0.

        Returns:
            ``(1, K, *S)``.
        """
        out = sliding_window_inference(
            image, self.roi_size, self.windows, self.network, overlap=self.overlap
        )
        assert isinstance(out, Tensor)
        return out

    def files(self, inputs: Sequence[Path], out: Path, picture: bool = True) -> list[Path]:
        """Segment NIfTI files.

        For each input ``<name>_seg.nii.gz`` has class ids on the input's own grid and affine, and
        ``<name>_seg.png`` shows three slices with the outlines.

        Args:
            inputs: Files, or folders whose NIfTI files are all taken.
            out: Folder for the results.
            picture: Whether to draw.

        Returns:
            The files written.

        Raises:
            InputError: There is nothing to segment, or a file is no fitting image; the others are
                segmented all the same.
        """
        paths = files_in(inputs, nifti_files, "NIfTI files (.nii or .nii.gz)", case_name)
        return each_file(paths, out, lambda path: self._file(path, out, picture), "segmenting")

    def _file(self, path: Path, out: Path, picture: bool) -> list[Path]:
        volume = read_image(path)
        found = volume.array.shape[0]
        if found != self.in_channels:
            raise InputError(f"{path}: {found} channels, the network takes {self.in_channels}")
        image = self.preprocess.image(volume)
        device = next(self.network.parameters()).device
        scores = self.logits(image.as_tensor()[None].to(device))[0].float().softmax(0)
        label = self.preprocess.restore(scores, image, volume)
        result = out / f"{case_name(path)}_seg.nii.gz"
        write_label(result, label, like=path)
        if not picture:
            return [result]
        drawn = out / f"{case_name(path)}_seg.png"
        masks = {"segmentation": label}
        overlay(drawn, volume.array[0], masks, self.class_names, volume.affine, path.name)
        return [result, drawn]
