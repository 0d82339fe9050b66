"""Rewards that are wrong on purpose: what a study, or a guard, has to catch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from stream_r1.pixels import chroma
from stream_r1.rewards.base import Reward

WrongKind = Literal["noise", "saturation"]

_CELLS = (8, 8, 14)  # of frames, height and width, that noise is made of
_USUAL, _SPREAD = 0.3, 0.1  # chroma of drawings, about, and how it varies between them


class WrongReward:
    """A reward in another's place, with its axes.

    Args:
        reward: the right one.
        kind: "noise" adds to every axis a fixed random linear function of the coarse picture, about as large
            as the scores' own spread (1): it has a gradient, and no meaning. "saturation" scores every axis
            by the mean chroma of the pixels alone, whatever the reward says.
        seed: of the noise.
    """

    def __init__(self, reward: Reward, kind: WrongKind, *, seed: int = 0) -> None:
        self.axes = reward.axes
        self._reward, self._kind = reward, kind
        self._direction = torch.randn(
            (len(self.axes), 3, *_CELLS), generator=torch.Generator().manual_seed(seed)
        )

    def score(self, video: Tensor, prompts: list[str]) -> Tensor:
        """[B, axes], float32; video [B, T, 3, H, W] in [0, 1]. Differentiable to the pixels."""
        if self._kind == "saturation":
            mean = chroma(video.float()).mean((1, 2, 3))
            return ((mean - _USUAL) / _SPREAD)[:, None].expand(-1, len(self.axes))
        coarse = functional.adaptive_avg_pool3d(video.float().transpose(1, 2) - 0.5, _CELLS)
        direction = self._direction.to(video.device)
        noise = torch.einsum("bcthw,acthw->ba", coarse, direction) * (4 / direction[0].numel() ** 0.5)
        return self._reward.score(video, prompts) + noise
