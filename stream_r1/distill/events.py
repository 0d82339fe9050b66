"""What a trainer tells while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from stream_r1.distill.weighting import Weights


@dataclass(frozen=True)
class Preview:
    """What the reward saw in a generator update (its last micro-batch).

    Of processes that share the samples, each has the video of those that it decoded, the first process of the
    first ones; None where there are none left for it.
    """

    prompts: list[str]
    video: Tensor | None  # [b, T, 3, H, W] in [0, 1]; alone, b = B
    weights: Weights


@dataclass(frozen=True)
class StepDone:
    """One step's numbers. `step` counts from 1 to `steps`; the parts of `seconds` add up to the step."""

    step: int
    steps: int
    scalars: dict[str, float]
    seconds: dict[str, float]
    preview: Preview | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path
    why: Literal["interval", "stopped", "finished"]


@dataclass(frozen=True)
class SetAside:
    """A checkpoint was damaged and has another name now; the run resumed from the one at `step`."""

    step: int
    path: Path  # where it is now
    reason: str


@dataclass(frozen=True)
class NotSaved:
    """A checkpoint at an interval could not be written: the run continues and tries again at the next."""

    step: int
    why: str


@dataclass(frozen=True)
class Alarm:
    """The guard found the same fault too often; `kept_step` is that of the student that it keeps."""

    step: int
    reason: str
    kept_step: int
    ends: bool  # the run ends, and exports that student


Event = StepDone | Saved | SetAside | NotSaved | Alarm


def summarise(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Several dictionaries of numbers as one: means, or the extreme where a name's last part is min or max.

    A number that only some of them have is summarised over those.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            values.setdefault(key, []).append(value)
    take = {"min": min, "max": max}
    return {key: take.get(key.rpartition("/")[2], _mean)(found) for key, found in values.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
