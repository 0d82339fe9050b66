"""The sampler: against the algorithm written out over whole clips, and what a stream must never do."""

from __future__ import annotations

import gc
import hashlib
import itertools
from typing import Any

import pytest
import torch
from sampling_models import CHANNELS, WordEncoder, tiny_student, tiny_vae
from torch import Tensor
from torch.nn import Parameter

from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.sampling.chunk import Chunk
from stream_r1.sampling.noise import StreamNoise
from stream_r1.sampling.sampler import Sampler
from stream_r1.schedule import FlowSchedule

PROMPTS = ["a fat rabbit", "a butterfly over the meadow"]
SIZE = (2, 4)


def sampler(student: CausalWanTransformer | None = None, **settings: Any) -> Sampler:
    settings = {"text_encoder": WordEncoder(), "latent_size": SIZE} | settings
    return Sampler(student or tiny_student(), settings.pop("vae", None), **settings)


def latents(chunks: list[Chunk]) -> Tensor:
    return torch.cat([chunk.latents for chunk in chunks], dim=1)


def frames(chunks: list[Chunk]) -> Tensor:
    return torch.cat([chunk.frames for chunk in chunks], dim=1)


@pytest.mark.parametrize("first_chunk_frames", [None, 1])
@pytest.mark.parametrize("context_noise", [0.0, 100.0])
def test_stream_is_the_algorithm_over_whole_clips(
    first_chunk_frames: int | None, context_noise: float
) -> None:
    """Without a window: [clean chunks | noisy chunk] through the whole-clip forward, no cache anywhere."""
    student = tiny_student(
        window_frames=None, sink_frames=0, positions="absolute", first_chunk_frames=first_chunk_frames
    )
    made = latents(list(sampler(student, context_noise=context_noise).stream(PROMPTS, seed=5, chunks=3)))

    text, noise = WordEncoder().encode(PROMPTS), StreamNoise(5, 2)
    sigmas = [1.0, 0.9375, 5 / 6, 0.625]
    mask = student.causal_mask(2)
    context = torch.zeros(2, 0, CHANNELS, *SIZE)
    x0s = []
    for index, length in enumerate([first_chunk_frames or 3, 3, 3]):
        shape, x0 = (length, CHANNELS, *SIZE), torch.zeros(())
        for step, sigma in enumerate(sigmas):
            x = (1 - sigma) * x0 + sigma * noise.draw(index, step, shape, torch.device("cpu"))
            t = torch.full((2, context.shape[1] + length), context_noise)
            t[:, context.shape[1] :] = 1000 * sigma
            clip = torch.cat([context, x], dim=1)
            x0 = x - sigma * student(clip, t, text, mask=mask)[:, context.shape[1] :]
        x0s.append(x0)
        kept, sigma = x0, context_noise / 1000
        if sigma:
            kept = (1 - sigma) * x0 + sigma * noise.draw(index, 4, shape, torch.device("cpu"))
        context = torch.cat([context, kept], dim=1)
    torch.testing.assert_close(made, torch.cat(x0s, dim=1), atol=2e-5, rtol=2e-5)


def test_frames_are_the_decoded_latents() -> None:
    vae = tiny_vae()
    chunks = list(sampler(vae=vae).stream(PROMPTS, chunks=3))
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert [chunk.frames.shape for chunk in chunks] == [(2, n, 3, 16, 32) for n in (9, 12, 12)]
    torch.testing.assert_close(frames(chunks), vae.decode(latents(chunks)), atol=1e-5, rtol=0)


def test_a_chunk_writes_only_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_student()
    watched = sampler(student, vae=tiny_vae(), fuse_cache_update=False).stream(PROMPTS, chunks=7)
    cache, forward_chunk = watched.cache, student.forward_chunk
    passes: list[str] = []

    def digest_outside_slot() -> str:
        storage = cache.storage.clone()
        for layer in range(len(cache)):
            for which, view in enumerate(cache[layer].slot()):
                offset = view.storage_offset() - cache.storage[layer, which].storage_offset()
                tokens = cache.storage[layer, which].stride(1)
                start = offset // tokens
                storage[layer, which, :, start : start + view.shape[1]] = 0
        return hashlib.sha256(storage.numpy().tobytes()).hexdigest()

    def watch(*args: Any, **kwargs: Any) -> Tensor:
        cache.begin_chunk()
        before = digest_outside_slot()
        inside = cache[0].slot()[0].clone()
        v = forward_chunk(*args, **kwargs)
        assert digest_outside_slot() == before
        assert not torch.equal(cache[0].slot()[0], inside)
        passes.append(before)
        return v

    monkeypatch.setattr(student, "forward_chunk", watch)
    list(watched)
    assert len(passes) == 7 * 4 + 6  # the last chunk of a finite stream needs no clean pass
    # all passes of one chunk see the same past; the next chunk's past differs
    groups = [len(list(group)) for _, group in itertools.groupby(passes)]
    assert groups == [5, 5, 5, 5, 5, 5, 4]


def test_same_seed_same_bits() -> None:
    one = sampler(vae=tiny_vae())
    first, second = (list(one.stream(PROMPTS, seed=3, chunks=2)) for _ in range(2))
    longer = list(itertools.islice(one.stream(PROMPTS, seed=3), 4))
    other = list(one.stream(PROMPTS, seed=4, chunks=2))
    assert torch.equal(frames(first), frames(second))
    assert torch.equal(frames(longer[:2]), frames(first))
    assert not torch.equal(latents(other), latents(first))


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = latents(list(sampler().stream("a", chunks=1)))
    student = tiny_student()
    torch.manual_seed(2)
    assert torch.equal(latents(list(sampler(student).stream("a", chunks=1))), first)
    torch.manual_seed(1)
    list(sampler(student).stream("a", chunks=1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_noise_belongs_to_the_prompt() -> None:
    shape, device = (3, 2, 2), torch.device("cpu")
    batch = StreamNoise(7, 3).draw(2, 1, shape, device)
    assert torch.equal(StreamNoise(7, 1, first_index=2).draw(2, 1, shape, device)[0], batch[2])
    assert torch.equal(
        StreamNoise([5, 9], 2).draw(0, 0, shape, device)[1], StreamNoise(9, 1).draw(0, 0, shape, device)[0]
    )
    keys = ((0, 0), (0, 1), (1, 0))
    draws = [StreamNoise(seed, 1).draw(*key, shape, device) for seed in (0, 1) for key in keys]
    draws += [batch[:1], batch[1:2]]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))
    many = StreamNoise(0, 64).draw(0, 0, (4, 8, 8, 8), device)
    assert abs(many.mean().item()) < 0.01
    assert abs(many.std().item() - 1) < 0.01


def test_noise_that_was_drawn_ahead_is_the_same() -> None:
    shape, device = (2, 3, 4), torch.device("cpu")
    plain, ahead = StreamNoise(7, 2), StreamNoise(7, 2)
    ahead.prepare(5, 3, shape, device)
    held = dict(ahead._ready)
    assert len(held) == 3
    for step in range(3):
        drawn = ahead.draw(5, step, shape, device)
        assert torch.equal(drawn, plain.draw(5, step, shape, device))
        assert drawn.data_ptr() == held[5, step].data_ptr()  # what was prepared, not drawn again
    assert not ahead._ready
    ahead.prepare(6, 1, shape, device)
    for key in ((6, 0, (2, 3, 5)), (7, 0, shape)):  # what was not prepared: another size, another chunk
        assert torch.equal(ahead.draw(*key, device), plain.draw(*key, device))
    ahead.prepare(8, 2, shape, device)
    assert set(ahead._ready) == {(8, 0), (8, 1)}  # what nobody asked for goes


def test_a_prompt_is_the_same_in_any_batch() -> None:
    one = sampler()
    together = latents(list(one.stream(PROMPTS, seed=3, chunks=3)))
    alone = latents(list(one.stream(PROMPTS[1], seed=3, chunks=3, first_index=1)))
    torch.testing.assert_close(alone, together[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first_chunk_frames", [None, 1])
@pytest.mark.parametrize("given", ["latents", "one for all"])
def test_going_on_from_its_own_frames_is_the_same_stream(given: str, first_chunk_frames: int | None) -> None:
    sink = 3 + (first_chunk_frames or 0)
    student = tiny_student(first_chunk_frames=first_chunk_frames, sink_frames=sink, window_frames=6 + sink)
    one, prompts = sampler(student, vae=tiny_vae()), PROMPTS if given == "latents" else ["a"]
    whole = list(one.stream(prompts, seed=1, chunks=6))
    start = latents(whole[:4])
    if given == "one for all":
        rest = list(one.stream(["a", "a"], seed=[1, 1], chunks=2, first_frames=start))
    else:
        rest = list(one.stream(prompts, seed=1, chunks=2, first_frames=start))
    assert [chunk.index for chunk in rest] == [4, 5]
    expected = [part(whole[4:]).expand(2, -1, -1, -1, -1) for part in (latents, frames)]
    torch.testing.assert_close(latents(rest), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(frames(rest), expected[1], atol=1e-5, rtol=0)


def test_going_on_from_pixels_is_going_on_from_their_latents() -> None:
    vae = tiny_vae()
    one = sampler(vae=vae, latent_size=None)
    video = torch.rand(2, 9, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    from_pixels = next(one.stream(PROMPTS, chunks=1, first_frames=video))
    encoded = vae.encode(video)
    from_latents = next(one.stream(PROMPTS, chunks=1, first_frames=encoded))
    assert torch.equal(from_pixels.frames, from_latents.frames)
    # seamless: the decoder continues where the given frames end
    whole = vae.decode(torch.cat([encoded, from_pixels.latents], dim=1))
    torch.testing.assert_close(from_pixels.frames, whole[:, 9:], atol=1e-5, rtol=0)
    # and what was given matters
    other = next(one.stream(PROMPTS, chunks=1, first_frames=encoded + 1))
    assert (other.latents - from_pixels.latents).abs().max() > 1e-3


def test_memory_does_not_grow() -> None:
    student = tiny_student(num_layers=1, frames_per_chunk=1, window_frames=3, sink_frames=1)
    stream = sampler(student, vae=tiny_vae(), latent_size=(2, 2), steps=(1000,)).stream("a")

    def tensor_bytes() -> int:
        gc.collect()
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if type(tensor) in (Tensor, Parameter)  # not the fakes that compiling leaves behind
        }
        return sum(storages.values())

    held = {}
    for chunk in itertools.islice(stream, 201):
        if chunk.index in (20, 200):
            held[chunk.index] = tensor_bytes()
    assert held[20] == held[200]
    assert torch.isfinite(chunk.latents).all()


def test_independent_first_frame() -> None:
    student = tiny_student(first_chunk_frames=1, sink_frames=1, window_frames=7)
    chunks = list(sampler(student, vae=tiny_vae()).stream("a", chunks=4))
    assert [chunk.latents.shape[1] for chunk in chunks] == [1, 3, 3, 3]
    assert [chunk.frames.shape[1] for chunk in chunks] == [1, 12, 12, 12]


def test_switch_changes_what_follows() -> None:
    one = sampler()
    plain = list(one.stream("a b", seed=2, chunks=3))
    stream = one.stream("a b", seed=2, chunks=3)
    switched = [next(stream), next(stream)]
    stream.switch("quite another prompt")
    switched.append(next(stream))
    assert torch.equal(latents(switched[:2]), latents(plain[:2]))
    assert (switched[2].latents - plain[2].latents).abs().max() > 1e-4
    with pytest.raises(ValueError, match="prompts must be 1, as the stream's, got 2"):
        stream.switch(PROMPTS)


def test_timings_add_up() -> None:
    stream = sampler(vae=tiny_vae(), fuse_cache_update=False).stream("a", chunks=3)
    chunks, total = list(stream), stream.timings
    assert (total.chunks, total.frames) == (3, 33)
    for part in ("denoise", "cache", "decode"):
        assert getattr(total, part) == pytest.approx(sum(getattr(chunk.timings, part) for chunk in chunks))
    assert chunks[0].timings.cache == 0 < chunks[1].timings.cache
    assert chunks[0].timings.elapsed == total.first_frame
    assert total.text + sum(chunk.timings.total for chunk in chunks) <= total.total
    assert total.fps == 33 / total.total


def test_bfloat16_student_streams() -> None:
    chunk = next(sampler(tiny_student().to(torch.bfloat16)).stream("a", chunks=1))
    assert chunk.latents.dtype == torch.float32
    expected = next(sampler().stream("a", chunks=1)).latents
    assert (chunk.latents - expected).abs().max() < 0.1 * expected.abs().max()


def test_bad_input_is_refused() -> None:
    one, vae = sampler(vae=tiny_vae()), tiny_vae()
    with pytest.raises(ValueError, match="chunks must be at least 1 or None, got 0"):
        one.stream("a", chunks=0)
    with pytest.raises(ValueError, match="without window_frames"):
        sampler(tiny_student(window_frames=None, sink_frames=0, positions="absolute")).stream("a")
    with pytest.raises(ValueError, match="one number or 2, one a prompt, got 3"):
        one.stream(PROMPTS, seed=[1, 2, 3])
    with pytest.raises(TypeError, match="seed must be an int"):
        one.stream(PROMPTS, seed=[1.0, 2.0])  # type: ignore[list-item]
    with pytest.raises(
        ValueError, match=r"chunks, 3, 6, ... latent frames \(pixel frames: 9, 21, ...\), got 2"
    ):
        one.stream("a", first_frames=torch.rand(1, 5, 3, 16, 32))
    with pytest.raises(ValueError, match="must have 3 or 4 channels, got 5"):
        one.stream("a", first_frames=torch.rand(1, 3, 5, 2, 4))
    with pytest.raises(ValueError, match=r"\[2 or 1, T, 3, H, W\]"):
        one.stream(PROMPTS, first_frames=torch.rand(3, 9, 3, 16, 32))
    with pytest.raises(ValueError, match="must be latents, for this Sampler has no vae"):
        sampler().stream("a", first_frames=torch.rand(1, 9, 3, 16, 32))
    with pytest.raises(ValueError, match="no text_encoder"):
        sampler(text_encoder=None).stream("a")
    with pytest.raises(ValueError, match=r"embeddings must be \[B, L, 8\]"):
        one.stream(torch.rand(1, 6, 7))
    with pytest.raises(ValueError, match="latent_size must be given"):
        sampler(latent_size=None).stream("a")
    with pytest.raises(ValueError, match="latent_size must be that of first_frames"):
        one.stream("a", first_frames=torch.rand(1, 3, 4, 2, 4), latent_size=(4, 4))
    with pytest.raises(ValueError, match="student's 6 latent channels, got 4"):
        Sampler(tiny_student(in_channels=6, out_channels=6), vae)
    with pytest.raises(ValueError, match="text_dim 9, got 8"):
        Sampler(tiny_student(text_dim=9), text_encoder=WordEncoder())
    with pytest.raises(ValueError, match="context_noise"):
        sampler(context_noise=1000)
    with pytest.raises(ValueError, match="fall"):
        Sampler(tiny_student(), steps=(250, 500), schedule=FlowSchedule())
