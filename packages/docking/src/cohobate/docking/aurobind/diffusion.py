"""Noise levels, preconditioning, augmentation and the sampler of the pose diffusion.

References:
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, arXiv
    2206.00364; AlphaFold 3 supplement, algorithms 18 and 19, as AuroBind runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Denoised coordinates (B, A, 3) from noisy ones and noise levels (B, 1, 1)."""


@dataclass(frozen=True)
class Noise:
    """Noise levels of training and sampling; the defaults are for a ligand in a pocket.

    Args:
        sigma_data: σ_d, the spread of the data in Å; 16 for whole complexes.
        sigma_max: Highest level in units of σ_d.
        sigma_min: Lowest level in units of σ_d.
        rho: Exponent of the levels' spacing.
        mean: Mean of ln(t / σ_d) in training.
        std: Standard deviation of ln(t / σ_d) in training.
        gamma_0: γ₀, the noise added back at levels above ``gamma_min``; 0 gives the ODE.
        gamma_min: Å.
        noise_scale: λ, factor of the noise added back.
        step_scale: η, factor of each step.
    """

    sigma_data: float = 4.0
    sigma_max: float = 7.5
    sigma_min: float = 0.0125
    rho: float = 7.0
    mean: float = -1.2
    std: float = 1.5
    gamma_0: float = 0.8
    gamma_min: float = 1.0
    noise_scale: float = 1.003
    step_scale: float = 1.5

    def ode(self) -> Noise:
        """The same levels without noise and with whole steps: deterministic after the start."""
        return Noise(
            self.sigma_data, self.sigma_max, self.sigma_min, self.rho, self.mean, self.std,
            gamma_0=0.0, gamma_min=self.gamma_min, noise_scale=0.0, step_scale=1.0,
        )  # fmt: skip

    def schedule(self, steps: int) -> Tensor:
        """Levels from the highest to the lowest, then 0: (steps + 2,), Å.

        Example:
            >>> [round(x, 4) for x in Noise(16.0, 160.0, 4e-4).schedule(200)[[0, -2, -1]].tolist()]
            [2560.0, 0.0064, 0.0]
        """
        place = torch.arange(steps + 1, dtype=torch.float64) / steps
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        levels = self.sigma_data * (high + place * (low - high)) ** self.rho
        return torch.cat((levels, levels.new_zeros(1))).float()

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise levels for training (count,), Å."""
        return (
            self.sigma_data * (torch.randn(count, generator=generator) * self.std + self.mean).exp()
        )

    def scale_in(self, x: Tensor, t: Tensor) -> Tensor:
        """What the network sees: coordinates of unit spread."""
        return x / (t.square() + self.sigma_data**2).sqrt()

    def combine(self, x: Tensor, update: Tensor, t: Tensor) -> Tensor:
        """Denoised coordinates from noisy ones and the network's update.

        ``D = σ_d²/(t²+σ_d²) x + t σ_d/√(t²+σ_d²) F``.

        Args:
            x: Noisy coordinates (B, A, 3), Å.
            update: F, the network's output (B, A, 3).
            t: Noise levels (B, 1, 1), Å.
        """
        total = t.square() + self.sigma_data**2
        return self.sigma_data**2 / total * x + t * self.sigma_data / total.sqrt() * update


def random_rotations(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Rotations (count, 3, 3), uniform on SO(3), from normal quaternions.

    Differences:
        The released code turns by three uniform Euler angles, which is not uniform; see
        `euler_rotations`.
    """
    q = torch.randn(count, 4, generator=generator)
    w, x, y, z = (q / q.norm(dim=1, keepdim=True)).unbind(1)
    rows = [
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def euler_rotations(angles: Tensor) -> Tensor:
    """Rotations R_z(a) R_y(b) R_x(c) as (B, 3, 3), acting on columns.

    Args:
        angles: (B, 3), radian.
    """
    (sa, sb, sc), (ca, cb, cc) = angles.sin().unbind(-1), angles.cos().unbind(-1)
    rows = [
        (ca * cb, ca * sb * sc - sa * cc, ca * sb * cc + sa * sc),
        (sa * cb, sa * sb * sc + ca * cc, sa * sb * cc - ca * sc),
        (-sb, cb * sc, cb * cc),
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def augment(x: Tensor, mask: Tensor, rotation: Tensor, translation: Tensor) -> Tensor:
    """Centre, turn and move: ``m (R (x - mean) + t)``.

    Args:
        x: Coordinates (B, A, 3), Å.
        mask: (B, A).
        rotation: (B, 3, 3).
        translation: (B, 3), Å.
    """
    kept = mask[..., None]
    mean = (x * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return kept * ((x - mean) @ rotation.mT + translation[:, None])


def sample(
    denoise: Denoiser,
    start: Tensor,
    levels: Tensor,
    noise: Noise,
    *,
    added: Callable[[int], Tensor] | None = None,
    move: Callable[[int, Tensor], Tensor] | None = None,
    steps: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """Walk from noise to coordinates.

    Args:
        denoise: The network with its preconditioning.
        start: Standard normal numbers (B, A, 3); scaled by the first level.
        levels: As `Noise.schedule` gives.
        noise: γ, λ and η.
        added: Standard normal numbers (B, A, 3) of step k = 1 …; needed unless γ₀ is 0.
        move: What is done to the coordinates before step k; `augment` for whole complexes.
        steps: Wraps the loop, for a progress bar.

    Returns:
        Coordinates (B, A, 3), Å.
    """
    x = levels[0] * start
    values = levels.tolist()
    for k in steps(range(1, len(values))):
        if move is not None:
            x = move(k, x)
        before, after = values[k - 1], values[k]
        gamma = noise.gamma_0 if after > noise.gamma_min else 0.0
        t = before * (1 + gamma)
        if added is not None and noise.noise_scale > 0:
            x = x + noise.noise_scale * (t**2 - before**2) ** 0.5 * added(k)
        level = torch.full((len(x), 1, 1), t, dtype=x.dtype, device=x.device)
        x = x + noise.step_scale * (after - t) * (x - denoise(x, level)) / t
    return x
