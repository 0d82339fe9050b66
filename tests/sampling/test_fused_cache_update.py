"""A chunk's clean pass and the next chunk's first pass as one: the same as one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_models import CHANNELS, WordEncoder, tiny_student
from torch import Tensor

from stream_r1.replay import PASSES, read_recording, recorded_student, relative_error
from stream_r1.sampling.sampler import Sampler

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("stream_*.safetensors"))
STREAMS: dict[str, dict[str, Any]] = {
    "whole past": {"window_frames": None, "sink_frames": 0, "positions": "absolute"},
    "window": {"window_frames": 9, "sink_frames": 0, "positions": "absolute"},
    "sink at its frames": {"window_frames": 9, "sink_frames": 3, "positions": "absolute"},
    "sink at the window": {"window_frames": 9, "sink_frames": 3},
    "averaged sink": {"sink_ema": 0.8, "positions": "absolute"},
    "averaged sink at the window": {"window_frames": 12, "sink_ema": 0.8},
    "first frame alone": {"first_chunk_frames": 1, "window_frames": 10, "sink_frames": 4},
    "sizes in frames": {"window_frames": 8, "sink_frames": 1},
    "first frame alone, without a sink": {"first_chunk_frames": 1, "sink_frames": 0, "positions": "absolute"},
}
SIZE, CHUNKS, TEXT = (2, 4), 7, ["a fat rabbit", "a butterfly"]


@pytest.mark.parametrize("settings", STREAMS.values(), ids=STREAMS.keys())
def test_a_merged_pass_is_the_two_passes(settings: dict[str, Any]) -> None:
    """Velocities, keys, values and kept sinks in float64: all that a stream carries on."""
    student = tiny_student(**settings).double()
    text = student.encode_text(WordEncoder().encode(TEXT))
    apart, merged = (student.new_cache(2, *SIZE, max_frames=3 * CHUNKS) for _ in range(2))
    clean_t, noisy_t = student.encode_time(torch.zeros(2)), student.encode_time(torch.full((2,), 937.5))
    generator = torch.Generator().manual_seed(3)
    clean: Tensor | None = None
    for _ in range(CHUNKS):
        if clean is not None:
            student.forward_chunk(clean, clean_t, text, apart)
            apart.commit()
        frames = apart.frames
        x, following = torch.randn(2, 2, frames, CHANNELS, *SIZE, generator=generator).double()
        expected = student.forward_chunk(x, noisy_t, text, apart)
        if clean is None:
            got = student.forward_chunk(x, noisy_t, text, merged)
        else:
            both = clean_t.beside(clean.shape[1], noisy_t, frames)
            got = student.forward_chunk(x, both, text, merged, clean=clean)
        assert merged.next_frame == apart.next_frame
        close(got, expected)
        close(merged.storage, apart.storage)
        for name in ("_sink_k", "_sink_v"):
            if getattr(apart, name) is not None:
                close(getattr(merged, name), getattr(apart, name))
        clean = following


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_merged_passes_reproduce_the_public_implementations(path: Path) -> None:
    recording = read_recording(path)
    student, meta, calls = recorded_student(recording, torch.float32), recording.meta, recording.calls
    x, t, v = calls["x"], calls["t"], calls["v"]  # [calls, B, F, C, h, w], [calls, B, F]
    frames = meta["chunks"] * meta["frames_per_chunk"]
    cache = student.new_cache(x.shape[1], *x.shape[-2:], max_frames=frames)
    text = student.encode_text(calls["context"])
    for call in range(len(x)):
        if (call + 1) % PASSES == 0:  # a clean pass: it is part of the next call
            continue
        merge = call > 0 and call % PASSES == 0
        times = torch.cat((t[call - 1], t[call]), dim=1) if merge else t[call]
        got = student.forward_chunk(x[call], times, text, cache, clean=x[call - 1] if merge else None)
        assert relative_error(got, v[call]) < 1e-5


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def stream(student: Any, merge: bool | None, **settings: Any) -> list[Tensor]:
    one = Sampler(student, text_encoder=WordEncoder(), latent_size=SIZE, fuse_cache_update=merge, **settings)
    return [chunk.latents for chunk in one.stream(TEXT, seed=5, chunks=CHUNKS)]


@pytest.mark.parametrize("context_noise", [0.0, 100.0])
@pytest.mark.parametrize("first_chunk_frames", [None, 1])
def test_a_stream_of_merged_passes_is_the_same_video(
    first_chunk_frames: int | None, context_noise: float
) -> None:
    sink = 3 + (first_chunk_frames or 0)
    student = tiny_student(first_chunk_frames=first_chunk_frames, sink_frames=sink, window_frames=6 + sink)
    merged, apart = (stream(student, merge, context_noise=context_noise) for merge in (True, False))
    for got, expected in zip(merged, apart, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    again = stream(student, True, context_noise=context_noise)
    assert all(torch.equal(one, other) for one, other in zip(merged, again, strict=True))


def test_a_chunk_comes_as_early_as_without_merging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk after four passes, each later one after four more: no clean pass in between."""
    student = tiny_student()
    forward_chunk, passes = student.forward_chunk, list[int]()

    def watch(x: Tensor, *args: Any, clean: Tensor | None = None, **kwargs: Any) -> Tensor:
        passes.append(x.shape[1] if clean is None else x.shape[1] + clean.shape[1])
        return forward_chunk(x, *args, clean=clean, **kwargs)

    monkeypatch.setattr(student, "forward_chunk", watch)
    made = iter(Sampler(student, latent_size=SIZE).stream(torch.zeros(1, 6, 8)))  # tiny: merged by itself
    for expected in ([3, 3, 3, 3], [6, 3, 3, 3], [6, 3, 3, 3]):
        passes.clear()
        next(made)
        assert passes == expected
    large = iter(Sampler(student, latent_size=(64, 64)).stream(torch.zeros(1, 6, 8)))
    next(large)
    passes.clear()
    next(large)
    assert passes == [3, 3, 3, 3, 3]
    given = torch.zeros(1, 6, CHANNELS, *SIZE)
    passes.clear()
    next(iter(Sampler(student).stream(torch.zeros(1, 6, 8), first_frames=given)))
    assert passes == [3, 3, 3, 3, 3, 3]  # given chunks are passed by themselves


def test_where_passes_can_not_be_merged() -> None:
    short = tiny_student(window_frames=6)  # the next chunk's slot is the last chunk's
    with pytest.raises(
        ValueError, match=r"fuse_cache_update needs a student whose window keeps .* got 6 frames"
    ):
        stream(short, True)
    stream(short, None)
    student = tiny_student()
    cache, x, text = student.new_cache(1, *SIZE), torch.zeros(1, 3, CHANNELS, *SIZE), torch.zeros(1, 6, 8)
    with pytest.raises(ValueError, match="clean needs write=True"):
        student.forward_chunk(x, torch.zeros(1, 6), text, cache, write=False, clean=x)
    cache.begin_chunk()
    with pytest.raises(
        ValueError, match=r"expects .* = \(1, 3, 1, 2\) of the next chunk, got \(1, 2, 1, 2\)"
    ):
        student.forward_chunk(x[:, :2], torch.zeros(1, 6), text, cache, clean=x)
    assert cache.next_frame == 0
