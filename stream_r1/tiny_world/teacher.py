"""The tiny world's teacher: a small bidirectional `WanTransformer3DModel`, trained by flow matching on clips.

It is trained as a causal student whose only chunk is the clip, which computes the same through faster ops.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from pydantic import Field
from torch import Tensor

from stream_r1.config import Settings
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.schedule import FlowSchedule
from stream_r1.tiny_world.clips import Clips
from stream_r1.tiny_world.loop import Loop, LoopSettings, origin

log = logging.getLogger(__name__)


class TeacherSettings(Settings):
    """The teacher and its training.

    out: folder that the averaged model is written to.
    work: folder that keeps the state of the training.
    latents: folder that keeps the encoded clips; trainings can share it.
    vae: folder of the autoencoder.
    clips: how many different drawings it may see; each is made when first needed.
    heads, head_dim, layers: sizes of the network.
    ffn_ratio: width of the feed-forward over the model's.
    batch: clips a step.
    shift: of the training's timesteps.
    start: folder of a teacher whose weights the training starts with; None: random ones.
    thing_weight: how much more the error weighs where the thing is, per unit of signal: 1 + thing_weight (1
        - sigma). Nothing at full noise, where a weight that knows the clip would bias where things are.
    drop_caption: share of the clips whose caption is left empty, for guidance.
    training: how long and how fast.
    """

    out: str
    work: str
    latents: str
    vae: str
    clips: int = Field(default=20000, ge=1)
    heads: int = 4
    head_dim: int = 64
    layers: int = 6
    ffn_ratio: int = Field(default=4, ge=1)
    batch: int = Field(default=8, ge=1)
    shift: float = Field(default=3.0, gt=0)
    start: str | None = None
    thing_weight: float = Field(default=0.0, ge=0)
    drop_caption: float = Field(default=0.1, ge=0, le=1)
    training: LoopSettings


def teacher_config(settings: TeacherSettings, latent_channels: int, text_dim: int) -> dict[str, Any]:
    """Arguments of `WanTransformer3DModel`."""
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": settings.heads,
        "attention_head_dim": settings.head_dim,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "text_dim": text_dim,
        "freq_dim": 256,
        "ffn_dim": settings.ffn_ratio * settings.heads * settings.head_dim,
        "num_layers": settings.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    }


def train_teacher(settings: TeacherSettings) -> None:
    """Train, or resume training, and write the averaged model to ``settings.out`` as float16."""
    clips = Clips(Path(settings.vae), settings.clips, Path(settings.latents))
    torch.manual_seed(settings.training.seed)
    config = teacher_config(settings, clips.channels, clips.text.shape[2])
    frames = clips.latents([0]).shape[1]
    model = CausalWanTransformer(**config, text_len=clips.text.shape[1], frames_per_chunk=frames).train()
    if settings.start is not None:
        start = WanTransformer3DModel.from_pretrained(settings.start, torch_dtype=torch.float32)
        model.load_state_dict(start.state_dict())
    state = Path(settings.work) / "teacher.pt"
    inputs = origin(settings, settings.start, clips.fingerprint)
    loop = Loop(model, settings.training, state, is_hidden_matrix, inputs)
    schedule = FlowSchedule(settings.shift)

    def loss() -> tuple[Tensor, dict[str, float]]:
        rows = clips.draw(settings.batch, loop.generator)
        x0, text = clips.latents(rows), clips.texts(rows)
        u = torch.rand(settings.batch, generator=loop.generator)
        drop = torch.rand(settings.batch, generator=loop.generator) < settings.drop_caption
        eps = torch.randn(x0.shape, generator=loop.generator)
        t = schedule.warp(1000 * u)
        text = torch.where(drop[:, None, None], clips.empty, text)
        x_t = schedule.add_noise(x0, eps, t / 1000)
        v = model(x_t, t[:, None].expand(-1, frames), text, mask="causal")
        error = (v - schedule.velocity(x0, eps)).square()
        if settings.thing_weight:
            signal = (1 - t / 1000)[:, None, None, None, None]
            weighed = error * (1 + settings.thing_weight * signal * clips.covered(rows))
            return weighed.mean(), {"error": error.detach().mean().item()}
        return error.mean(), {}

    for _ in loop.run(loss):
        pass
    loop.swap()
    teacher = WanTransformer3DModel(**config)
    teacher.load_state_dict(model.state_dict())
    teacher.half().save_pretrained(settings.out)
    log.info("%s: %d steps", settings.out, loop.step)


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    """What Muon trains of a Wan transformer: the linear layers inside its blocks."""
    return p.ndim == 2 and name.startswith("blocks.")
