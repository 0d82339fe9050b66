"""A prompt switch that recomputes the window, against whole clips and streams that start again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sampling_models import CHANNELS, WordEncoder, tiny_student
from torch import Tensor

from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.sampling.noise import StreamNoise
from stream_r1.sampling.sampler import Sampler, Stream

OLD, NEW = ["a fat rabbit", "snow"], ["a tree", "a butterfly over the meadow"]
SIZE = (2, 4)
SIGMAS = (1.0, 0.9375, 5 / 6, 0.625)


def sampler(student: CausalWanTransformer, **settings: Any) -> Sampler:
    return Sampler(student, text_encoder=WordEncoder(), latent_size=SIZE, **settings)


def take(stream: Stream, count: int) -> list[Tensor]:
    return [next(stream).latents for _ in range(count)]


@pytest.mark.parametrize(
    "settings", [{}, {"first_chunk_frames": 1, "sink_frames": 0}, {"window_frames": None, "sink_frames": 0}]
)
@pytest.mark.parametrize(("merge", "context_noise"), [(False, 0.0), (True, 0.0), (False, 100.0)])
def test_the_next_chunk_sees_the_window_as_the_new_prompt_makes_it(
    settings: dict[str, Any], merge: bool, context_noise: float
) -> None:
    """All frames still in the window: [clean chunks | noisy chunk] as one clip under the new text."""
    student = tiny_student(**({"window_frames": 15, "positions": "absolute"} | settings | {"sink_frames": 0}))
    one = sampler(student, fuse_cache_update=merge, context_noise=context_noise)
    stream = one.stream(OLD, seed=5, chunks=4)
    clean = take(stream, 3)
    stream.switch(NEW, recache=True)
    made = next(stream).latents

    text, noise, mask = WordEncoder().encode(NEW), StreamNoise(5, 2), student.causal_mask(2)
    kept, sigma, device = [], context_noise / 1000, torch.device("cpu")
    for index, chunk in enumerate(clean):
        kept.append((1 - sigma) * chunk + sigma * noise.draw(index, 4, chunk.shape[1:], device))
    context, x0 = torch.cat(kept, dim=1), torch.zeros(())
    for step, level in enumerate(SIGMAS):
        x = (1 - level) * x0 + level * noise.draw(3, step, (3, CHANNELS, *SIZE), device)
        t = torch.full((2, context.shape[1] + 3), context_noise)
        t[:, -3:] = 1000 * level
        x0 = x - level * student(torch.cat([context, x], dim=1), t, text, mask=mask)[:, -3:]
    torch.testing.assert_close(made, x0, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("made", [1, 2, 7])
def test_it_goes_on_as_a_stream_that_begins_with_the_window(
    made: int, ema: float | None, merge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sampler(tiny_student(sink_ema=ema), fuse_cache_update=merge)
    stream = one.stream(OLD, seed=5)
    chunks = take(stream, made)
    stream.switch(NEW, recache=True)
    found = take(stream, 4)

    window = chunks if made <= 3 else [chunks[0], *chunks[-2:]]  # the sink and a ring of two chunks
    draw = StreamNoise.draw
    later = made - len(window)
    monkeypatch.setattr(StreamNoise, "draw", lambda self, chunk, *rest: draw(self, chunk + later, *rest))
    again = one.stream(NEW, seed=5, first_frames=torch.cat(window, dim=1))
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(take(again, 4), 1), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sink_ema": 0.9},
        {"sink_frames": 0},
        {"sink_frames": 0, "positions": "absolute"},
        {"sink_frames": 0, "first_chunk_frames": 1},
        {"sink_frames": 0, "first_chunk_frames": 1, "window_frames": 3},
        {"sink_frames": 1, "first_chunk_frames": 1, "window_frames": 8},
        {"window_frames": 8, "sink_frames": 3},
    ],
)
def test_the_same_prompt_recomputed_changes_little_and_another_much(settings: dict[str, Any]) -> None:
    """What the window holds was computed with frames in sight that are gone: near, not equal."""
    moved = {}
    for name, prompts, recache in [("none", OLD, False), ("same", OLD, True), ("other", NEW, True)]:
        stream = sampler(tiny_student(**settings)).stream(OLD, seed=5)
        take(stream, 6)
        stream.switch(prompts, recache=recache)
        moved[name] = next(stream).latents
    same, other = ((moved[name] - moved["none"]).square().mean() for name in ("same", "other"))
    assert same < 0.1 * other


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"positions": "absolute"}, "positions 'window' or no sink, got 'absolute' and a sink of 3"),
        ({"sink_frames": 2}, "a sink of whole chunks, 3, 6, ... frames, got 2"),
    ],
)
def test_what_cannot_be_recomputed_is_refused_and_the_stream_goes_on(
    settings: dict[str, Any], reason: str
) -> None:
    stream, plain = (sampler(tiny_student(**settings)).stream(OLD, seed=5) for _ in range(2))
    take(stream, 2)
    with pytest.raises(ValueError, match=f"switch: recache needs {reason}"):
        stream.switch(NEW, recache=True)
    assert torch.equal(torch.cat(take(stream, 2), 1), torch.cat(take(plain, 4)[2:], 1))
