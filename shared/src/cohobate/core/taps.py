"""Outputs of named layers, and adapters that make a student's fit a teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from cohobate.core.catalog import suggestion
from cohobate.core.errors import InputError


class Taps:
    """Takes the outputs of named layers during a forward pass.

    Hooks are active only inside the ``with`` block and nothing is kept after it ends but what the
    caller took out, so no graph leaks into the next step and an unused tap costs nothing.

    Args:
        network: The network to tap.
        paths: Name → layer path as in ``named_modules()``. ``layer:input`` takes the layer's first
            input instead of its output, ``layer:2`` the third entry of a tuple output.

    Raises:
        InputError: There is no such layer; the closest name is given.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with Taps(net, {"hidden": "0"}) as taps:
        ...     _ = net(torch.zeros(1, 2))
        ...     taps["hidden"].shape
        torch.Size([1, 3])
    """

    def __init__(self, network: nn.Module, paths: Mapping[str, str]) -> None:
        self._layers: dict[str, tuple[nn.Module, str]] = {}
        modules = dict(network.named_modules(remove_duplicate=False))  # every name of a layer
        for name, path in paths.items():
            layer, _, what = path.partition(":")
            if layer not in modules:
                hint = suggestion(layer, [m for m in modules if m])
                raise InputError(f"{type(network).__name__} has no layer '{layer}'{hint}")
            if what not in ("", "input") and not what.isdigit():
                raise InputError(f"tap '{path}': after ':' stands 'input' or a number")
            self._layers[name] = (modules[layer], what)
        self._values: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Taps:
        for name, (layer, what) in self._layers.items():
            if what == "input":
                handle = layer.register_forward_pre_hook(self._input_hook(name))
            else:
                handle = layer.register_forward_hook(self._output_hook(name, what))
            self._handles.append(handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._values.clear()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._values:
            raise KeyError(f"tap '{name}': its layer did not run in this block")
        value: Tensor = self._values[name]
        return value

    def all(self) -> dict[str, Tensor]:
        """Everything taken so far, by name."""
        return dict(self._values)

    def _output_hook(self, name: str, what: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            self._values[name] = output[int(what)] if what else output

        return hook

    def _input_hook(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any) -> None:
            self._values[name] = inputs[0]

        return hook


class Interpolate(nn.Module):
    """Resizes a map to a fixed spatial size.

    Args:
        size: Spatial size to reach.
    """

    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Resize ``x`` of shape ``(B, C, *spatial)``, linear in every direction."""
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(self.size)]
        return F.interpolate(x, self.size, mode=mode, align_corners=False)


def adapter(
    student: Tensor,
    teacher: Tensor,
    kind: Literal["auto", "linear", "conv"] = "auto",
) -> nn.Module:
    """Build what brings a student's features to a teacher's shape, from one batch of each.

    Args:
        student: Features ``(B, C, *spatial)``, or ``(B, ..., C)`` for ``linear``.
        teacher: Features of the same kind.
        kind: ``conv`` is a 1×1 convolution (with a resize when the maps differ), ``linear`` a
            linear layer on the last axis; ``auto`` takes ``linear`` for two axes, else ``conv``.

    Returns:
        The adapter; the identity where nothing has to change.

    Raises:
        InputError: The two cannot be brought together.

    Example:
        >>> import torch
        >>> adapter(torch.zeros(1, 4, 8, 8), torch.zeros(1, 6, 8, 8))
        Conv2d(4, 6, kernel_size=(1, 1), stride=(1, 1))
    """
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if student.ndim != teacher.ndim:
        raise InputError(f"adapter: different numbers of axes: {shapes}")
    if kind == "auto":
        kind = "linear" if student.ndim == 2 else "conv"
    if kind == "linear":
        if student.shape[1:-1] != teacher.shape[1:-1]:
            raise InputError(f"adapter: only the last axis may differ for 'linear': {shapes}")
        same = student.shape[-1] == teacher.shape[-1]
        return nn.Identity() if same else nn.Linear(student.shape[-1], teacher.shape[-1])
    rank = student.ndim - 2
    if rank not in (1, 2, 3):
        raise InputError(f"adapter: a convolution needs 1 to 3 spatial axes: {shapes}")
    parts: list[nn.Module] = []
    if student.shape[1] != teacher.shape[1]:
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        parts.append(convolution(student.shape[1], teacher.shape[1], 1))
    if student.shape[2:] != teacher.shape[2:]:
        parts.append(Interpolate(tuple(teacher.shape[2:])))
    if not parts:
        return nn.Identity()
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)
