"""What a recipe needs of some GPUs: memory by part, time, frames a second, and what to change.

Everything here is a prediction: memory from a model that is checked against what a CPU allocates, time from
datasheets (`roofline.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from stream_r1.estimate import roofline
from stream_r1.estimate.devices import Device
from stream_r1.estimate.memory import Cluster, Moment, Sizes, cluster, moments, sizes
from stream_r1.estimate.networks import read_networks
from stream_r1.estimate.phases import training_phases
from stream_r1.estimate.plan import Plan, Role, roles
from stream_r1.estimate.run import Phase
from stream_r1.estimate.streaming import cache_bytes, chunk_work
from stream_r1.estimate.work import exchanged_bytes
from stream_r1.recipe import InitRecipe, Recipe

CONTEXT = 1.5e9  # bytes of CUDA's context, libraries' workspaces and NCCL's buffers
SLACK = 0.05  # of what is allocated, lost between the allocator's blocks


@dataclass(frozen=True)
class Estimate:
    """A prediction for one GPU of a run. Bytes and seconds.

    Attributes:
        moments: every phase of a step when it needs most.
        student_update, critic_update: None where a step has none.
        step: the mean one.
        exchanged: bytes that come to a GPU in a mean step from others that share its samples.
    """

    plan: Plan
    device: Device
    cluster: Cluster
    moments: tuple[Moment, ...]
    student_update: float
    critic_update: float | None
    step: float
    exchanged: float

    @cached_property
    def fps(self) -> tuple[float, float] | None:
        """Of a stream of the student, all in bfloat16, end to end and without decoding.

        On the GPUs of `distributed.sequence`. None without a window, whose chunks are never alike, and for
        starts. Counted when it is asked for.
        """
        networks, size = self.plan.networks, self.plan.recipe.rollout
        student = networks.student.config
        if networks.vae is None or student.get("window_frames") is None:
            return None
        latent, shared = (size.height, size.width), self.plan.sequence
        work = chunk_work(student, networks.vae, latent, size.steps, self.device, shared)
        denoising, _ = work.seconds(self.device)
        return work.fps(self.device), work.frames / denoising

    @cached_property
    def fps_in_fp8(self) -> tuple[float, float] | None:
        """The same with the student's linear layers in FP8; None too on a GPU without."""
        networks, size = self.plan.networks, self.plan.recipe.rollout
        if self.fps is None or networks.vae is None or self.device.matmul8 is None:
            return None
        student, latent = networks.student.config, (size.height, size.width)
        shared = self.plan.sequence
        work = chunk_work(student, networks.vae, latent, size.steps, self.device, shared, quantize="fp8")
        return work.fps(self.device), work.frames / work.seconds(self.device)[0]

    @cached_property
    def cache_bytes(self) -> tuple[int, int] | None:
        """Of a stream's keys and values on a GPU, in bfloat16 and in FP8. None without a window."""
        student, size = self.plan.networks.student.config, self.plan.recipe.rollout
        if student.get("window_frames") is None:
            return None
        whole, fp8 = (
            cache_bytes(student, (size.height, size.width), dtype) // self.plan.sequence
            for dtype in (torch.bfloat16, torch.float8_e4m3fn)
        )
        return whole, fp8

    @property
    def worst(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def overhead(self) -> float:
        return CONTEXT + SLACK * self.worst.total

    @property
    def total(self) -> float:
        return self.worst.total + self.overhead

    @property
    def fits(self) -> bool:
        return self.total <= self.device.memory

    def days(self, steps: int) -> float:
        return steps * self.step / 86400


def estimate(recipe: Recipe | InitRecipe, device: Device, gpus: int) -> Estimate:
    """Predicts a run of a recipe.

    Raises:
        ValueError: GPUs that the recipe's batch or sharding can't be divided among.
        SettingsError: sizes of a model that can't be known.
    """
    group = cluster(recipe, recipe.batch, recipe.accumulation, gpus)
    narrow = group.shards > 1 and recipe.distributed.param_dtype == "bfloat16"
    plan = Plan(
        recipe,
        read_networks(recipe),
        samples=recipe.batch // (group.parts * recipe.accumulation),
        half=recipe.precision != "float32",
        narrow=narrow,
        keeps_gradients=group.shards == 1 and recipe.accumulation == 1,
        device=device,
    )
    phases = training_phases(plan)
    times = _Times(plan, group, device)
    student, critic = times.update(phases, "student"), times.update(phases, "critic")
    step, exchanged = student, times.exchanged(phases, "student")
    if isinstance(recipe, Recipe):
        updates = -(-(recipe.steps - recipe.critic_warmup) // recipe.critic_updates) / recipe.steps
        step = critic + student * updates
        exchanged = times.exchanged(phases, "critic") + exchanged * updates
    return Estimate(
        plan,
        device,
        group,
        tuple(moments(plan, phases, group.shards)),
        student,
        critic if isinstance(recipe, Recipe) else None,
        step,
        exchanged,
    )


@dataclass(frozen=True)
class _Times:
    plan: Plan
    cluster: Cluster
    device: Device

    def update(self, phases: Sequence[Phase], role: Role) -> float:
        """One update, all of its micro-batches."""
        own = [phase for phase in phases if phase.learns == role]
        if not own:
            return 0.0
        size = sizes(roles(self.plan)[role], self.cluster.shards)
        seconds = sum(map(self._phase, own)) * self.plan.recipe.accumulation
        optimizer = 7 * 4 * size.trained / (self.device.bandwidth * roofline.ASSUMED.memory)  # p, g, m, v
        return seconds + optimizer

    def _phase(self, phase: Phase) -> float:
        """The longer of what it computes and what it fetches: the two run at once."""
        busy, times = roofline.seconds(phase.work, self.device), self._times(phase)
        fetched = 0.0
        if phase.role is not None:
            fetched = self._fetched(sizes(roles(self.plan)[phase.role], self.cluster.shards), phase.backward)
        return max(busy * times, fetched * phase.passes * times)

    def exchanged(self, phases: Sequence[Phase], role: Role) -> float:
        """Bytes of an update that come from GPUs that share the samples."""
        own = [phase for phase in phases if phase.learns == role]
        return self.plan.recipe.accumulation * sum(
            exchanged_bytes(phase.work) * self._times(phase) for phase in own
        )

    def _times(self, phase: Phase) -> float:
        """How often what was counted is done."""
        return self._rollout_passes() / phase.passes if phase.name.endswith(": rollout") else 1.0

    def _rollout_passes(self) -> float:
        """The mean of exits: as many passes before it as not; and one that leaves a chunk's keys behind."""
        size, config = self.plan.recipe.rollout, self.plan.networks.student.config
        low, high = size.bounds
        chunks = self.plan.chunks + ((low + high) / 2 - size.frames) / config.get("frames_per_chunk", 3)
        return chunks * (1 + (len(size.steps) + 1) / 2) - 1

    def _fetched(self, size: Sizes, backward: bool) -> float:
        """Seconds in which a pass's weights come from the other ranks, and gradients go to them."""
        shards = self.cluster.shards
        width = 2 if self.plan.narrow else 4
        numbers = size.whole * (width + 4 * backward)
        return numbers * (shards - 1) / shards / (self.device.link / 2 * roofline.ASSUMED.link)
