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
from diffusers import WanTransformer3DModel
from pydantic import Field
from torch import Tensor

from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.schedule import FlowSchedule
from stream_r1.tiny_world.clips import LatentClips
from stream_r1.tiny_world.loop import Loop
from stream_r1.tiny_world.teacher import TeacherSettings, is_hidden_matrix, load_clips

log = logging.getLogger(__name__)


class StudentSettings(TeacherSettings):
    """The student's start. The clips are the teacher's; what else the teacher's settings say of a network is
    not used.
    """

    teacher: str
    frames_per_chunk: int = Field(default=3, ge=1)
    window_frames: int = Field(default=9, ge=1)
    sink_frames: int = Field(default=3, ge=0)
    sink_ema: float | None = 0.999
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    step_shift: float = Field(default=5.0, gt=0)


def new_student(settings: StudentSettings, clips: LatentClips) -> CausalWanTransformer:
    """The student with the teacher's weights."""
    teacher = WanTransformer3DModel.from_pretrained(settings.teacher, torch_dtype=torch.float32)
    config = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
    student = CausalWanTransformer(
        **config,
        text_len=clips.text.shape[1],
        frames_per_chunk=settings.frames_per_chunk,
        window_frames=settings.window_frames,
        sink_frames=settings.sink_frames,
        positions="window",
        sink_ema=settings.sink_ema,
    )
    student.load_state_dict(teacher.state_dict())
    return student


def train_student(settings: StudentSettings, cache: Path | None = None) -> None:
    """Train, or go on training, and write the averaged student to ``settings.out`` as float16."""
    clips = load_clips(settings, cache)
    torch.manual_seed(settings.training.seed)
    model = new_student(settings, clips).train()
    loop = Loop(model, settings.training, Path(settings.work) / "student.pt", is_hidden_matrix)
    schedule = FlowSchedule(settings.step_shift)
    timesteps = torch.tensor(schedule.denoising_steps(settings.steps))
    _, rows, columns = model.config["patch_size"]
    tokens = (clips.latents.shape[3] // rows) * (clips.latents.shape[4] // columns)
    mask = model.causal_mask(tokens, teacher_forcing=True)

    def loss() -> tuple[Tensor, dict[str, float]]:
        x0, text = clips.draw(settings.batch, loop.generator)
        chunks = x0.shape[1] // settings.frames_per_chunk
        chosen = torch.randint(len(timesteps), (len(x0), chunks), generator=loop.generator)
        t = timesteps[chosen].repeat_interleave(settings.frames_per_chunk, dim=1)  # [B, F]
        eps = torch.randn(x0.shape, generator=loop.generator)
        v = model(schedule.add_noise(x0, eps, t / 1000), t, text, mask=mask, clean_x=x0)
        return (v - schedule.velocity(x0, eps)).square().mean(), {}

    for _ in loop.run(loss):
        pass
    loop.averaged().half().save_pretrained(settings.out)
    log.info("%s: %d steps on %d clips", settings.out, loop.step, len(clips.latents))
