"""A reward that knows the drawn world: what `measures` counts, made differentiable, so that its gradient lies
on the thing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stream_r1.drawn_world.scenes import COLOURS, Scene
from stream_r1.rewards.base import ScoreNormalizer, check_video

_EDGE = 0.05  # of a colour's own chroma, over which a pixel's share of the thing rises
_LEAST = 0.5  # share of it that a pixel needs
_TAIL = 0.02  # below: nothing, so that a sky of thousands of pixels has no share and no gradient
_AREA = ((130.0, 40.0), (620.0, 80.0))  # pixels of a thing, and how softly the bounds hold
_SPREAD = (2.0, 0.4)  # of a thing's pixels around its middle, over a disc's
_CHANGE, _TURN = 0.25, 1.5  # of its area from frame to frame; of its speed, pixels a frame and frame


class MeasuredReward:
    """Scores by what the drawn world's prompts say, with no learnt part.

    VQ: one compact thing of the prompt's colour and of a thing's size, with sharp edges. MQ: the same, and
    its area and speed change little from frame to frame. TA: the prompt's colour among the world's.
    Normalised with the means and deviations of videos of the student before distillation.
    """

    axes: tuple[str, ...] = ("VQ", "MQ", "TA")

    def __init__(self) -> None:
        self._normalise = ScoreNormalizer((0.29, 0.27, 0.44), (0.26, 0.26, 0.15))

    def score(self, video: Tensor, prompts: list[str]) -> Tensor:
        """[B, 3], float32; video [B, T, 3, H, W] in [0, 1], T >= 3. Differentiable to the pixels.

        Raises:
            ValueError: a prompt that is not the drawn world's, fewer than three frames.
        """
        check_video(video, prompts, name="MeasuredReward.score")
        if video.shape[1] < 3:
            raise ValueError(
                f"MeasuredReward.score: video: expected three frames or more, got {video.shape[1]}"
            )
        own = [list(COLOURS).index(Scene.of(prompt).colour) for prompt in prompts]
        shares = _shares(video.float())  # [colours, B, T, H, W]
        areas = shares.sum((-2, -1))  # [colours, B, T]
        batch = torch.arange(len(own), device=video.device)
        thing, area = shares[own, batch], areas[own, batch]  # [B, T, H, W], [B, T]
        middle, spread = _moments(thing, area)
        (least, soft), (most, soft_most) = _AREA
        there = (
            torch.sigmoid((area - least) / soft)
            * torch.sigmoid((most - area) / soft_most)
            * torch.sigmoid((_SPREAD[0] - spread) / _SPREAD[1])
        )  # [B, T]
        sharp = thing.square().sum((-2, -1)) / (area + 1)
        steady = (-(area.diff(dim=1) / (_CHANGE * area.mean(1, keepdim=True) + 1)).square()).exp()
        even = (-(middle.diff(n=2, dim=1) / _TURN).square().sum(-1)).exp()  # [B, T - 2]
        raw = torch.stack(
            (
                (there * sharp).mean(1),
                (there[:, 1:-1] * steady[:, 1:] * even).mean(1),
                (area / (areas.sum(0) + least)).mean(1),
            ),
            dim=1,
        )
        return self._normalise.to(video.device)(raw)


def _shares(video: Tensor) -> Tensor:
    """How much each pixel has of each of the world's colours: [colours, B, T, H, W] in [0, 1]."""
    chroma = video - video.mean(2, keepdim=True)
    shares = []
    for paint in COLOURS.values():
        own = torch.tensor(paint, device=video.device)
        own = own - own.mean()
        size = own.norm()
        along = torch.einsum("bcthw,c->bthw", chroma.transpose(1, 2), own / size)
        aside = (chroma.square().sum(2) - along.square()).clamp(min=1e-6).sqrt()
        share = torch.sigmoid(((along - 1.5 * aside) / size - _LEAST) / _EDGE)
        shares.append((share - _TAIL).clamp(min=0) / (1 - _TAIL))
    return torch.stack(shares)


def _moments(thing: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """Middles [B, T, 2] in pixels and spreads around them [B, T], 1 for a disc, of shares [B, T, H, W]."""
    rows = torch.arange(thing.shape[-2], device=thing.device) + 0.5
    columns = torch.arange(thing.shape[-1], device=thing.device) + 0.5
    mass = area + 1
    y, x = thing.sum(-1) @ rows / mass, thing.sum(-2) @ columns / mass
    around = (rows[:, None] - y[..., None, None]).square() + (columns - x[..., None, None]).square()
    return torch.stack((x, y), -1), (thing * around).sum((-2, -1)) / mass * (2 * torch.pi) / mass
