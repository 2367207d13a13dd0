"""Losses of SLidR (arXiv 2203.16258): contrast of superpixels or pixels with points, Lovász."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.losses import info_nce, segment_mean
from cohobate.lidar.nets.pixels import UnitPixels, pixels_at, region_means

EPS = 1e-6


def superpixel_contrast(
    student: Tensor,
    teacher: Tensor | UnitPixels,
    pairing_points: Tensor,
    pairing_pixels: Tensor,
    superpixels: Tensor,
    *,
    temperature: float = 0.07,
) -> Tensor:
    """Points and pixels pooled over superpixels, drawn together where it is the same one.

    ``L = −1/|S| Σ_i log( exp⟨F_i, G_i⟩/τ / Σ_k exp⟨F_i, G_k⟩/τ )`` over the superpixels S of all
    images that hold at least one pair. F is the mean over the pairs, G over all pixels. Pooled
    vectors are not scaled to norm 1 again: a heterogeneous region has a short vector and therefore
    a softer target.

    Args:
        student: Unit features of points or voxels (N, D).
        teacher: Unit features of pixels (I, D, H, W); those of an upsampled map need not be held.
        pairing_points: Row of the student of each pair (P,).
        pairing_pixels: Image, row and column of each pair (P, 3).
        superpixels: Label of every pixel (I, H, W), any numbers from 0 on, counted in each image
            by itself.
        temperature: τ.

    Returns:
        A scalar; 0 with a gradient where no superpixel holds a pair.

    Raises:
        InputError: Shapes do not fit, a label is negative, a pair lies outside.

    References:
        Sautier et al., arXiv:2203.16258, equations 1 to 3.

    Differences:
        Labels of one image never run into those of the next, however many there are; the official
        code counts 150 an image. Empty regions are told by their count, not by a channel that
        is 0.

    Example:
        >>> one = torch.eye(2)
        >>> pixels = one.T[None, :, None, :]  # a row of two pixels, orthogonal
        >>> regions, pairs = torch.tensor([[[0, 1]]]), torch.tensor([[0, 0, 0], [0, 0, 1]])
        >>> round(superpixel_contrast(one, pixels, torch.arange(2), pairs, regions,
        ...                           temperature=1.0).item(), 4)
        0.3133
    """
    points, pixels = pool(student, teacher, pairing_points, pairing_pixels, superpixels)
    if not len(points):
        warnings.warn("no superpixel holds a pair: this batch teaches nothing", stacklevel=2)
        return nothing(student, teacher)
    return info_nce(points, pixels, temperature=temperature, normalize=False)


def pool(
    student: Tensor,
    teacher: Tensor | UnitPixels,
    pairing_points: Tensor,
    pairing_pixels: Tensor,
    superpixels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Superpoint and superpixel features.

    Args:
        student: As for `superpixel_contrast`, like all others.
        teacher: (I, D, H, W).
        pairing_points: (P,).
        pairing_pixels: (P, 3).
        superpixels: (I, H, W).

    Returns:
        F and G (|S|, D), image by image, in each by label.

    Raises:
        InputError: Shapes do not fit, a label is negative, a pair lies outside.
    """
    check_pairs(student, teacher, pairing_points, pairing_pixels)
    images, _, height, width = teacher.shape
    if superpixels.shape != (images, height, width):
        raise InputError(
            f"superpixels: {tuple(superpixels.shape)} for images of {(images, height, width)}"
        )
    labels = superpixels.long()
    low, high = (int(extreme) for extreme in labels.aminmax())
    if low < 0:
        raise InputError(f"superpixels: label {low} is negative")
    if high >= height * width:
        raise InputError(f"superpixels: label {high} in an image of {height * width} pixels")
    stride = high + 1
    image, row, column = pairing_pixels.unbind(1)
    points, count = segment_mean(
        student.index_select(0, pairing_points),
        labels[image, row, column] + image * stride,
        images * stride,
        eps=EPS,
    )
    # Only what holds a pair is pooled, and is numbered anew in each image.
    held = count.view(images, stride) > 0
    numbers = torch.where(held, held.cumsum(1) - 1, -1)
    regions = numbers.gather(1, labels.flatten(1)).view_as(labels)
    pixels = region_means(teacher, regions, max(int(numbers.max()) + 1, 1), eps=EPS)
    return points[held.flatten()], pixels[held.nonzero()[:, 0], numbers[held]]


def pixel_contrast(
    student: Tensor,
    teacher: Tensor | UnitPixels,
    pairing_points: Tensor,
    pairing_pixels: Tensor,
    *,
    temperature: float = 0.07,
    samples: int = 4096,
    chosen: Tensor | None = None,
) -> Tensor:
    """PPKT: single points and their pixels, drawn together.

    Args:
        student: As for `superpixel_contrast`, like all tensors.
        teacher: (I, D, H, W).
        pairing_points: (P,).
        pairing_pixels: (P, 3).
        temperature: τ.
        samples: Pairs that are drawn without replacement; all where there are fewer.
        chosen: Indices of the pairs instead of a draw.

    Returns:
        A scalar; 0 with a gradient where there is no pair.

    References:
        Liu et al., "Learning from 2D: Contrastive Pixel-to-Point Knowledge Transfer for 3D
        Pretraining", 2021, arXiv:2104.04687, as the baseline of arXiv:2203.16258.

    Example:
        >>> one = torch.eye(2)
        >>> pairs = torch.tensor([[0, 0, 0], [0, 0, 1]])
        >>> round(pixel_contrast(one, one.T[None, :, None, :], torch.arange(2), pairs,
        ...                      temperature=1.0).item(), 4)
        0.3133
    """
    check_pairs(student, teacher, pairing_points, pairing_pixels)
    if chosen is None:
        chosen = torch.randperm(len(pairing_points), device=pairing_points.device)[:samples]
    if not len(chosen):
        warnings.warn("no pair of point and pixel: this batch teaches nothing", stacklevel=2)
        return nothing(student, teacher)
    points = student.index_select(0, pairing_points.index_select(0, chosen))
    pixels = pixels_at(teacher, pairing_pixels.index_select(0, chosen))
    return info_nce(points, pixels, temperature=temperature, normalize=False)


def nothing(student: Tensor, teacher: Tensor | UnitPixels) -> Tensor:
    """A loss of 0 with gradients of 0.

    Args:
        student: Of any shape.
        teacher: Features of pixels.
    """
    pixels = teacher.coarse if isinstance(teacher, UnitPixels) else teacher
    return student.sum() * 0 + pixels.sum() * 0


def check_pairs(
    student: Tensor,
    teacher: Tensor | UnitPixels,
    pairing_points: Tensor,
    pairing_pixels: Tensor,
) -> None:
    """Whether every pair lies in the features, in one line instead of a device error.

    Args:
        student: (N, D).
        teacher: (I, D, H, W).
        pairing_points: (P,).
        pairing_pixels: (P, 3).

    Raises:
        InputError: Shapes do not fit, or a pair lies outside.
    """
    if student.dim() != 2 or len(teacher.shape) != 4 or student.shape[1] != teacher.shape[1]:
        raise InputError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}, "
            "expected (N, D) and (I, D, H, W)"
        )
    if pairing_pixels.shape != (len(pairing_points), 3):
        raise InputError(
            f"pairing: {tuple(pairing_pixels.shape)} pixels for {len(pairing_points)} points"
        )
    if not len(pairing_points):
        return
    sizes = (teacher.shape[0], *teacher.shape[2:], len(student))
    low = [*pairing_pixels.amin(0).tolist(), int(pairing_points.min())]
    high = [*pairing_pixels.amax(0).tolist(), int(pairing_points.max())]
    for name, least, most, size in zip(
        ("image", "row", "column", "point"), low, high, sizes, strict=True
    ):
        if least < 0 or most >= size:
            raise InputError(f"pairing: {name}s from {least} to {most}, there are {size}")


def lovasz_softmax(logits: Tensor, target: Tensor) -> Tensor:
    """Lovász extension of the Jaccard loss, over the classes that occur.

    For a class c with errors ``e = |1[y = c] − p_c|`` in descending order the loss is ``⟨e, w⟩``,
    w the differences of the Jaccard sequence; the mean is over the classes in ``target``.

    Args:
        logits: (N, C).
        target: Class of each row (N,).

    Returns:
        A scalar; 0 with a gradient for no row.

    References:
        Berman, Triki, Blaschko, "The Lovász-Softmax loss", CVPR 2018, arXiv:1705.08790,
        equations 8 to 11.

    Example:
        >>> round(lovasz_softmax(torch.zeros(2, 2), torch.tensor([0, 1])).item(), 4)
        0.5
    """
    if not len(logits):
        return logits.sum() * 0
    probabilities = logits.float().softmax(1)
    truth = F.one_hot(target, logits.shape[1]).to(probabilities)
    present = truth.any(0)
    truth, probabilities = truth[:, present], probabilities[:, present]
    errors, order = (truth - probabilities).abs().sort(0, descending=True)
    truth = truth.gather(0, order)
    positives = truth.sum(0)
    jaccard = 1 - (positives - truth.cumsum(0)) / (positives + (1 - truth).cumsum(0))
    steps = torch.cat((jaccard[:1], jaccard.diff(dim=0)))
    return (errors * steps).sum(0).mean().to(logits.dtype)


def segmentation_loss(logits: Tensor, target: Tensor, *, ignore: int = 0) -> dict[str, Tensor]:
    """Cross-entropy and Lovász-softmax of the rows that have a label.

    Args:
        logits: (N, C).
        target: Class of each row (N,).
        ignore: The class that counts as no label.

    Returns:
        ``cross_entropy`` and ``lovasz``, scalars to be added with weight 1; 0 with a gradient where
        no row has a label.

    Raises:
        InputError: A label is outside the classes.

    Example:
        >>> found = segmentation_loss(torch.zeros(2, 3), torch.tensor([1, 0]))
        >>> round(found["cross_entropy"].item(), 4), round(found["lovasz"].item(), 4)
        (1.0986, 0.6667)
    """
    if len(target) and (int(target.min()) < 0 or int(target.max()) >= logits.shape[1]):
        low, high = (int(extreme) for extreme in target.aminmax())
        raise InputError(f"labels: from {low} to {high} with {logits.shape[1]} classes")
    rows = (target != ignore).nonzero().flatten()
    logits, target = logits.index_select(0, rows), target.index_select(0, rows)
    if not len(rows):
        return {"cross_entropy": logits.sum() * 0, "lovasz": logits.sum() * 0}
    cross_entropy = F.cross_entropy(logits.float(), target).to(logits.dtype)
    return {"cross_entropy": cross_entropy, "lovasz": lovasz_softmax(logits, target)}
