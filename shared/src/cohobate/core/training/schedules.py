"""Values that change over training, as functions of progress from 0 (start) to 1 (end).

Progress and not the epoch is the argument, so a schedule keeps its shape when a run is made longer
or shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Schedule = Callable[[float], float]
"""Progress in [0, 1] → value."""


@dataclass(frozen=True)
class Constant:
    """The same value throughout.

    Args:
        value: The value.

    Example:
        >>> Constant(0.5)(0.9)
        0.5
    """

    value: float

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line from ``start`` to ``end`` between two points of progress, flat outside.

    Args:
        start: Value up to ``begin``.
        end: Value from ``until`` on.
        begin: Progress at which the line starts.
        until: Progress at which it ends.

    Example:
        >>> Linear(0.0, 1.0, until=0.5)(0.25)
        0.5
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        return self.start + (self.end - self.start) * _fraction(progress, self.begin, self.until)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine wave from ``start`` to ``end`` between two points of progress, flat outside.

    Args:
        start: Value up to ``begin``.
        end: Value from ``until`` on.
        begin: Progress at which the wave starts.
        until: Progress at which it ends.

    Example:
        >>> round(Cosine(1.0, 0.0)(0.5), 6)
        0.5
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        rise = 0.5 - 0.5 * math.cos(math.pi * _fraction(progress, self.begin, self.until))
        return self.start + (self.end - self.start) * rise


@dataclass(frozen=True)
class Step:
    """Piecewise constant: ``values[i]`` holds until progress ``at[i]``, the last value to the end.

    Args:
        values: One value more than there are changes.
        at: Rising points of progress at which the value changes.

    Raises:
        ValueError: The two lengths do not fit or ``at`` does not rise.

    Example:
        >>> Step([1.0, 0.1], at=[0.8])(0.8)
        0.1
    """

    values: Sequence[float]
    at: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.at) + 1 or list(self.at) != sorted(self.at):
            raise ValueError(f"Step needs one value more than rising points, got {self}")

    def __call__(self, progress: float) -> float:
        """Value at ``progress``."""
        return self.values[sum(progress >= point for point in self.at)]


def as_schedule(value: float | Schedule) -> Schedule:
    """A number becomes a `Constant`, a schedule stays."""
    return value if callable(value) else Constant(float(value))


def _fraction(progress: float, begin: float, until: float) -> float:
    if until <= begin:
        return float(progress >= until)
    return min(max((progress - begin) / (until - begin), 0.0), 1.0)
