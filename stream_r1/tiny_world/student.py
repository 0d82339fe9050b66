"""The tiny world's student before distillation: the teacher's weights, taught to be causal by teacher
forcing.

The sequence is [clean | noisy]; a noisy chunk sees the clean chunks before it and itself, each chunk at one
of the student's own few timesteps (CausVid 2412.07772, section 4.2; teacher forcing as in Self Forcing
2506.08009).
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from stream_r1.distill.noise import SampleNoise
from stream_r1.distill.teacher_forcing import TeacherForcing
from stream_r1.models.checkpoints import load_student
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.schedule import FlowSchedule
from stream_r1.tiny_world.clips import Clips
from stream_r1.tiny_world.loop import Loop, origin
from stream_r1.tiny_world.teacher import TeacherSettings, is_hidden_matrix

log = logging.getLogger(__name__)


class StudentSettings(TeacherSettings):
    """The student's initialization.

    The clips are the teacher's; what else the teacher's settings say of a network is not used.

    teacher: folder of the teacher, whose weights it starts with.
    forced_clips: drawings that it learns from.
    frames_per_chunk: latent frames made together.
    window_frames: latent frames that a chunk sees, sink and itself included.
    sink_frames: first frames that stay visible indefinitely.
    sink_ema: decay of the sink's moving average.
    steps: the student's timesteps before the shift, falling.
    step_shift: of the schedule of these steps.
    """

    teacher: str
    forced_clips: int = Field(default=2000, ge=1)
    frames_per_chunk: int = Field(default=3, ge=1)
    window_frames: int = Field(default=9, ge=1)
    sink_frames: int = Field(default=3, ge=0)
    sink_ema: float | None = 0.999
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    step_shift: float = Field(default=5.0, gt=0)


def new_student(settings: StudentSettings, clips: Clips) -> CausalWanTransformer:
    """The student with the teacher's weights."""
    return load_student(
        settings.teacher,
        text_len=clips.text.shape[1],
        frames_per_chunk=settings.frames_per_chunk,
        window_frames=settings.window_frames,
        sink_frames=settings.sink_frames,
        positions="window",
        sink_ema=settings.sink_ema,
    )


def train_student(settings: StudentSettings) -> None:
    """Train, or resume training, and write the averaged student to ``settings.out`` as float16."""
    clips = Clips(Path(settings.vae), settings.clips, Path(settings.latents))
    torch.manual_seed(settings.training.seed)
    model = new_student(settings, clips).train()
    state = Path(settings.work) / "student.pt"
    inputs = origin(settings, settings.teacher, clips.fingerprint)
    loop = Loop(model, settings.training, state, is_hidden_matrix, inputs)
    latents, index = clips.some(settings.forced_clips)
    objective = TeacherForcing(
        latents,
        clips.text,
        index,
        schedule=FlowSchedule(settings.step_shift),
        steps=settings.steps,
    )

    def loss() -> tuple[Tensor, dict[str, float]]:
        seeds = torch.randint(2**62, (settings.batch,), generator=loop.generator).tolist()
        rows = clips.draw(settings.batch, loop.generator, len(latents))
        return objective.loss(model, rows, SampleNoise(seeds)), {}

    for _ in loop.run(loss):
        pass
    loop.swap()
    model.half().save_pretrained(settings.out)
    log.info("%s: %d steps on %d clips", settings.out, loop.step, len(latents))
