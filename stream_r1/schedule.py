"""The flow-matching schedule of Wan: noise levels, the shift, and what x0, noise and velocity make of them.

``x_t = (1 - sigma) x0 + sigma eps``, the network predicts ``v = eps - x0``, so ``x0 = x_t - sigma v``.
Timesteps are ``t = 1000 sigma`` in [0, 1000] everywhere: the network is fed ``t``, the formulas use
``sigma``. Source: Flow Matching (2210.02747); the shift as in SD3 (2403.03206, eq. 23); steps as in Self
Forcing (2506.08009).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000


def _per_frame(sigma: float | Tensor, x: Tensor) -> float | Tensor:
    """sigma as a scalar, [B] or [B, F] -> something that broadcasts against x [B, F, ...] in float32."""
    if not isinstance(sigma, Tensor):
        return float(sigma)
    if sigma.dim() > 2 or (sigma.dim() and sigma.shape != x.shape[: sigma.dim()]):
        expected = f"a scalar, [{x.shape[0]}] or {list(x.shape[:2])}"
        raise ValueError(f"schedule: sigma must be {expected} for x {list(x.shape)}, got {list(sigma.shape)}")
    return sigma.to(device=x.device, dtype=torch.float32).reshape(
        sigma.shape + (1,) * (x.dim() - sigma.dim())
    )


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class FlowSchedule:
    """Noise levels with Wan's shift. Stateless: two schedules with one shift are the same schedule.

    Args:
        shift: how strongly time is moved towards noise; 1 leaves it alone, Wan's students use 5.
    """

    shift: float = 5.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"FlowSchedule: shift must be positive, got {self.shift}")

    @overload
    def warp(self, t: float) -> float: ...

    @overload
    def warp(self, t: Tensor) -> Tensor: ...

    def warp(self, t: float | Tensor) -> float | Tensor:
        """Unshifted timesteps in [0, 1000] to shifted ones: 750 -> 937.5 with shift 5; 0 and 1000 stay."""
        s = t / TRAIN_TIMESTEPS
        return TRAIN_TIMESTEPS * self.shift * s / (1 + (self.shift - 1) * s)

    def denoising_steps(self, steps: Sequence[float] = (1000, 750, 500, 250)) -> list[float]:
        """A few-step student's timesteps: [1000, 750, 500, 250] -> [1000, 937.5, 833.333, 625].

        Raises ValueError unless the steps fall strictly and lie in (0, 1000].
        """
        steps = [float(step) for step in steps]
        falling = all(a > b for a, b in itertools.pairwise(steps))
        if not steps or not falling or steps[0] > TRAIN_TIMESTEPS or steps[-1] <= 0:
            raise ValueError(f"denoising_steps: steps must fall strictly within (0, 1000], got {steps}")
        return [self.warp(step) for step in steps]

    def timesteps(self, count: int) -> list[float]:
        """`count` shifted timesteps from 1000 down to, but without, 0: the grid of a many-step sampler."""
        if count < 1:
            raise ValueError(f"timesteps: count must be at least 1, got {count}")
        return self.denoising_steps([TRAIN_TIMESTEPS * (count - i) / count for i in range(count)])

    @staticmethod
    def sigma(t: float | Tensor) -> float | Tensor:
        """Noise level in [0, 1] of timestep t."""
        return t / TRAIN_TIMESTEPS

    @staticmethod
    def add_noise(x0: Tensor, eps: Tensor, sigma: float | Tensor) -> Tensor:
        """x_t = (1 - sigma) x0 + sigma eps, in x0's dtype. x0, eps [B, F, ...]; sigma as in `x0_from_v`."""
        s, dtype = _per_frame(sigma, x0), _sum_dtype(x0)
        return ((1 - s) * x0.to(dtype) + s * eps.to(dtype)).to(x0.dtype)

    @staticmethod
    def x0_from_v(x_t: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
        """x0 = x_t - sigma v. x_t, v [B, F, ...]; sigma a number, [B] or [B, F]; dtype of x_t."""
        dtype = _sum_dtype(x_t)
        return (x_t.to(dtype) - _per_frame(sigma, x_t) * v.to(dtype)).to(x_t.dtype)

    @staticmethod
    def velocity(x0: Tensor, eps: Tensor) -> Tensor:
        """What the network should predict: v = eps - x0."""
        return eps - x0

    def dmd_timestep(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        *,
        low: float = 20.0,
        high: float = 980.0,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Random timesteps at which scores are compared: one a sample, shared by its frames.

        u ~ randint[0, 1000) is warped by the shift and clamped to [low, high]. Drawn on the generator's
        device and moved to `device`. Returns float32 [batch].
        """
        source = generator.device if generator is not None else torch.device("cpu")
        u = torch.randint(0, TRAIN_TIMESTEPS, (batch,), generator=generator, device=source)
        return self.warp(u.to(torch.float32)).clamp(low, high).to(device if device is not None else source)
