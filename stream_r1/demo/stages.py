"""What the demo's stages do with models: stream, evaluate, sample the teacher, time, look."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stream_r1.assembly import Models
from stream_r1.demo.record import Clip, Timing
from stream_r1.demo.settings import DemoSettings
from stream_r1.disk.whole import written
from stream_r1.distill.ode import ode_pairs
from stream_r1.distill.weighting import StreamR1Weights
from stream_r1.drawn_world import FPS, HELD_OUT, Scene, draw
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.recipe import Recipe, read_prompts
from stream_r1.sampling.sampler import Sampler
from stream_r1.sampling.video import VideoWriter, contact_sheet
from stream_r1.schedule import FlowSchedule

EVALUATION_SEED = 10_000  # apart from the seeds of what is shown


def make_sampler(student: CausalWanTransformer, models: Models, recipe: Recipe) -> Sampler:
    """The sampler that the recipe's student is trained for."""
    shape = recipe.rollout
    return Sampler(
        student,
        models.vae,
        FlowSchedule(shape.shift),
        shape.steps,
        text_encoder=models.text,
        latent_size=(shape.height, shape.width),
        context_noise=shape.context_noise,
    )


def stream_prompts(sampler: Sampler, settings: DemoSettings, folder: Path, name: str) -> list[Clip]:
    """The prompts as one batch, each into its mp4 as frames arrive; a contact sheet of each."""
    clips = [_clip(prompt, name, index) for index, prompt in enumerate(settings.prompts)]
    stream = sampler.stream(list(settings.prompts), seed=settings.seed, chunks=settings.chunks)
    frames: list[Tensor] = []
    with ExitStack() as stack:
        places = [stack.enter_context(written(folder / clip.video)) for clip in clips]
        writers = [stack.enter_context(VideoWriter(place, fps=FPS)) for place in places]
        for chunk in stream:
            assert chunk.frames is not None  # the sampler has a VAE
            frames.append(chunk.frames)
            for writer, video in zip(writers, chunk.frames, strict=True):
                writer.write(video)
    for clip, video in zip(clips, torch.cat(frames, 1), strict=True):
        _sheet(folder, clip, video)
    return clips


def write_clips(folder: Path, name: str, prompts: Sequence[str], videos: Sequence[Tensor]) -> list[Clip]:
    """Whole videos [T, 3, H, W] in [0, 1] as mp4 files with contact sheets."""
    clips = []
    for index, (prompt, video) in enumerate(zip(prompts, videos, strict=True)):
        clip = _clip(prompt, name, index)
        with written(folder / clip.video) as place, VideoWriter(place, fps=FPS) as writer:
            writer.write(video)
        _sheet(folder, clip, video)
        clips.append(clip)
    return clips


def sample_teacher(models: Models, recipe: Recipe, settings: DemoSettings, folder: Path) -> list[Clip]:
    """The teacher's samples for the shown prompts, as long as a rollout."""
    videos = teacher_videos(
        models, recipe, settings.prompts, solver_steps=settings.teacher_steps, seed=settings.seed
    )
    return write_clips(folder, "teacher", settings.prompts, videos)


@torch.no_grad()
def teacher_videos(
    models: Models, recipe: Recipe, prompts: Sequence[str], *, solver_steps: int, seed: int
) -> list[Tensor]:
    """The teacher's samples, as long as a rollout, with the recipe's guidance: [T, 3, H, W] each."""
    shape = recipe.rollout
    channels = models.student.config["in_channels"]
    noise = torch.randn(
        (len(prompts), shape.frames, channels, shape.height, shape.width),
        generator=torch.Generator().manual_seed(seed),
    )
    trajectories = ode_pairs(
        models.teacher,
        models.text.encode(list(prompts)).float(),
        noise,
        negative=models.text.encode([recipe.matching.negative_prompt]).float(),
        schedule=FlowSchedule(shape.shift),
        steps=shape.steps,
        solver_steps=solver_steps,
        guidance_scale=recipe.matching.guidance_scale,
    )
    return list(models.vae.decode(trajectories[:, -1]))


def drawings(prompts: Sequence[str], seed: int) -> list[Tensor]:
    """What the prompts ask for, drawn by the seeds from `seed` on: [T, 3, H, W] in [0, 1] each."""
    clips = [draw(Scene.of(prompt), seed + index).frames for index, prompt in enumerate(prompts)]
    return [torch.from_numpy(clip).movedim(-1, 1).float() / 255 for clip in clips]


def show_drawings(settings: DemoSettings, folder: Path) -> list[Clip]:
    """Drawings of the shown prompts."""
    return write_clips(
        folder, "drawings", settings.prompts, drawings(settings.prompts, HELD_OUT + settings.seed)
    )


def evaluated_prompts(recipe: Recipe, settings: DemoSettings) -> list[str]:
    """The training prompts, again from the first where there are fewer than videos."""
    return list(itertools.islice(itertools.cycle(read_prompts(recipe.prompts)), settings.evaluated_videos))


def sample(sampler: Sampler, recipe: Recipe, settings: DemoSettings) -> tuple[list[Tensor], list[str]]:
    """Fresh videos over the training prompts, [T, 3, H, W] each, and their prompts."""
    prompts = evaluated_prompts(recipe, settings)
    seed = EVALUATION_SEED + settings.seed
    return stream_batches(sampler, recipe, prompts, seed=seed, batch=settings.evaluated_batch), prompts


def stream_batches(
    sampler: Sampler, recipe: Recipe, prompts: Sequence[str], *, seed: int, batch: int
) -> list[Tensor]:
    """Streams of a rollout's length, [T, 3, H, W] in [0, 1] each; video i has the noise i of `seed`."""
    chunks = _chunks(sampler.student, recipe.rollout.frames)
    videos: list[Tensor] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        stream = sampler.stream(part, seed=seed, chunks=chunks, first_index=start)
        videos += torch.cat([chunk.frames for chunk in stream if chunk.frames is not None], 1)
    return videos


def time_stream(sampler: Sampler, settings: DemoSettings) -> Timing:
    """One prompt, one video, after a warm-up over everything that is slower the first time."""
    prompt = settings.prompts[0]
    for _ in sampler.stream(prompt, seed=settings.seed, chunks=3):
        pass
    stream = sampler.stream(prompt, seed=settings.seed, chunks=settings.timed_chunks)
    for _ in stream:
        pass
    return Timing(**asdict(stream.timings))


def look(sampler: Sampler, models: Models, recipe: Recipe, settings: DemoSettings, path: Path) -> None:
    """Saliency of each axis and the full weights over a fresh video of the first prompt, as npz."""
    prompt = settings.prompts[0]
    stream = sampler.stream(
        prompt, seed=settings.seed, chunks=_chunks(sampler.student, recipe.rollout.frames)
    )
    latents = torch.cat([chunk.latents for chunk in stream], 1)
    with torch.no_grad():
        video = models.vae.decode(latents)
    options = recipe.weighting.model_dump() | {"mode": "full"}
    frames, _, height, width = latents.shape[1:]
    weights = StreamR1Weights(models.reward, **options)(
        video, [prompt], (frames, height, width), observe=False
    )
    assert weights.saliency is not None  # "full" looks at pixels
    shown = video[0, :: models.vae.temporal_factor].movedim(1, -1).clamp(0, 1).mul(255).round().byte()
    with written(path) as place:
        np.savez_compressed(
            place,
            frames=shown.numpy(),  # [F, H, W, 3], the last pixel frame of each latent frame
            saliency=weights.saliency[:, 0].numpy(),  # [axes, F, h, w]
            weights=weights.intra[0, :, 0].numpy(),  # [F, h, w]
            scores=weights.scores[0].numpy(),
            prompt=np.array(prompt),
        )


def _chunks(student: CausalWanTransformer, frames: int) -> int:
    config = student.config
    first = config["first_chunk_frames"] or config["frames_per_chunk"]
    return 1 + (frames - first) // config["frames_per_chunk"]


def _clip(prompt: str, name: str, index: int) -> Clip:
    return Clip(prompt=prompt, video=f"{name}-{index}.mp4", sheet=f"{name}-{index}.png")


def _sheet(folder: Path, clip: Clip, video: Tensor) -> None:
    assert clip.sheet is not None
    with written(folder / clip.sheet) as place:
        contact_sheet([video], scale=2, enlarge="bicubic").save(place)
