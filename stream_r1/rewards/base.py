"""What a reward is, and what all rewards need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stream_r1.pixels import check_range


@runtime_checkable
class Reward(Protocol):
    """A video reward model.

    Write your own by giving an object these two members; nothing needs to be registered.
    """

    axes: tuple[str, ...]
    """Names of the scores, in the order of `score`'s last dimension, for example ("VQ", "MQ", "TA")."""

    def score(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Scores a batch of videos; a video's scores never depend on its neighbours in the batch.

        Args:
            video: [B, T, 3, H, W], floating point, RGB in [0, 1].
            prompts: B strings.

        Returns:
            [B, len(axes)] float32, higher is better, normalised to about zero mean and unit deviation an
            axis; differentiable in `video`.
        """
        ...


class ScoreNormalizer(nn.Module):
    """`(raw - mean) / std` an axis (VideoAlign's convention: the constants come from the reward's own data).

    Args:
        mean, std: one number an axis; std > 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"ScoreNormalizer: std: expected {len(mean)} values as in mean, got {len(std)}")
        if not all(value > 0 for value in std):
            raise ValueError(f"ScoreNormalizer: std: expected positive values, got {list(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """raw [B, axes] -> [B, axes]."""
        return (raw - self.mean) / self.std


def check_video(video: Tensor, prompts: Sequence[str], *, name: str) -> None:
    """Refuses what `Reward.score` can't take; `name` is the function that the message names."""
    if not isinstance(video, Tensor) or not video.is_floating_point():
        got = video.dtype if isinstance(video, Tensor) else type(video).__name__
        raise TypeError(f"{name}: video: expected a floating-point tensor in [0, 1], got {got}")
    if video.ndim != 5 or video.shape[2] != 3:
        raise ValueError(f"{name}: video: expected shape [B, T, 3, H, W], got {list(video.shape)}")
    if min(video.shape[1], video.shape[3], video.shape[4]) == 0:
        raise ValueError(f"{name}: video: expected at least one frame and one pixel, got {list(video.shape)}")
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"{name}: prompts: expected a list of strings, got {type(prompts).__name__}")
    if len(prompts) != video.shape[0]:
        raise ValueError(f"{name}: prompts: expected {video.shape[0]}, one a video, got {len(prompts)}")
    check_range(video, f"{name}: video")
