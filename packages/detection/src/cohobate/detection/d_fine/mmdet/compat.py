"""What mmdet needs and wheels do not bring: mmcv's compiled operators, readable checkpoints."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms as suppress

EXTENSION = "mmcv._ext"


class Extension(ModuleType):
    """Takes the place of mmcv's compiled module: what DETRs call is plain torch, on any device.

    mmcv asks at its import for the names of all operators; those that are not written here are
    given too and raise when they are called.
    """

    def __init__(self) -> None:
        super().__init__(EXTENSION)
        self.__spec__ = ModuleSpec(EXTENSION, None)  # mmengine looks for it
        for function in (
            nms,
            ms_deform_attn_forward,
            ms_deform_attn_backward,
            sigmoid_focal_loss_forward,
            sigmoid_focal_loss_backward,
        ):
            setattr(self, function.__name__, function)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> NoReturn:
            raise NotImplementedError(
                f"mmcv's operator {name} has no form in plain torch here: "
                "it needs mmcv with compiled operators instead of mmcv-lite"
            )

        return missing


def stand_in() -> bool:
    """Put `Extension` where mmcv looks for its operators, unless the compiled ones are installed.

    Returns:
        Whether the operators are the stand-in's.
    """
    if importlib.util.find_spec(EXTENSION) is None:
        sys.modules[EXTENSION] = Extension()
    return isinstance(sys.modules.get(EXTENSION), Extension)


def allow_checkpoints() -> None:
    """Let torch read the log that mmengine keeps in its checkpoints, which are data otherwise."""
    numpy = "numpy._core" if hasattr(np, "_core") else "numpy.core"  # NumPy 2, NumPy 1
    array = importlib.import_module(f"{numpy}.multiarray")
    kinds = {type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32)}
    torch.serialization.add_safe_globals(
        [HistoryBuffer, array._reconstruct, array.scalar, np.ndarray, np.dtype, *kinds]
    )
    torch.serialization.add_safe_globals([(_statistic, "builtins.getattr")])


def _statistic(kind: type, name: str) -> Any:
    """The log holds four methods of its own class, and a checkpoint may name no other attribute."""
    if kind is not HistoryBuffer or name not in ("current", "max", "mean", "min"):
        raise UnpicklingError(f"a checkpoint asks for attribute {name!r} of {kind!r}")
    return getattr(HistoryBuffer, name)


def nms(bboxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that stay, by falling score.

    Args:
        bboxes: ``(n, 4)`` xyxy in pixels.
        scores: ``(n,)``.
        iou_threshold: Of two boxes that overlap by more, the lower one goes.
        offset: 1 where x2 and y2 are the last pixel inside.
    """
    return suppress(bboxes + bboxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, _starts: Tensor, places: Tensor, weights: Tensor, **_: Any
) -> Tensor:
    """Multi-scale deformable attention.

    Args:
        value: ``(B, S, H, D)`` of all levels, H heads.
        shapes: ``(L, 2)`` height and width of each level.
        _starts: First row of each level.
        places: ``(B, Q, H, L, P, 2)`` sampling points in [0, 1].
        weights: ``(B, Q, H, L, P)``.

    Returns:
        ``(B, Q, H · D)``.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes.tolist(), places, weights)


def ms_deform_attn_backward(
    value: Tensor, shapes: Tensor, starts: Tensor, places: Tensor, weights: Tensor,
    gradient: Tensor, to_value: Tensor, to_places: Tensor, to_weights: Tensor, **_: Any,
) -> None:  # fmt: skip
    """Write the gradients of `ms_deform_attn_forward`, computed anew, into the last three."""
    inputs = [x.detach().requires_grad_() for x in (value, places, weights)]
    with torch.enable_grad():
        found = ms_deform_attn_forward(inputs[0], shapes, starts, inputs[1], inputs[2])
    grads = torch.autograd.grad(found, inputs, gradient)
    for out, grad in zip((to_value, to_places, to_weights), grads, strict=True):
        out.copy_(grad)


def sigmoid_focal_loss_forward(
    logits: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Write the focal loss of every row and class into ``output`` ``(n, C)``.

    Args:
        logits: ``(n, C)``.
        target: ``(n,)`` class indices, C for none.
        weight: ``(C,)`` of the classes, or empty.
        output: ``(n, C)``.
        gamma: Focus.
        alpha: Weight of positives.
    """
    output.copy_(_focal(logits, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    logits: Tensor, target: Tensor, weight: Tensor, gradient: Tensor, *, gamma: float, alpha: float
) -> None:
    """Write the derivative of `sigmoid_focal_loss_forward` into ``gradient`` ``(n, C)``."""
    given = logits.detach().requires_grad_()
    with torch.enable_grad():
        total = _focal(given, target, weight, gamma, alpha).sum()
    gradient.copy_(torch.autograd.grad(total, given)[0])


def _focal(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    classes = logits.shape[1]
    positive = F.one_hot(target, classes + 1)[:, :classes].bool()
    p = logits.sigmoid()
    loss = torch.where(
        positive,
        -alpha * (1 - p) ** gamma * F.logsigmoid(logits),
        -(1 - alpha) * p**gamma * F.logsigmoid(-logits),
    )
    if weight.numel():
        loss = loss * F.pad(weight, (0, 1), value=1.0)[target][:, None]
    return loss
