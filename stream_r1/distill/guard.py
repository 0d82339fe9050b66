"""Watches figures that the reward does not optimize, and keeps the best student if they degrade.

A reward that is wrong, or is gamed, raises its own score at the cost of something else: colours, sharpness,
motion. The guard checks videos of fixed prompts and noise that the student makes during the training, so a
check differs from the first one only by the training.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from stream_r1.distill.settings import GuardSettings
from stream_r1.distill.verification import DamagedCheckpointError
from stream_r1.pixels import chroma, laplacian, luma

_REMEMBERED = 50  # updates whose sizes are compared
FIGURES = ("saturation", "sharpness", "motion")


def figures_of(video: Tensor) -> dict[str, float]:
    """Means over videos [B, T, 3, H, W] in [0, 1], on any device, without anything learnt.

    saturation: largest less smallest of a pixel's colours. sharpness: mean absolute Laplacian of luma, beside
    its contrast. motion: mean absolute change from frame to frame, likewise.
    """
    video = video.float()
    grey = luma(video)
    contrast = grey.std((2, 3)).mean().clamp(min=1e-6)
    return {
        "saturation": float(chroma(video).mean()),
        "sharpness": float(laplacian(grey).abs().mean() / contrast),
        "motion": float(grey.diff(dim=1).abs().mean() / contrast) if grey.shape[1] > 1 else 0.0,
    }


class _State(BaseModel):
    """What later checks depend on."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    alarm: str | None = None
    faults: int = 0
    first: dict[str, float] = {}
    updates: list[float] = []
    critic: list[float] = []
    kept_step: int = 0


class Guard:
    """Runs the checks, one after another.

    `kept` are the student's weights, by name, at the last check without a fault; the trainer puts them there.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.kept: dict[str, Tensor] = {}
        self._state = _State()

    @property
    def alarm(self) -> str | None:
        """What was wrong in `patience` checks in a row; None until then."""
        return self._state.alarm

    @property
    def stops(self) -> bool:
        """Whether the run is to end."""
        return self.alarm is not None and self.settings.then == "stop"

    @property
    def kept_step(self) -> int:
        """The step that `kept` is of."""
        return self._state.kept_step

    def keep(self, weights: dict[str, Tensor], step: int) -> None:
        """Takes the weights of a student whose check found no fault."""
        self.kept = {name: value.detach().float().clone() for name, value in weights.items()}
        self._state.kept_step = step

    def update(self, grad_norm: float, critic_loss: float) -> None:
        """Takes in the numbers of one update of the student; those that are not finite are ignored here."""
        for values, value in ((self._state.updates, grad_norm), (self._state.critic, critic_loss)):
            if math.isfinite(value):
                values.append(value)
                del values[:-_REMEMBERED]

    def check(self, figures: dict[str, float]) -> str | None:
        """Checks figures (`FIGURES`, and "reward" where there is one); what is wrong with them, or None.

        The first check is what the others are compared with.
        """
        state = self._state
        recent = {"critic_loss": _mean(state.critic[-8:])}
        if not state.first:
            state.first = figures | recent
            return None
        if not state.first["critic_loss"]:  # the first check was before any update
            state.first["critic_loss"] = recent["critic_loss"]
        fault = self._fault(figures | recent)
        state.faults = state.faults + 1 if fault else 0
        if fault and state.faults >= self.settings.patience:
            state.alarm = state.alarm or fault
        return fault

    def _fault(self, now: dict[str, float]) -> str | None:
        first, chosen = self._state.first, self.settings
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
        updates = self._state.updates
        if len(updates) >= 8:
            share = median(updates[-3:]) / max(median(updates), 1e-12)
            if share > chosen.update:
                return f"updates are {share:.1f} times their median, expected at most {chosen.update:g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """What later checks depend on except `kept`, as JSON can hold it."""
        return self._state.model_dump()

    def load_state_dict(self, state: dict[str, Any], kept: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave, and `kept`."""
        self._state, self.kept = _State.model_validate(state), kept


def require_guard(state: Any, source: str) -> None:
    """Raises DamagedCheckpointError for what is no `state_dict` of a guard."""
    try:
        _State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedCheckpointError(f"{source}.{where}: {first['msg'].lower()}") from None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
