"""Settings of the distillation, with the published values as defaults.

A setting's meaning is in its class's docstring as `name: meaning`; the documentation's table of all settings
is generated from that.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stream_r1.config import Count, NotNegative, Positive, Settings, Unit
from stream_r1.distill.run_settings import RunSettings
from stream_r1.distill.weighting import WeightingMode
from stream_r1.models.text import WAN_NEGATIVE_PROMPT

Bounds = tuple[NotNegative, NotNegative]
Frames = Annotated[int, Field(ge=1, le=16384)]  # latent
Side = Annotated[int, Field(ge=1, le=4096)]  # of latents
Timestep = Annotated[float, Field(ge=0, le=1000)]
_MOST_CELLS = 2**27


class OptimizerSettings(Settings):
    """AdamW with clipping by the norm of all gradients.

    lr: learning rate.
    betas: decay of the averages of gradients and of their squares.
    eps: added to the root of the second average.
    weight_decay: decoupled: each step subtracts lr * weight_decay * weight.
    clip: maximum norm of all gradients together.
    """

    lr: Positive
    betas: tuple[Unit, Unit] = (0.0, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.01
    clip: Positive = 10.0

    @model_validator(mode="after")
    def _betas_below_one(self) -> OptimizerSettings:
        if max(self.betas) >= 1:
            raise ValueError(f"betas: expected two numbers in [0, 1), got {list(self.betas)}")
        return self


class LoraSettings(Settings):
    """Low-rank adapters that are trained in place of a network's own weights.

    rank: inner width of an adapter.
    alpha: an adapter's output is scaled by alpha / rank; None: by 1.
    dropout: probability with which an adapter's input is dropped in training.
    targets: linear layers, by the ends of their names.
    """

    rank: Annotated[int, Field(ge=1, le=65536)] = 64
    alpha: Positive | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1, max_length=1000)] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ffn.net.0.proj",
        "ffn.net.2",
    )


class NetworkSettings(OptimizerSettings):
    """How a network is trained: all of it, or adapters.

    lora: train only adapters; None: all weights.
    """

    lora: LoraSettings | None = None


class EmaSettings(Settings):
    """Moving average of the student's weights, from step `start` on; before, the average is the student.

    decay: of the average, per update of the student.
    start: step from which it averages.
    """

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    start: Annotated[int, Field(ge=0)] = 200


class RolloutSettings(Settings):
    """What the student generates in training: latents [frames, channels, height, width] in few steps.

    frames: latent frames; 1 + 4 (frames - 1) pixel frames.
    length: frames of a whole rollout, or their minimum and maximum, drawn for every update; the losses see
        the last `frames`. None: the same as `frames`.
    height, width: of the latents; an eighth of the pixels'.
    steps: the student's timesteps before the shift, decreasing.
    shift: of the schedule, for the steps and for the timesteps of the loss.
    context_noise: timestep of the cache-update pass; 0 is clean.
    gradient_checkpointing: recompute a block's activations in the backward instead of keeping them.
    keep_attention: but keep what self-attention gave: as much again as checkpointing keeps, and less time.
    """

    frames: Frames = 21
    length: Frames | tuple[Frames, Frames] | None = None
    height: Side = 60
    width: Side = 104
    steps: Annotated[tuple[Timestep, ...], Field(min_length=1, max_length=1000)] = (1000, 750, 500, 250)
    shift: Positive = 5.0
    context_noise: Timestep = 0.0
    gradient_checkpointing: bool = False
    keep_attention: bool = True

    @model_validator(mode="after")
    def _small_enough(self) -> RolloutSettings:
        cells = self.frames * self.height * self.width
        if cells > _MOST_CELLS:
            raise ValueError(
                f"frames x height x width: expected at most {_MOST_CELLS} cells of latents, got {cells}"
            )
        return self

    @model_validator(mode="after")
    def _steps_fall(self) -> RolloutSettings:
        if not all(a > b for a, b in itertools.pairwise((*self.steps, 0))):
            raise ValueError(f"steps: expected falling timesteps in (0, 1000], got {list(self.steps)}")
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the greatest length."""
        if self.length is None:
            return self.frames, self.frames
        return (self.length, self.length) if isinstance(self.length, int) else self.length

    def lengths(self, chunk: int, first: int | None) -> list[int]:
        """Lengths of whole chunks that may be drawn; the first chunk has `first` frames, or `chunk`.

        Raises ValueError for frames or lengths that end inside of a chunk, or lengths that are too short.
        """
        first = chunk if first is None else first
        if self.frames < first or (self.frames - first) % chunk:
            wholes = ", ".join(str(first + chunk * n) for n in range(1, 8))
            raise ValueError(
                f"rollout.frames: expected whole chunks of {chunk} latent frames ({wholes}, ...), "
                f"got {self.frames}"
            )
        low, high = self.bounds
        if not self.frames <= low <= high or (low - self.frames) % chunk or (high - low) % chunk:
            raise ValueError(
                f"rollout.length: expected {self.frames} + a multiple of {chunk}, or two such numbers, "
                f"rising, got {self.length}"
            )
        return list(range(low, high + 1, chunk))


class GuidanceSettings(Settings):
    """Guidance of the teacher.

    guidance_scale: uncond + scale (cond - uncond), as diffusers counts; 1 is no guidance.
    negative_prompt: the text that it leads away from, or "wan" for the one that Wan's teachers are used with.
    """

    guidance_scale: Annotated[float, Field(ge=1)] = 4.0
    negative_prompt: str = ""

    @property
    def negative_text(self) -> str:
        """The negative prompt in full."""
        return WAN_NEGATIVE_PROMPT if self.negative_prompt == "wan" else self.negative_prompt

    @model_validator(mode="before")
    @classmethod
    def _tell_the_new_key(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("guidance"), int | float):
            scale = data["guidance"] + 1
            raise ValueError(f"guidance: is 1 less than guidance_scale, write guidance_scale: {scale}")
        return data


class MatchingSettings(GuidanceSettings):
    """How the predictions of teacher and critic are compared.

    guidance_scale: uncond + scale (cond - uncond), as diffusers counts; 1 is no guidance.
    negative_prompt: the text that it leads away from, or "wan" for the one that Wan's teachers are used with.
    timestep_low, timestep_high: the timesteps at which scores are compared are clamped to these.
    """

    timestep_low: Timestep = 20.0
    timestep_high: Timestep = 980.0

    @model_validator(mode="after")
    def _low_below_high(self) -> MatchingSettings:
        if not 0 < self.timestep_low < self.timestep_high:
            raise ValueError(
                "timestep_low, timestep_high: expected 0 < low < high, "
                f"got {self.timestep_low} and {self.timestep_high}"
            )
        return self


class WeightingSettings(Settings):
    """Arguments of `StreamR1Weights`.

    mode: what of the reward is used; "uniform" is plain DMD, "re-dmd" Reward Forcing, "full" Stream-R1.
    beta: a sample counts exp(beta * (mean of its scores - balance * P)).
    balance: strength of the penalty P on axes that improve unevenly.
    history: past updates from which P is computed; it is 0 until there are as many.
    temperature: of the softmax over axes; with a lower one, a weak axis gets more of the saliency.
    spatial_floor, temporal_floor: minimum weight of a cell and of a frame, before the mean is set to 1.
    spatial_strength, temporal_strength: how far weights may differ from uniform; 0: uniform.
    log_bound: the logarithm of a sample's weight is clamped to +- this; None: not clamped, as published.
    motion_axis: the axis that "re-dmd" reads.
    samples_at_once: how many samples the reward sees at a time; None: all of a batch.
    """

    mode: WeightingMode = "full"
    beta: NotNegative = 2.0
    balance: NotNegative = 0.5
    history: Annotated[int, Field(ge=2, le=10**6)] = 50
    temperature: Positive = 1.0
    spatial_floor: Unit = 0.15
    temporal_floor: Unit = 0.2
    spatial_strength: Unit = 1.0
    temporal_strength: Unit = 1.0
    log_bound: Positive | None = 8.0
    motion_axis: str = "MQ"
    samples_at_once: Count | None = None


class GuardSettings(Settings):
    """Limits of what may change while a student is trained.

    every: updates of the student between two checks.
    videos: made for a check, of the first prompts and always the same noise.
    saturation, sharpness, motion: minimum and maximum, as a share of the first check's figure.
    fall: share of the first check's figure that each of them may lose while the reward's mean rises.
    critic_loss: maximum, as a multiple of the critic's loss before the second check.
    update: maximum norm of the student's gradients, as a multiple of their median over the last updates.
    patience: checks in a row that must find a fault before the alarm.
    then: "stop" ends the run, "warn" warns and continues; either way the student of the last check
        without a fault is kept, and it is exported after a stop.
    """

    every: Count = 10
    videos: Annotated[int, Field(ge=1, le=4096)] = 8
    saturation: Bounds = (0.8, 1.25)
    sharpness: Bounds = (0.7, 4.0)
    motion: Bounds = (0.6, 4.0)
    fall: Unit = 0.1
    critic_loss: Positive = 4.0
    update: Positive = 20.0
    patience: Annotated[int, Field(ge=1)] = 2
    then: Literal["stop", "warn"] = "stop"

    @model_validator(mode="after")
    def _bounds_rise(self) -> GuardSettings:
        for name in ("saturation", "sharpness", "motion"):
            low, high = getattr(self, name)
            if not low < 1 < high:
                raise ValueError(f"{name}: expected least < 1 < greatest, got {[low, high]}")
        return self


class DistillSettings(RunSettings):
    """One distillation run.

    A step is one critic update; every `critic_updates`-th step, the generator is updated first.

    batch: samples of an update, over all processes.
    accumulation: micro-batches of a process's share of the batch.
    critic_updates: critic updates for one update of the student.
    critic_warmup: steps at the start in which only the critic is trained.
    student, critic: how each is trained.
    ema: moving average of the student.
    rollout: what the student generates.
    matching: how teacher and critic are compared.
    weighting: how the reward weights the loss.
    guard: limits of what may change while the student is trained; None: no guard, as published. The guard
        changes no update.
    """

    batch: Annotated[int, Field(ge=1, le=2**20)] = 64
    accumulation: Count = 1
    critic_updates: Count = 5
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    student: NetworkSettings = NetworkSettings(lr=2e-6)
    critic: NetworkSettings = NetworkSettings(lr=4e-7)
    ema: EmaSettings = EmaSettings()
    rollout: RolloutSettings = RolloutSettings()
    matching: MatchingSettings = MatchingSettings()
    weighting: WeightingSettings = WeightingSettings()
    guard: GuardSettings | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> DistillSettings:
        if self.batch % self.accumulation:
            raise ValueError(
                f"accumulation: expected a divisor of batch {self.batch}, got {self.accumulation}"
            )
        if self.critic_warmup >= self.steps:
            raise ValueError(
                f"critic_warmup: expected less than steps {self.steps}, got {self.critic_warmup}: "
                "the generator would never learn"
            )
        return self


class InitSettings(RunSettings):
    """Training of a student's initialization: ODE regression or teacher forcing.

    batch: samples of an update, over all processes.
    accumulation: micro-batches of a process's share of the batch.
    optimizer: how the student is trained.
    lora: train only adapters; None: all weights.
    warmup: steps over which the learning rate rises.
    ema: moving average of the weights, which is what is exported.
    gradient_checkpointing: recompute a block's activations in the backward instead of keeping them.
    keep_attention: as `rollout.keep_attention` of a distillation.
    """

    batch: Annotated[int, Field(ge=1, le=2**20)] = 64
    accumulation: Count = 1
    optimizer: OptimizerSettings = OptimizerSettings(lr=2e-6, betas=(0.9, 0.999), clip=10.0)
    lora: LoraSettings | None = None
    warmup: Annotated[int, Field(ge=0)] = 0
    ema: EmaSettings = EmaSettings(decay=0.99, start=0)
    gradient_checkpointing: bool = False
    keep_attention: bool = True

    @model_validator(mode="after")
    def _whole_parts(self) -> InitSettings:
        if self.batch % self.accumulation:
            raise ValueError(
                f"accumulation: expected a divisor of batch {self.batch}, got {self.accumulation}"
            )
        return self
