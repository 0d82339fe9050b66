"""Training of a student's initialization: the trainer that ODE regression and teacher forcing share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stream_r1.clock import Clock
from stream_r1.distill.events import StepDone
from stream_r1.distill.loop import TrainingLoop
from stream_r1.distill.noise import SampleNoise
from stream_r1.distill.optimizers import make_adamw
from stream_r1.distill.order import ShuffledOrder
from stream_r1.distill.ranks import Ranks
from stream_r1.distill.rollout import begin_rollout, self_rollout
from stream_r1.distill.run_state import Ema, RunState
from stream_r1.distill.settings import InitSettings, RolloutSettings
from stream_r1.models.autoencoder import Decoder
from stream_r1.models.recompute import enable_checkpointing
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.schedule import FlowSchedule


class Objective(Protocol):
    """What an initialization is trained on: data, and a loss on some of it."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    @property
    def latent_shape(self) -> torch.Size:
        """[F, C, h, w] of a sample."""
        ...

    def loss(self, student: CausalWanTransformer, indices: list[int], noise: SampleNoise) -> Tensor:
        """A scalar, the mean over the samples named; what is random comes from `noise`, a stream a sample."""
        ...


@dataclass(frozen=True)
class Samples:
    """What sample videos of a start are made with.

    vae: decodes them.
    texts: [1, L, D] of every prompt.
    rollout: their size, the student's steps and the shift.
    """

    vae: Decoder
    texts: dict[str, Tensor]
    rollout: RolloutSettings


class InitTrainer(TrainingLoop):
    """Trains a causal student on an objective, resumable bit for bit.

        for event in InitTrainer(settings, student, OdeRegression(pairs), folder="out/ode").run():
            show(event)

    Args:
        settings: see `InitSettings`.
        student: is trained in place.
        objective: `OdeRegression` or `TeacherForcing`.
        folder: where checkpoints go and come from; None keeps none.
        ranks: see `DistillTrainer`.
        samples: for sample videos; None: there are none.
        origin: see `DistillTrainer`.
    """

    def __init__(
        self,
        settings: InitSettings,
        student: CausalWanTransformer,
        objective: Objective,
        *,
        folder: Path | str | None = None,
        ranks: Ranks | None = None,
        samples: Samples | None = None,
        origin: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(settings, folder, ranks)
        self.settings = settings
        self.student = student.train()
        self._adapt("student", self.student, settings.lora)
        self._shard_models([self.student], settings.batch, settings.accumulation, len(objective))
        if settings.gradient_checkpointing:
            enable_checkpointing(student, keep_attention=settings.keep_attention)
        self.objective = objective
        self.samples = samples
        self.vae = samples.vae if samples is not None else None
        self.prompts = list(samples.texts) if samples is not None else []
        self.device = next(student.parameters()).device
        optimizer = make_adamw(student, settings.optimizer)
        state = RunState(
            {"student": student},
            {"optimizer": ("student", optimizer)},
            Ema(student, settings.ema.decay, settings.ema.start),
            ShuffledOrder(len(objective), settings.seed),
            torch.Generator().manual_seed(settings.seed),
        )
        self._begin(state, **origin or {}, objective=type(objective).__name__)
        self.step_student = self._optimizer_step("student", optimizer, settings.optimizer.clip)

    def _step(self) -> StepDone:
        clock, scalars, losses = Clock(self.device), dict[str, float](), []
        indices = self.state.order.draw(self.settings.batch)
        seeds = torch.randint(2**62, (self.settings.batch,), generator=self.state.random).tolist()
        size = self.settings.batch // self.ranks.parts // self.settings.accumulation
        own = self.ranks.part * size * self.settings.accumulation  # this rank's first sample
        for start in range(own, own + size * self.settings.accumulation, size):
            noise = SampleNoise(seeds[start : start + size], self.device)
            self._seed_dropout(seeds[start:])
            with clock.part("forward"), self._precision():
                loss = self.objective.loss(self.student, indices[start : start + size], noise)
            with clock.part("backward"):
                (loss / self.settings.accumulation).backward()
            losses.append(loss.detach())
        with clock.part("optimizer"):
            lr = self.settings.optimizer.lr * min(1.0, (self.step + 1) / max(1, self.settings.warmup))
            for group in self.step_student.optimizers[0].param_groups:
                group["lr"] = lr
            if self.step_student(self.step + 1, losses, scalars):
                self.ema.update(self.step)
        config: Any = self.student.config
        frames, _, height, width = self.objective.latent_shape
        patches = frames * height * width // math.prod(config.patch_size)
        scalars["tokens"] = float(self.settings.batch * patches)
        self.state.step += 1
        return StepDone(self.step, self.settings.steps, scalars, clock.all_parts())

    def _sample(self, prompts: list[str], seeds: list[int]) -> Tensor:
        if self.samples is None:
            raise ValueError("InitTrainer.sample: the trainer was made without samples")
        size, config = self.samples.rollout, self.student.config
        channels: int = config.in_channels  # type: ignore[attr-defined]
        schedule = FlowSchedule(size.shift)
        steps = schedule.denoising_steps(size.steps)
        text = torch.cat([self.samples.texts[prompt] for prompt in prompts]).to(self.device, torch.float32)
        noise = SampleNoise(seeds, self.device)
        rollout = begin_rollout(
            self.student,
            self.student.encode_text(text),
            (len(noise), size.height, size.width),
            max_frames=size.frames,
            schedule=schedule,
            steps=steps,
            exit_step=len(steps) - 1,
            renoise=noise.randn_like,
            context_noise=size.context_noise,
        )
        latents = noise.randn(size.frames, channels, size.height, size.width)
        return self_rollout(rollout, latents, grad=False)


def per_chunk(values: Tensor, student: CausalWanTransformer, frames: int) -> Tensor:
    """One value a chunk [B, at least as many as there are] -> one a frame [B, frames]."""
    config: Any = student.config
    lead = config.frames_per_chunk - (config.first_chunk_frames or config.frames_per_chunk)
    chunk = (torch.arange(frames, device=values.device) + lead) // config.frames_per_chunk
    return values[:, chunk]
