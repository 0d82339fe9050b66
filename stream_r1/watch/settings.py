"""What of a run is watched, how often, and where it goes."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Literal

from pydantic import Field

from stream_r1.config import Settings, SettingsError

Count = Annotated[int, Field(ge=1)]


class WandbSettings(Settings):
    """A run on Weights & Biases.

    project, entity, name: where the run is kept and what it is called; None: wandb's own choice.
    mode: "offline" keeps it in the run's folder until `wandb sync`.
    """

    project: Annotated[str, Field(min_length=1)]
    entity: str | None = None
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class WatchSettings(Settings):
    """How a run is watched; none of it changes the training. metrics.csv has every step, always.

    every: steps that TensorBoard and wandb get as one, summarised.
    sample_every: steps between sample videos, and between maps of the reward's saliency and the weights; 0
        for none.
    prompts: of the sample videos; None: the first two of the training's.
    seed: of the sample videos' noise.
    fps: frames a second at which they play.
    tensorboard: event files in the run's folder.
    wandb: a run on Weights & Biases too; None: no.
    """

    every: Count = 1
    sample_every: Annotated[int, Field(ge=0)] = 50
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    tensorboard: bool = True
    wandb: WandbSettings | None = None

    def require_packages(self) -> None:
        """Refuse, before any work, what needs a package that is not installed."""
        for asked, package, key, instead in (
            (self.tensorboard, "tensorboard", "watch.tensorboard", "watch.tensorboard=false"),
            (self.wandb is not None, "wandb", "watch.wandb", "watch.wandb=null"),
        ):
            if asked and importlib.util.find_spec(package) is None:
                raise SettingsError(
                    f"{key}: needs the package {package}, which is not installed: "
                    f"pip install {package}, or go without: {instead}"
                )
