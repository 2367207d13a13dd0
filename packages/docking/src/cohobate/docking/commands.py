"""Commands of this package beside the common ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cohobate.docking.data.prepare import prepare

COMMANDS: list[Callable[..., int | None]] = [prepare]
