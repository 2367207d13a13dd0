"""Weights from elsewhere into a network."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from cohobate.core.errors import InputError


def fill(
    module: nn.Module,
    weights: dict[str, Tensor],
    source: Path,
    *,
    strict: bool,
    skipped: str | tuple[str, ...],
) -> list[str]:
    """Load the tensors that fit.

    Args:
        module: What is filled.
        weights: Tensors by the module's own names.
        source: Where they come from, for messages.
        strict: Whether all must be there and fit.
        skipped: Endings of names that need not be there.

    Returns:
        Names of the module's tensors that were not filled.

    Raises:
        InputError: A tensor does not fit, or nothing does.
    """
    own = module.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    missing = [k for k in own if k not in fitting and not k.endswith(skipped)]
    if strict and missing:
        name = missing[0]
        fault = "is missing" if name not in weights else (
            f"has shape {tuple(weights[name].shape)}, the network needs {tuple(own[name].shape)}"
        )  # fmt: skip
        raise InputError(f"{source}: {name} {fault}")
    if len(missing) > len(own) // 2:
        fault = "most of the network finds no weights there; is it another size?"
        raise InputError(f"{source}: {fault}")
    module.load_state_dict(fitting, strict=False)
    return missing
