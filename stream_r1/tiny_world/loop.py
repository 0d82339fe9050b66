"""One resumable training loop for the tiny world's models.

Muon for matrices and kernels, AdamW for the rest, a moving average of the weights, and a learning rate that
is constant after a warm-up and falls over the last part: a finished run can continue with more steps.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from stream_r1.config import Settings, SettingsError
from stream_r1.disk.fingerprint import fingerprint
from stream_r1.disk.origin import changes
from stream_r1.disk.whole import written
from stream_r1.distill.optimizer_step import OptimizerStep
from stream_r1.distill.precision import computing_in
from stream_r1.distill.run_state import trained
from stream_r1.distill.stopping import StopRequest
from stream_r1.messages import shown, some
from stream_r1.tiny_world.muon import Muon

log = logging.getLogger(__name__)

_ANY_TIME = {"steps", "save_seconds", "log_steps"}  # what may change between two runs
_PLACES = {"out", "work", "latents", "vae", "start", "teacher"}


class LoopSettings(Settings):
    """How long and how fast to train.

    steps: optimizer steps in all.
    lr: learning rate of Muon and AdamW alike.
    warmup: steps over which the rate rises.
    decay: last share of the steps, over which the rate falls linearly to a fiftieth.
    ema: decay of the weights' average, reached gradually.
    clip: largest norm of all gradients together.
    weight_decay: decoupled, of what Muon trains.
    bfloat16: matrix products of the model and of Muon in bfloat16, for machines that are faster at it.
    seed: of everything that is drawn.
    save_seconds: seconds between two saves of the state.
    log_steps: steps between two lines of the log.
    """

    steps: int = Field(gt=0)
    lr: float = Field(gt=0)
    warmup: int = Field(default=30, ge=0)
    decay: float = Field(default=0.6, ge=0, le=1)
    ema: float = Field(default=0.998, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    bfloat16: bool = False
    seed: int = 0
    save_seconds: float = Field(default=120, gt=0)
    log_steps: int = Field(default=50, gt=0)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        left = (self.steps - step) / self.steps
        falling = 1.0 if self.decay == 0 else min(1.0, left / self.decay)
        rising = 1.0 if self.warmup == 0 else min(1.0, (step + 1) / self.warmup)
        return self.lr * rising * max(0.02, falling)


def origin(settings: Settings, start: str | None = None, clips: str = "") -> dict[str, Any]:
    """What decides a training's outcome besides the loop's settings: its own, without where things lie, and
    what lies there.

    Args:
        settings: of the training.
        start: folder of the weights that it starts with.
        clips: what tells the clips from others.
    """
    inputs = {"start": start and fingerprint([Path(start)]), "clips": clips}
    return {**settings.model_dump(mode="json", exclude={*_PLACES, "training"}), **inputs}


class Loop:
    """A model, its optimizers, its average and its random numbers, saved as one file.

    Args:
        model: what is trained; parameters that do not require gradients stay as they are.
        settings: how.
        state: file that holds the state; there from an earlier run, the loop resumes from it.
        is_matrix: which named parameters Muon trains; None: hidden ones of two or more dimensions.
        origin: what else decides the outcome, from `origin`; a state that has another one is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: LoopSettings,
        state: Path,
        is_matrix: Callable[[str, Tensor], bool] | None = None,
        origin: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.settings, self.path = model, settings, state
        self._origin = {**(origin or {}), **settings.model_dump(exclude=_ANY_TIME)}
        self.step = 0
        self.generator = torch.Generator().manual_seed(settings.seed)
        chosen = is_matrix or (lambda name, p: p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 16)
        self._parameters = trained(model)
        named = self._parameters.items()
        self._optimizer_step = OptimizerStep(
            "model",
            Muon([p for n, p in named if chosen(n, p)], settings.lr, weight_decay=settings.weight_decay),
            torch.optim.AdamW(
                [p for n, p in named if not chosen(n, p)], settings.lr, betas=(0.9, 0.95), weight_decay=0.0
            ),
            parameters=list(self._parameters.values()),
            clip=settings.clip,
        )
        self.average = {name: p.detach().clone() for name, p in named}
        if state.exists():
            self._load()

    def run(self, loss: Callable[[], tuple[Tensor, dict[str, float]]]) -> Iterator[int]:
        """Train until `steps`; yields the step number after each. ``loss`` draws its batch from
        ``generator``.

        Ctrl-C and SIGTERM finish the step under way and save the state before they do what they do.

        Raises:
            DivergedError: the loss or its gradient is not finite.
        """
        settings, started, first = self.settings, time.monotonic(), self.step
        saved, shown = started, dict[str, float]()
        with StopRequest() as stop:
            while self.step < settings.steps and not stop.signal:
                with self._precision():
                    value, figures = loss()
                value.backward()
                self._update(value.detach())
                for name, figure in {"loss": value.item(), **figures}.items():
                    shown[name] = figure if name not in shown else 0.95 * shown[name] + 0.05 * figure
                if self.step % settings.log_steps == 0:
                    pace = (time.monotonic() - started) / (self.step - first)
                    figures_text = " ".join(f"{name} {figure:.4f}" for name, figure in shown.items())
                    log.info("step %d/%d  %s  %.2f s a step", self.step, settings.steps, figures_text, pace)
                if time.monotonic() - saved > settings.save_seconds or self.step == settings.steps:
                    self.save()
                    saved = time.monotonic()
                yield self.step
        if stop.signal:
            self.save()
            signal.raise_signal(stop.signal)

    def _precision(self) -> torch.autocast:
        return computing_in("bfloat16" if self.settings.bfloat16 else "float32", torch.device("cpu"))

    def _update(self, loss: Tensor) -> None:
        for optimizer in self._optimizer_step.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.rate(self.step)
        with self._precision():
            self._optimizer_step(self.step + 1, [loss], {})
        self.step += 1
        keep = min(self.settings.ema, self.step / (self.step + 9))
        for name, p in self._parameters.items():
            self.average[name].lerp_(p.detach(), 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and their average: once at the end, or twice around a look."""
        for name, p in self._parameters.items():
            kept = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name] = kept

    def save(self) -> None:
        """Write the state, whole or not at all."""
        state = {
            "step": self.step,
            "origin": self._origin,
            "generator": self.generator.get_state(),
            "model": self._parameters,
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizer_step.optimizers],
        }
        with written(self.path) as place:
            torch.save(state, place)

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        if list(state["average"]) != list(self._parameters):
            raise SettingsError(
                f"{self.path}: holds another model's training state; remove it or name another folder"
            )
        if "origin" not in state:
            raise SettingsError(
                f"{self.path}: written by an earlier version; remove it or name another folder"
            )
        changed = [
            f"{key} was {shown(was)}, is {shown(now)}"
            for key, was, now in changes(state["origin"], self._origin)
        ]
        if changed:
            raise SettingsError(
                f"{self.path}: holds the state of another training ({some(changed)}); "
                "remove it or name another folder"
            )
        if state["step"] > self.settings.steps:
            raise SettingsError(
                f"training.steps: expected at least {state['step']}, which {self.path} has done, "
                f"got {self.settings.steps}"
            )
        self.step = state["step"]
        self.generator.set_state(state["generator"])
        with torch.no_grad():
            for name, p in self._parameters.items():
                p.copy_(state["model"][name])
                self.average[name].copy_(state["average"][name])
        for optimizer, saved in zip(self._optimizer_step.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        log.info("%s: resuming from step %d", self.path, self.step)
