"""Watches what the reward cannot move, and keeps the best student when it does move.

A reward that is wrong, or is gamed, raises its own score and takes something else: colours, sharpness,
motion. The guard looks at videos of fixed prompts and noise that the student makes as the training goes, so
that a look differs from the first one by the training alone.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stream_r1.config import Settings

Ratio = Annotated[float, Field(ge=0)]
Bounds = tuple[Ratio, Ratio]
_REMEMBERED = 50  # updates whose sizes are compared


class GuardSettings(Settings):
    """What may change while a student is trained.

    every: updates of the student between two looks.
    videos: that a look makes, of the first prompts and always the same noise.
    saturation, sharpness, motion: the least and the greatest share of the first look's figure.
    fall: share of the first look's figure that each of them may lose while the reward's mean rises.
    critic_loss: the greatest share of the critic's loss before the first look after the start.
    update: the greatest norm of the student's gradients over their median of the last updates.
    patience: looks in a row that have to find fault.
    then: "stop" ends the run, "warn" says so and goes on; either way the student of the last look without
        fault is kept, and it is what is exported after a stop.
    """

    every: Annotated[int, Field(ge=1)] = 10
    videos: Annotated[int, Field(ge=1, le=4096)] = 8
    saturation: Bounds = (0.8, 1.25)
    sharpness: Bounds = (0.7, 4.0)
    motion: Bounds = (0.6, 4.0)
    fall: Annotated[float, Field(ge=0, le=1)] = 0.1
    critic_loss: Ratio = 4.0
    update: Ratio = 20.0
    patience: Annotated[int, Field(ge=1)] = 2
    then: Literal["stop", "warn"] = "stop"

    @model_validator(mode="after")
    def _bounds_rise(self) -> GuardSettings:
        for name in FIGURES:
            low, high = getattr(self, name)
            if not low < 1 < high:
                raise ValueError(f"{name}: expected least < 1 < greatest, got {[low, high]}")
        return self


FIGURES = ("saturation", "sharpness", "motion")


def figures_of(video: Tensor) -> dict[str, float]:
    """Means over videos [B, T, 3, H, W] in [0, 1], on any device, without anything learnt.

    saturation: largest less smallest of a pixel's colours. sharpness: mean absolute Laplacian of luma, beside
    its contrast. motion: mean absolute change from frame to frame, likewise.
    """
    video = video.float()
    low, high = torch.aminmax(video, dim=2)
    luma = torch.einsum("btchw,c->bthw", video, video.new_tensor((0.299, 0.587, 0.114)))
    contrast = luma.std((2, 3)).mean().clamp(min=1e-6)
    inner = luma[..., 1:-1, 1:-1]
    laplacian = (
        4 * inner - luma[..., :-2, 1:-1] - luma[..., 2:, 1:-1] - luma[..., 1:-1, :-2] - luma[..., 1:-1, 2:]
    )
    return {
        "saturation": float((high - low).mean()),
        "sharpness": float(laplacian.abs().mean() / contrast),
        "motion": float(luma.diff(dim=1).abs().mean() / contrast) if luma.shape[1] > 1 else 0.0,
    }


class Guard:
    """Judges looks, one after another.

    `alarm` says what is wrong, once something was in `patience` looks in a row; None until then.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.alarm: str | None = None
        self._first: dict[str, float] = {}
        self._faults = 0
        self._updates: list[float] = []
        self._critic: list[float] = []

    def update(self, grad_norm: float, critic_loss: float) -> None:
        """Takes in the numbers of one update of the student; those that are not finite are others' to see."""
        for kept, value in ((self._updates, grad_norm), (self._critic, critic_loss)):
            if math.isfinite(value):
                kept.append(value)
                del kept[:-_REMEMBERED]

    def look(self, figures: dict[str, float]) -> str | None:
        """Judges figures (`FIGURES`, and "reward" where there is one); what is wrong with them, or None.

        The first look is what the others are compared with.
        """
        recent = {"critic_loss": _mean(self._critic[-8:])}
        if not self._first:
            self._first = figures | recent
            return None
        fault = self._fault(figures | recent)
        self._faults = self._faults + 1 if fault else 0
        if fault and self._faults >= self.settings.patience:
            self.alarm = self.alarm or fault
        return fault

    def _fault(self, now: dict[str, float]) -> str | None:
        first, chosen = self._first, self.settings
        rises = now.get("reward", -math.inf) > first.get("reward", math.inf)
        for name in FIGURES:
            if first[name] <= 0:
                continue
            share, (low, high) = now[name] / first[name], getattr(chosen, name)
            if not low <= share <= high:
                return f"{name} is {share:.2f} of the start's, expected {low:g} to {high:g}"
            if rises and share < 1 - chosen.fall:
                gain = now["reward"] - first["reward"]
                return f"{name} fell to {share:.2f} of the start's while the reward rose by {gain:.2f}"
        if first["critic_loss"] > 0 and now["critic_loss"] > chosen.critic_loss * first["critic_loss"]:
            share = now["critic_loss"] / first["critic_loss"]
            return (
                f"the critic's loss is {share:.1f} times what it was, expected at most {chosen.critic_loss:g}"
            )
        if len(self._updates) >= 8:
            share = median(self._updates[-3:]) / max(median(self._updates), 1e-12)
            if share > chosen.update:
                return f"updates are {share:.1f} times their median, expected at most {chosen.update:g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """What the next looks depend on, as JSON can hold it."""
        return {
            "alarm": self.alarm,
            "first": self._first,
            "faults": self._faults,
            "updates": self._updates,
            "critic": self._critic,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.alarm, self._faults = state["alarm"], state["faults"]
        self._first, self._updates, self._critic = (
            dict(state["first"]),
            list(state["updates"]),
            list(state["critic"]),
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
