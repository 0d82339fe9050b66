"""A distillation small enough for tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_models import LetterEncoder, StretchDecoder, tiny_student, tiny_teacher
from toy_rewards import SmoothReward

from stream_r1.distill.events import StepDone
from stream_r1.distill.settings import DistillSettings
from stream_r1.distill.trainer import DistillTrainer

PROMPTS = ["a red fox", "bright sky", "rabbit", "red barn", "still lake"]
SETTINGS: dict[str, Any] = {
    "steps": 4,
    "batch": 2,
    "critic_updates": 2,
    "student": {"lr": 1e-2},
    "critic": {"lr": 1e-2},
    "ema": {"decay": 0.5, "start": 1},
    "rollout": {"frames": 6, "height": 4, "width": 6, "steps": [1000, 500]},
    "weighting": {"history": 2},
    "checkpoint_every": 100,
}


def settings(base: Mapping[str, Any] = SETTINGS, **changes: Any) -> DistillSettings:
    """`base` but for `changes`; a group of settings keeps what is not named."""
    groups = {key: base.get(key, {}) | group for key, group in changes.items() if isinstance(group, dict)}
    return DistillSettings.model_validate({**base, **changes, **groups})


def trainer(chosen: DistillSettings, folder: Path | None = None, **parts: Any) -> DistillTrainer:
    """parts: DistillTrainer's arguments; those that are not given, or None, are the smallest there are."""
    smallest: dict[str, Any] = {
        "student": tiny_student(num_layers=1),
        "teacher": tiny_teacher(),
        "prompts": PROMPTS,
        "text_encoder": LetterEncoder(),
        "vae": StretchDecoder(),
        "reward": SmoothReward(),
    }
    given = {name: part for name, part in parts.items() if part is not None}
    return DistillTrainer(chosen, folder=folder, **(smallest | given))


def numbers(run: Any) -> list[dict[str, float]]:
    """Of every step, as it runs to its end."""
    return [event.scalars for event in run.run() if isinstance(event, StepDone)]
