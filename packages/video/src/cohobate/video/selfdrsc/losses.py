"""Losses of SelfDRSC (arXiv 2305.19862): reconstruct both inputs from the predicted frames."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.video.timing import row_maps
from cohobate.video.warp import intermediate_flows, masked_warp

Boundary = Literal["zero", "normalised"]
PAIRS = ((0, 2), (2, 0), (0, 1), (1, 0), (1, 2), (2, 1))
"""The frames between which flows are needed, in the order of `reconstruct`."""


def charbonnier(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of ``sqrt((x - y)² + 1e-9)``.

    Args:
        prediction: Any shape.
        target: The same.
        valid: Where a pixel counts, 0 or 1, broadcast; all by default.

    Example:
        >>> round(charbonnier(torch.zeros(2), torch.tensor([3.0, 4.0])).item(), 4)
        3.5
    """
    error = ((prediction.float() - target.float()) ** 2 + 1e-9).sqrt()
    if valid is None:
        return error.mean().to(prediction.dtype)
    valid = valid.float().expand_as(error)
    return ((error * valid).sum() / valid.sum().clamp_min(1)).to(prediction.dtype)


def variation(flows: Tensor) -> Tensor:
    """Mean of squared forward differences of flows; past the right and bottom edge they are 0.

    Args:
        flows: ``(B, 2K, h, w)``.

    Example:
        >>> variation(torch.tensor([[[[0.0, 2.0]], [[0.0, 0.0]]]])).item()
        1.0
    """
    flows = flows.float()
    across = (flows[..., 1:] - flows[..., :-1]).square().sum()
    down = (flows[..., 1:, :] - flows[..., :-1, :]).square().sum()
    return (across + down) / flows.numel()


def perceptual(
    prediction: Tensor, target: Tensor, features: nn.Module, valid: Tensor | None = None
) -> Tensor:
    """Mean distance of network features; no gradient goes to the target.

    Args:
        prediction: Images ``(..., 3, H, W)``.
        target: The same.
        features: Such as `cohobate.video.perceptual.VGGFeatures`, frozen.
        valid: Where pixels count, ``(..., 1, H, W)``; elsewhere the target is looked at.

    Example:
        >>> x = torch.zeros(1, 3, 2, 2)
        >>> perceptual(x, x + 1, nn.Identity()).item()
        1.0
    """
    if valid is not None:
        prediction = torch.where(valid > 0, prediction, target)
    with torch.no_grad():
        wanted = features(target.flatten(0, -4))
    return F.l1_loss(features(prediction.flatten(0, -4)), wanted)


class Distorted(NamedTuple):
    """A rolling-shutter image made of two frames.

    Attributes:
        image: ``(B, 3, H, W)``.
        valid: 1 where at least one frame shows what is seen there, ``(B, 1, H, W)``.
    """

    image: Tensor
    valid: Tensor


def distort(
    first: Tensor,
    second: Tensor,
    forward: Tensor,
    backward: Tensor,
    time: Tensor,
    *,
    boundary: Boundary = "zero",
    official_warp: bool = False,
) -> Distorted:
    """Bidirectional distortion warping D: each row of the output is seen at its own time.

    ``D(A, B, s) = (1 - s) W(A, F_sA) + s W(B, F_sB)`` with the flows of `intermediate_flows` and
    the warp W that gives 0 outside the image.

    Args:
        first: A, ``(B, 3, H, W)``.
        second: B.
        forward: F_AB, ``(B, 2, H, W)``.
        backward: F_BA.
        time: s of each row, ``(B, 1, H, 1)``.
        boundary: ``zero`` lets what left the image darken the sum, as published; ``normalised``
            divides by the weights of what is inside.
        official_warp: As for `cohobate.video.warp.masked_warp`.

    References:
        Shang et al., arXiv 2305.19862, bidirectional distortion warping (section 3.3).
    """
    flows = intermediate_flows(forward, backward, time)
    a, inside_a = masked_warp(first, flows.first, official=official_warp)
    b, inside_b = masked_warp(second, flows.second, official=official_warp)
    time = time.to(a.dtype)
    share_a, share_b = (1 - time) * inside_a, time * inside_b
    image, share = (1 - time) * a + time * b, share_a + share_b
    valid = (share > 0).to(image.dtype)
    if boundary == "normalised":
        image = image / torch.where(share > 0, share, torch.ones_like(share))
    return Distorted(image, valid)


class Reconstruction(NamedTuple):
    """Both inputs, made again from the predicted frames.

    Attributes:
        images: ``(B, 4, 3, H, W)``: t2b and b2t from the first and last frame, then t2b and b2t
            from the middle frame and whichever other is nearer.
        valid: ``(B, 4, 1, H, W)``.
    """

    images: Tensor
    valid: Tensor


def reconstruct(
    frames: Tensor,
    flows: Tensor,
    times: Tensor,
    target: Tensor,
    *,
    boundary: Boundary = "zero",
    official_warp: bool = False,
) -> Reconstruction:
    """Make the rolling-shutter inputs from global-shutter frames at 0, t and 1.

    Args:
        frames: ``(B, 3, 3, H, W)``.
        flows: Between them in the order of `PAIRS`, ``(B, 6, 2, H, W)``.
        times: Row times of t2b and b2t, ``(B, 2, H, 1)``.
        target: t, ``(B,)``.
        boundary: As for `distort`.
        official_warp: As for `distort`.
    """
    maps = [row_maps(times[:, d : d + 1], target) for d in range(2)]
    # All six images in one batch: t2b and b2t of 0-1, 0-t and t-1.
    seconds = torch.stack([m[k] for k in range(3) for m in maps], 1)
    first, second = ([0, 0, 0, 0, 1, 1], [2, 2, 1, 1, 2, 2])
    found = distort(
        frames[:, first].flatten(0, 1),
        frames[:, second].flatten(0, 1),
        flows[:, [0, 0, 2, 2, 4, 4]].flatten(0, 1),
        flows[:, [1, 1, 3, 3, 5, 5]].flatten(0, 1),
        seconds.flatten(0, 1),
        boundary=boundary,
        official_warp=official_warp,
    )
    until = torch.stack([m.mask for m in maps], 1).to(frames.dtype)
    made = []
    for part in found:
        whole, before, after = part.unflatten(0, (len(frames), 3, 2)).unbind(1)
        made.append(torch.cat((whole, until * before + (1 - until) * after), 1))
    return Reconstruction(*made)


def self_supervised(
    made: Reconstruction, inputs: Tensor, features: nn.Module | None, *, boundary: Boundary = "zero"
) -> dict[str, Tensor]:
    """Distance of the reconstructions from the inputs.

    Args:
        made: Of `reconstruct`.
        inputs: t2b and b2t, ``(B, 2, 3, H, W)``.
        features: For the perceptual term; none leaves it out.
        boundary: ``normalised`` leaves out pixels that no frame shows.

    Returns:
        ``reconstruction``, the sum of the Charbonnier terms of all four images, and ``perceptual``,
        the sum of the feature distances; both before weighting.

    References:
        Shang et al., arXiv 2305.19862, self-supervised loss (section 3.3).
    """
    wanted = torch.cat((inputs, inputs), 1)
    valid = made.valid if boundary == "normalised" else None
    terms: dict[str, Tensor] = {"reconstruction": charbonnier(made.images, wanted)}
    if valid is not None:
        each = [charbonnier(made.images[:, k], wanted[:, k], valid[:, k]) for k in range(4)]
        terms["reconstruction"] = torch.stack(each).mean()
    terms["reconstruction"] = 4 * terms["reconstruction"]
    if features is not None:
        terms["perceptual"] = 4 * perceptual(made.images, wanted, features, valid)
    return terms


def self_distillation(
    student: Tensor, teacher: Tensor, features: nn.Module | None
) -> dict[str, Tensor]:
    """Distance of the student's frames from the teacher's, who saw more of the scene.

    Args:
        student: Frames, ``(B, 3, 3, h, w)``.
        teacher: Frames, ``(B, 3, 3, H, W)``, larger on each side by the same; the centre is taken,
            and no gradient goes there.
        features: For the perceptual term; none leaves it out.

    Returns:
        ``distil`` and, with features, ``distil_perceptual``; before weighting.

    References:
        Shang et al., arXiv 2305.19862, self-distillation (section 3.4).

    Example:
        >>> frames = torch.zeros(1, 3, 3, 4, 4)
        >>> round(self_distillation(frames[..., 1:3, 1:3], frames + 1, None)["distil"].item(), 4)
        1.0
    """
    margin = (teacher.shape[-1] - student.shape[-1]) // 2
    wanted = centre(teacher.detach(), margin)
    terms = {"distil": charbonnier(student, wanted)}
    if features is not None:
        terms["distil_perceptual"] = perceptual(student, wanted, features)
    return terms


def centre(x: Tensor, margin: int) -> Tensor:
    """Cut ``margin`` pixels off each side of ``(..., H, W)``; a row map only above and below."""
    if margin == 0:
        return x
    x = x[..., margin:-margin, :]
    return x if x.shape[-1] == 1 else x[..., margin:-margin]
