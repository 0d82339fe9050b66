"""What FP8 costs in quality, by emulation on a CPU: python -m benchmarks.fp8_quality [--videos 40]

The small world's student, whole and in FP8, makes videos of the same prompts from the same noise; figures are
compared in pairs. Before that, one pass over the same noisy chunk and the same past: how far its velocity is
off. bfloat16 is measured beside, as what nobody minds. Prints the tables of docs/fp8.md.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from stream_r1.chunk_loop import ChunkLoop, StudentPasses
from stream_r1.cli import run_app
from stream_r1.disk.whole import write_text
from stream_r1.evaluation.single import video_figures
from stream_r1.recipe import locate, read_prompts
from stream_r1.rewards import load_reward
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.study.differences import Difference, difference

FP8 = torch.float8_e4m3fn
WHOLE = "float32"
ARMS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "bfloat16": {"dtype": torch.bfloat16},
    "linear layers in FP8": {"quantize": "fp8-emulated"},
    "keys and values in FP8": {"cache_dtype": FP8},
    "both in FP8": {"quantize": "fp8-emulated", "cache_dtype": FP8},
}
PAST = 3  # chunks that a pass sees, and one more that has been evicted
PASSES = 8  # prompts of which a pass is compared
BATCH = 10


def load(arm: str) -> StreamR1Pipeline:
    return StreamR1Pipeline.from_pretrained(locate("assets/tiny"), vae_dtype=torch.float32, **ARMS[arm])


def make(pipeline: StreamR1Pipeline, prompts: list[str], seconds: float) -> list[Tensor]:
    """A video [T, 3, H, W] of each prompt; noise by its place in the list."""
    videos: list[Tensor] = []
    for first in range(0, len(prompts), BATCH):
        some = prompts[first : first + BATCH]
        seeds = list(range(first, first + len(some)))
        videos += pipeline(some, seconds, seeds).frames
    return videos


def judged(videos: list[Tensor], prompts: list[str]) -> dict[str, list[float]]:
    """Figures by name, a number a video."""
    judge = load_reward(locate("assets/tiny/judge"))
    rows = []
    for video, prompt in zip(videos, prompts, strict=True):
        with torch.no_grad():
            scores = judge.score(video[None], [prompt])[0].tolist()
        named = {f"judge/{axis}": score for axis, score in zip(judge.axes, scores, strict=True)}
        rows.append(video_figures(video, prompt) | named)
    return {name: [row[name] for row in rows] for name in rows[0]}


@torch.no_grad()
def velocities(pipeline: StreamR1Pipeline, clean: Tensor, noise: Tensor, text: Tensor) -> Tensor:
    """Of the chunk after the clean ones [B, F, C, h, w], at each timestep of sampling, [steps, B, ...]."""
    sampler = pipeline.sampler
    student, frames = sampler.student, noise.shape[1]
    cache = student.new_cache(len(clean), *clean.shape[-2:], dtype=sampler.cache_dtype)
    passes = StudentPasses(student, cache, student.encode_text(text))
    loop = ChunkLoop(
        passes, schedule=sampler.schedule, steps=sampler.steps, renoise=lambda *_: torch.zeros(())
    )
    *past, x0 = clean.split(frames, 1)
    for chunk in past:
        loop.append(chunk)
    cache.begin_chunk()
    out = []
    for t in sampler.steps:
        noised = sampler.schedule.add_noise(x0, noise, sampler.schedule.sigma(t))
        out.append(passes.velocity(noised, t))
    return torch.stack(out)


def passes_off(prompts: list[str]) -> dict[str, tuple[float, float]]:
    """By arm: relative error of a velocity, the mean over prompts and timesteps, and the largest."""
    whole = load(WHOLE)
    text = whole.sampler.embed(prompts)
    made = [chunk.latents for chunk in whole.stream(text, seed=0, chunks=PAST + 2)]
    clean = torch.cat(made, 1)
    noise = torch.randn(made[-1].shape, generator=torch.Generator().manual_seed(0))
    exact = velocities(whole, clean, noise, text)
    found = {}
    for arm in ARMS:
        if arm != WHOLE:
            error = velocities(load(arm), clean, noise, text) - exact
            off = error.flatten(2).norm(dim=2) / exact.flatten(2).norm(dim=2)
            found[arm] = off.mean().item(), off.max().item()
    return found


def shown(found: Difference) -> str:
    text = f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
    return f"**{text}**" if found.clear else text


def main(
    videos: Annotated[int, typer.Option(min=2, help="Of each arm; prompts begin again.")] = 40,
    seconds: Annotated[float, typer.Option(min=1, help="Length of a video.")] = 5.0,
    out: Annotated[Path, typer.Option(help="Folder that keeps the figures of arms that are done.")] = Path(
        "out/fp8"
    ),
) -> None:
    """Measure and print the tables."""
    known = read_prompts("recipes/tiny/prompts.txt")
    prompts = list(itertools.islice(itertools.cycle(known), videos))
    figures: dict[str, dict[str, list[float]]] = {}
    for arm in ARMS:
        file = out / f"{arm.replace(' ', '-')}-{videos}x{seconds:g}.json"
        if not file.exists():
            out.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(judged(make(load(arm), prompts, seconds), prompts)) + "\n")
        figures[arm] = json.loads(file.read_text())
    rounded = [arm for arm in ARMS if arm != WHOLE]
    print("| | error of a pass, mean | largest |\n| --- | ---: | ---: |")
    for arm, (mean, largest) in passes_off(known[:PASSES]).items():
        print(f"| {arm} | {mean:.2%} | {largest:.2%} |")
    print(f"\n| figure | {WHOLE} | {' | '.join(rounded)} |\n| --- | ---: |{' ---: |' * len(rounded)}")
    for name, values in figures[WHOLE].items():
        whole, cells = np.array(values), []
        for arm in rounded:
            found = difference({0: np.array(figures[arm][name])}, {0: whole})
            cells.append("" if found is None else shown(found))
        print(f"| {name} | {whole.mean():.3f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_app(main)
