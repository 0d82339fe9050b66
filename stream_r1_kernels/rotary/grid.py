"""Rotary phases from integer positions, without a table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_integer, check_number


@dataclass(frozen=True)
class RotaryGrid:
    """The rotary embedding of a video transformer: a head's width is split over (frame, row, column).

    A width D gives `D - 4 (D // 6)`, `2 (D // 6)` and `2 (D // 6)` channels to the three axes, as in Wan2.1
    (128 = 44 + 42 + 42); two neighbouring channels are a pair, rotated by position * theta^(-2 i / axis
    width). Phases are computed in float64 from the position itself, so there is no longest video.

    Raises ValueError if head_dim is odd or not positive, or theta not positive.
    """

    head_dim: int
    theta: float = 10000.0

    def __post_init__(self) -> None:
        check_integer("RotaryGrid", "head_dim", self.head_dim)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"RotaryGrid: head_dim: expected an even number from 2 on, got {self.head_dim}")
        check_number(
            "RotaryGrid", "theta", self.theta, "a finite number > 0", lambda value: 0 < value < math.inf
        )

    @property
    def axes(self) -> tuple[int, int, int]:
        """Channels of (frame, row, column)."""
        spatial = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * spatial, spatial, spatial

    def phases(
        self, first_frame: int, frames: int, rows: int, columns: int, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 `[frames * rows * columns, D / 2]`, of the tokens from `first_frame` on.

        Raises:
            ValueError: a negative size.
        """
        for name, size in (("frames", frames), ("rows", rows), ("columns", columns)):
            check_number("RotaryGrid.phases", name, size, "at least 0", lambda value: value >= 0)
        frame_axis, row_axis, column_axis = self.axes
        shape = (frames, rows, columns)
        angles = torch.cat(
            [
                self._angles(first_frame, frames, frame_axis, device)[:, None, None].expand(*shape, -1),
                self._angles(0, rows, row_axis, device)[None, :, None].expand(*shape, -1),
                self._angles(0, columns, column_axis, device)[None, None, :].expand(*shape, -1),
            ],
            dim=-1,
        ).flatten(0, 2)
        return angles.cos().float(), angles.sin().float()

    def temporal_shift(
        self, delta_frames: int, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 `[D / 2]`, that move rotated keys by `delta_frames` in time.

        Rows and columns stay: cos 1, sin 0.
        """
        frame_axis, _, _ = self.axes
        angles = torch.zeros(self.head_dim // 2, dtype=torch.float64, device=device)
        angles[: frame_axis // 2] = self._angles(delta_frames, 1, frame_axis, device)[0]
        return angles.cos().float(), angles.sin().float()

    def _angles(self, first: int, count: int, channels: int, device: torch.device | str | None) -> Tensor:
        positions = torch.arange(first, first + count, dtype=torch.float64, device=device)
        exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / max(channels, 1)
        return positions[:, None] * self.theta**-exponents  # [count, channels / 2]
