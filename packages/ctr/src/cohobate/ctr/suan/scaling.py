"""Scaling laws: AUC as a power law of model size or of data size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import least_squares


@dataclass(frozen=True)
class PowerLaw:
    """``AUC(x) = a - b x^(-e)``.

    Args:
        a: AUC in the limit.
        b: gap to it at x = 1.
        e: exponent.
        r2: share of the variance that the law explains.
        last_predicted: AUC of the largest x from a fit to the others; None below three others
            (two with a known limit).
        last_error: its difference from the measured AUC.
    """

    a: float
    b: float
    e: float
    r2: float
    last_predicted: float | None = None
    last_error: float | None = None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """AUC at x."""
        return self.a - self.b * np.asarray(x, float) ** -self.e

    def as_dict(self) -> dict[str, float | None]:
        """The numbers by name."""
        return asdict(self)


def fit_power_law(x: Sequence[float], auc: Sequence[float], best: float | None = None) -> PowerLaw:
    """Fit by nonlinear least squares.

    Args:
        x: sizes, rising: dense parameters, operations, rows or length.
        auc: AUC at each.
        best: the limit a where it is known; else it is fitted, at most 1.

    Raises:
        ValueError: fewer points than parameters.

    References:
        Lai et al., RecSys 2025, arXiv:2508.15326: the form of the law; its constants are not
        public.

    Example:
        >>> x = np.array([1e3, 1e4, 1e5, 1e6])
        >>> law = fit_power_law(x, 0.85 - 0.6 * x**-0.3)
        >>> round(law.a, 4), round(law.b, 4), round(law.e, 4), round(law.r2, 4)
        (0.85, 0.6, 0.3, 1.0)
    """
    xs, ys = np.asarray(x, float), np.asarray(auc, float)
    law = _fit(xs, ys, best)
    if len(xs) <= (2 if best is not None else 3):
        return law
    last = float(_fit(xs[:-1], ys[:-1], best)(xs[-1:])[0])
    return PowerLaw(law.a, law.b, law.e, law.r2, last, last - float(ys[-1]))


def _fit(x: np.ndarray, y: np.ndarray, best: float | None) -> PowerLaw:
    free = 3 if best is None else 2
    if len(x) < free:
        raise ValueError(f"{len(x)} points for {free} parameters")
    # around the geometric mean b is the gap in the middle, and the problem is well scaled
    middle = float(np.exp(np.log(x).mean()))
    top = float(y.max())

    def curve(p: np.ndarray) -> np.ndarray:
        return (p[2] if best is None else best) - p[0] * (x / middle) ** -p[1]

    gap = max((top + 0.01 if best is None else best) - float(y.mean()), 1e-4)
    start, low, high = [gap, 0.3], [0.0, 1e-3], [1.0, 5.0]
    if best is None:
        start, low, high = [*start, min(top + 0.01, 1.0)], [*low, 0.0], [*high, 1.0]
    found = least_squares(
        lambda p: curve(p) - y, start, bounds=(low, high), x_scale=[0.1, 0.3, 0.1][:free],
        xtol=1e-14, ftol=1e-14, gtol=1e-14, max_nfev=10_000,
    ).x  # fmt: skip
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float(((curve(found) - y) ** 2).sum()) / spread if spread else float("nan")
    a = float(found[2]) if best is None else best
    return PowerLaw(a, float(found[0]) * middle ** float(found[1]), float(found[1]), r2)
