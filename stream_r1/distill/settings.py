"""Settings of the distillation, with the published values as defaults."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stream_r1.config import Settings
from stream_r1.distill.precision import Precision
from stream_r1.distill.weighting import WeightingMode
from stream_r1.models.text import WAN_NEGATIVE_PROMPT

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Unit = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Timestep = Annotated[float, Field(ge=0, le=1000)]


class OptimizerSettings(Settings):
    """AdamW with clipping by the norm of all gradients."""

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

    alpha: an adapter's part is multiplied by alpha / rank; None: by 1.
    dropout: share of an adapter's input that is left out where gradients go.
    targets: linear layers, by the ends of their names.
    """

    rank: Count = 64
    alpha: Positive | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ffn.net.0.proj",
        "ffn.net.2",
    )


class NetworkSettings(OptimizerSettings):
    """How a network is trained: all of it, or adapters."""

    lora: LoraSettings | None = None


class EmaSettings(Settings):
    """Moving average of the student's weights, from step `start` on; before, the average is the student."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    start: Annotated[int, Field(ge=0)] = 200


class RolloutSettings(Settings):
    """What the student makes in training: latents [frames, channels, height, width] in few steps.

    length: frames that it makes in all, or the least and the most of them, drawn for every update; the losses
        see the last `frames`. None: no more than these.
    """

    frames: Count = 21
    length: Count | tuple[Count, Count] | None = None
    height: Count = 60
    width: Count = 104
    steps: Annotated[tuple[Timestep, ...], Field(min_length=1)] = (1000, 750, 500, 250)
    shift: Positive = 5.0
    context_noise: Timestep = 0.0
    gradient_checkpointing: bool = False

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


class MatchingSettings(Settings):
    """How the scores are compared. guidance: a conventional scale minus 1; negative_prompt: the text that it
    leads away from, or "wan" for the one that Wan's teachers are used with."""

    guidance: NotNegative = 3.0
    negative_prompt: str = ""
    timestep_low: Timestep = 20.0
    timestep_high: Timestep = 980.0

    @property
    def negative_text(self) -> str:
        """The negative prompt in full."""
        return WAN_NEGATIVE_PROMPT if self.negative_prompt == "wan" else self.negative_prompt

    @model_validator(mode="after")
    def _low_below_high(self) -> MatchingSettings:
        if not 0 < self.timestep_low < self.timestep_high:
            raise ValueError(
                "timestep_low, timestep_high: expected 0 < low < high, "
                f"got {self.timestep_low} and {self.timestep_high}"
            )
        return self


class WeightingSettings(Settings):
    """Arguments of `StreamR1Weights`."""

    mode: WeightingMode = "full"
    beta: NotNegative = 2.0
    balance: NotNegative = 0.5
    history: Annotated[int, Field(ge=2)] = 50
    temperature: Positive = 1.0
    spatial_floor: Unit = 0.15
    temporal_floor: Unit = 0.2
    spatial_strength: Unit = 1.0
    temporal_strength: Unit = 1.0
    log_bound: Positive | None = 8.0
    motion_axis: str = "MQ"
    samples_at_once: Count | None = None


class DistributedSettings(Settings):
    """How a run that a launcher started as several processes divides its models among them.

    shard: "none": every process holds every model, gradients are averaged; "full": each holds a part of every
        model, its gradients, optimizer and average; "hybrid": `replicas` groups, each with a whole set of
        parts.
    replicas: None: one a machine.
    backend: "auto" is nccl with a GPU and gloo without.
    param_dtype: of sharded weights while they compute; what is kept, and sums of gradients, stay float32.
    async_checkpoints: write checkpoints at intervals beside the training, from a copy in host memory.
    timeout_minutes: how long a process waits for the others.
    """

    shard: Literal["none", "full", "hybrid"] = "none"
    replicas: Count | None = None
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    async_checkpoints: bool = False
    timeout_minutes: Positive = 30.0

    @model_validator(mode="after")
    def _fits_together(self) -> DistributedSettings:
        if self.replicas is not None and self.shard != "hybrid":
            raise ValueError(f"replicas: only shard 'hybrid' has replicas, got shard {self.shard!r}")
        if self.param_dtype != "float32" and self.shard == "none":
            raise ValueError("param_dtype: only sharded weights are cast, got shard 'none'")
        return self


class LoopSettings(Settings):
    """How long a run is, in which precision it computes, what it keeps, and on how many processes.

    max_skipped: updates in a row that may fail to be finite.
    """

    steps: Count = 1000
    seed: int = 0
    precision: Precision = "float32"
    max_skipped: Count = 5
    checkpoint_every: Count = 50
    keep_checkpoints: Count = 2
    distributed: DistributedSettings = DistributedSettings()

    @model_validator(mode="after")
    def _narrow_weights_in_narrow_sums(self) -> LoopSettings:
        if self.distributed.param_dtype != "float32" and self.precision != self.distributed.param_dtype:
            raise ValueError(
                f"distributed.param_dtype: {self.distributed.param_dtype} needs precision "
                f"{self.distributed.param_dtype}, got {self.precision}"
            )
        return self

    def maths(self) -> dict[str, Any]:
        """What a resumed run may not change. How it is divided among processes it may."""
        free = {"steps", "max_skipped", "checkpoint_every", "keep_checkpoints", "distributed"}
        return self.model_dump(mode="json", exclude=free)


class DistillSettings(LoopSettings):
    """One distillation run.

    A step is one critic update; every `critic_updates`-th step, the generator is updated first. `batch` is
    the number of samples an update sees, in `accumulation` equal parts.
    """

    batch: Count = 64
    accumulation: Count = 1
    critic_updates: Count = 5
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    student: NetworkSettings = NetworkSettings(lr=2e-6)
    critic: NetworkSettings = NetworkSettings(lr=4e-7)
    ema: EmaSettings = EmaSettings()
    rollout: RolloutSettings = RolloutSettings()
    matching: MatchingSettings = MatchingSettings()
    weighting: WeightingSettings = WeightingSettings()

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


class InitSettings(LoopSettings):
    """Training of a student's start: ODE regression or teacher forcing.

    warmup: steps over which the learning rate rises. The average of the weights is what one wants in the end.
    """

    batch: Count = 64
    accumulation: Count = 1
    optimizer: OptimizerSettings = OptimizerSettings(lr=2e-6, betas=(0.9, 0.999), clip=10.0)
    lora: LoraSettings | None = None
    warmup: Annotated[int, Field(ge=0)] = 0
    ema: EmaSettings = EmaSettings(decay=0.99, start=0)
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _whole_parts(self) -> InitSettings:
        if self.batch % self.accumulation:
            raise ValueError(
                f"accumulation: expected a divisor of batch {self.batch}, got {self.accumulation}"
            )
        return self
