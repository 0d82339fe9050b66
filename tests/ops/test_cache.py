"""ChunkCache against a plain list of frames with un-rotated keys, rotated again where a chunk sees them."""

import gc
import itertools
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from stream_r1_kernels import ChunkCache, ChunkMask, RotaryGrid, apply_rotary, cached_chunk_attention

HEADS, WIDTH, ROWS, COLUMNS = 2, 12, 2, 3
TOKENS = ROWS * COLUMNS
ROTARY = RotaryGrid(WIDTH)

SETTINGS = {
    "whole past": {"max_frames": 40},
    "window": {"window_frames": 9},
    "window of one chunk": {"window_frames": 3},
    "static sink": {"window_frames": 9, "sink_frames": 3},
    "sink and one slot": {"window_frames": 6, "sink_frames": 3},
    "two chunks of sink": {"window_frames": 12, "sink_frames": 6, "positions": "window"},
    "sink at the window": {"window_frames": 9, "sink_frames": 3, "positions": "window"},
    "averaged sink": {"window_frames": 9, "sink_frames": 3, "ema": 0.7},
    "averaged sink at the window": {"window_frames": 12, "sink_frames": 3, "ema": 0.7, "positions": "window"},
    "first frame alone": {"max_frames": 40, "first_chunk_frames": 1},
    "first frame alone, window": {"window_frames": 9, "first_chunk_frames": 1},
    "first frame alone and sink": {
        "window_frames": 10,
        "sink_frames": 1,
        "first_chunk_frames": 1,
        "positions": "window",
    },
    "window of no whole chunks": {"window_frames": 8},
    "window of a chunk and a frame": {"window_frames": 4},
    "one frame of sink": {"window_frames": 9, "sink_frames": 1},
    "one frame of sink before whole chunks": {"window_frames": 10, "sink_frames": 1, "positions": "window"},
    "sink that ends within a chunk": {"window_frames": 9, "sink_frames": 4, "positions": "window"},
    "first frame alone, window of 8": {"window_frames": 8, "first_chunk_frames": 1},
    "first frame alone and a chunk of sink": {
        "window_frames": 10,
        "sink_frames": 3,
        "first_chunk_frames": 1,
        "positions": "window",
    },
}


def make_cache(batch: int = 2, layers: int = 2, dtype: torch.dtype = torch.float64, **settings) -> ChunkCache:
    return ChunkCache(layers, batch, HEADS, ROTARY, ROWS, COLUMNS, 3, dtype=dtype, **settings)


def rotate(x: Tensor, frame: int) -> Tensor:
    """One frame's queries or keys [B, tokens, H, D] at a frame."""
    return apply_rotary(x, *ROTARY.phases(frame, 1, ROWS, COLUMNS))


@dataclass
class FrameList:
    """The meaning of the cache: frames in a list, what a chunk sees picked and rotated each time."""

    window_frames: int | None = None
    sink_frames: int = 0
    positions: str = "absolute"
    ema: float | None = None
    max_frames: int | None = None
    first_chunk_frames: int | None = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    averaged_at: int = 0

    def attend(self, q: list[Tensor], k: list[Tensor], v: list[Tensor]) -> Tensor:
        start = len(self.keys)
        keys, values = self.keys + k, self.values + v
        seen = list(range(len(keys)))
        places = seen
        if self.window_frames is not None and len(seen) > self.window_frames:
            rolling = self.window_frames - self.sink_frames
            seen = seen[: self.sink_frames] + seen[-rolling:]
            places = list(range(len(seen))) if self.positions == "window" else seen
            if self.ema is not None and self.averaged_at != start:  # once a chunk
                self.averaged_at = start
                evicted = range(start - rolling, start - rolling + len(k))
                for sink, frame in enumerate(evicted):
                    self.keys[sink] = self.ema * keys[sink] + (1 - self.ema) * keys[frame]
                    self.values[sink] = self.ema * values[sink] + (1 - self.ema) * values[frame]
                keys, values = self.keys + k, self.values + v
        rotated_k = torch.cat(
            [rotate(keys[frame], place) for frame, place in zip(seen, places, strict=True)], 1
        )
        rotated_q = torch.cat([rotate(x, place) for x, place in zip(q, places[-len(q) :], strict=True)], 1)
        scores = torch.einsum("bqhd,bkhd->bhqk", rotated_q, rotated_k) * WIDTH**-0.5
        seen_v = torch.cat([values[frame] for frame in seen], 1)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), seen_v)

    def keep(self, k: list[Tensor], v: list[Tensor]) -> None:
        self.keys, self.values = self.keys + k, self.values + v


def random_frames(count: int, generator: torch.Generator, batch: int = 2) -> list[Tensor]:
    shape = (batch, TOKENS, HEADS, WIDTH)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_each_chunk_sees_what_a_list_of_frames_would_show(settings):
    generator = torch.Generator().manual_seed(0)
    cache = make_cache(**settings)
    truth = [FrameList(**settings) for _ in range(len(cache))]
    for _ in range(9):
        for last in (False, True):  # two passes a chunk; only the last one's keys stay
            for layer, frames in enumerate(truth):
                cache.begin_chunk()
                q, k, v = (random_frames(cache.frames, generator) for _ in range(3))
                expected = frames.attend(q, k, v)
                phases = cache.positions()
                rotated_q, rotated_k = (apply_rotary(torch.cat(part, 1), *phases) for part in (q, k))
                fresh_v = torch.cat(v, 1)
                beside = cached_chunk_attention(
                    rotated_q, rotated_k, fresh_v, cache[layer].past(holds_fresh=False)
                )
                slot_k, slot_v = cache[layer].slot()
                slot_k.copy_(rotated_k)
                slot_v.copy_(fresh_v)
                inside = cached_chunk_attention(rotated_q, None, None, cache[layer].past(holds_fresh=True))
                # phases are float32: 1e-6
                torch.testing.assert_close(inside, expected, rtol=0, atol=2e-6)
                torch.testing.assert_close(beside, expected, rtol=0, atol=2e-6)
                if last:
                    frames.keep(k, v)
        cache.commit()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_nothing_but_the_slot_shares_memory_with_the_slot(settings):
    cache = make_cache(**settings)
    for _ in range(7):
        cache.begin_chunk()
        cache.storage.zero_()
        for part in cache[1].slot():
            part.fill_(1)
        tokens = cache.frames * TOKENS
        assert cache.storage.sum().item() == 2 * 2 * tokens * HEADS * WIDTH
        assert cache.storage[0].sum() == 0
        seen = cache[1].past(holds_fresh=True)
        assert seen.k.sum().item() == 2 * tokens * HEADS * WIDTH
        past = cache[1].past(holds_fresh=False)
        assert past is None or (past.k.sum() == 0 and past.v.sum() == 0)
        assert (0 if past is None else past.k.shape[1]) == seen.k.shape[1] - tokens
        cache.commit()


def test_any_window_and_sink_in_frames_show_what_the_training_mask_shows():
    """Every size with chunks of up to 4 frames: a token a frame, whose value is its number."""
    sizes = itertools.product(range(1, 5), range(1, 5), range(6), range(1, 12))
    for chunk, first, sink, window in sizes:
        if first > chunk or window < sink + chunk:
            continue
        cache = ChunkCache(
            1,
            1,
            1,
            RotaryGrid(2),
            1,
            1,
            chunk,
            window_frames=window,
            sink_frames=sink,
            first_chunk_frames=first,
        )
        size = f"chunks of {chunk} after {first}, window of {window}, sink of {sink}"
        aligned = (window - sink) % chunk == 0 and (sink == 0 or (sink - first) % chunk == 0)
        assert aligned == (cache.storage.shape[3] == window), size
        mask = ChunkMask(1, chunk, window_frames=window - sink, sink_frames=sink, first_chunk_frames=first)
        frames = first + 9 * chunk
        shown = mask.visible(frames)
        for start, end in mask.chunks(frames):
            cache.begin_chunk()
            assert (cache.next_frame, cache.frames) == (start, end - start), size
            for part in cache[0].slot():
                part.copy_(torch.arange(start, end).view(1, -1, 1, 1))
            expected = shown[start].nonzero().flatten().tolist()
            seen = cache[0].past(True)
            for part in seen.k, seen.v:  # the sink stays at its frames: nothing is rotated
                assert part.is_contiguous(), size
                assert sorted(part[0, :, 0, 0].int().tolist()) == expected, size
            past = cache[0].past(False)
            before = [] if past is None else sorted(past.v[0, :, 0, 0].int().tolist())
            assert before == [frame for frame in expected if frame < start], size
            cache.commit()


def test_snapshot_outlives_later_chunks():
    cache = make_cache(window_frames=9, sink_frames=3, positions="window")
    for value in range(8):
        cache.begin_chunk()
        past = cache[0].past(holds_fresh=False, copy=True)
        before = None if past is None else past.k.clone()
        for part in cache[0].slot():
            part.fill_(float(value))
        cache.commit()
        cache.begin_chunk()
        for part in cache[0].slot():
            part.fill_(-1.0)
        if past is not None:
            torch.testing.assert_close(past.k, before, rtol=0, atol=0)


def test_memory_does_not_grow():
    cache = make_cache(window_frames=9, sink_frames=3, ema=0.9, positions="window")
    address, size = cache.storage.data_ptr(), cache.storage.untyped_storage().nbytes()
    for _ in range(60):
        cache.begin_chunk()
        cache.commit()
    assert (cache.storage.data_ptr(), cache.storage.untyped_storage().nbytes()) == (address, size)
    assert cache.next_frame == 180


def test_memory_is_given_back_with_the_cache_and_not_when_garbage_is_collected():
    gc.disable()
    try:
        cache = make_cache(window_frames=9)
        cache.begin_chunk()
        assert [layer.slot()[0].shape for layer in cache.layers] == 2 * [cache[0].slot()[0].shape]
        storage = weakref.ref(cache.storage)
        del cache
        assert storage() is None
    finally:
        gc.enable()


def test_average_moves_in_bfloat16():
    cache = make_cache(1, 1, torch.bfloat16, window_frames=9, sink_frames=3, ema=0.999)
    chunks = 303
    for chunk in range(chunks):
        cache.begin_chunk()
        for part in cache[0].slot():
            part.fill_(1.0 if chunk == 0 else 2.0)
        cache.commit()
    evictions = chunks - 3
    sink_v = cache.storage[0, 1, :, : 3 * TOKENS]
    # A bfloat16 running value would still be 1: its steps there are 1/128.
    torch.testing.assert_close(
        sink_v.float(), torch.full_like(sink_v, 2 - 0.999**evictions, dtype=torch.float32), rtol=4e-3, atol=0
    )


def test_moved_sink_does_not_wear_out_in_bfloat16():
    cache = make_cache(1, 1, torch.bfloat16, window_frames=9, sink_frames=3, positions="window")
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(1, 3 * TOKENS, HEADS, WIDTH, generator=generator).bfloat16()
    for chunk in range(400):
        cache.begin_chunk()
        if chunk == 0:
            cache[0].slot()[0].copy_(first)
        cache.commit()
    moved_by = 400 * 3 - 9
    expected = apply_rotary(first.double(), *ROTARY.temporal_shift(moved_by))
    torch.testing.assert_close(cache.storage[0, 0, :, : 3 * TOKENS].double(), expected, rtol=4e-3, atol=4e-3)


def test_runs_without_ever_reading_the_device():
    # On the meta device there is no data: anything that waited for a value would raise.
    cache = make_cache(device="meta", window_frames=9, sink_frames=3, ema=0.9, positions="window")
    for _ in range(8):
        cache.begin_chunk()
        assert cache.positions()[0].shape == (3 * TOKENS, WIDTH // 2)
        cache[1].past(holds_fresh=False, copy=True)
        cache.commit()


def test_reset_starts_over():
    cache = make_cache(max_frames=6)
    for _ in range(2):
        cache.begin_chunk()
        cache.begin_chunk()  # twice is once
        cache.commit()
    with pytest.raises(ValueError, match="max_frames is 6, but frames 6 to 8 come next"):
        cache.begin_chunk()
    cache.reset()
    assert cache.next_frame == 0
    cache.begin_chunk()
    assert cache[0].past(holds_fresh=False) is None


@pytest.mark.parametrize("chunks", [0, 1, 4])
@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.commit(),
        lambda cache: cache[0].slot(),
        lambda cache: cache[0].past(True),
        lambda cache: cache[0].past(False),
    ],
)
def test_without_a_chunk_under_way_nothing_is_shown_or_kept(call, chunks):
    """After a commit the views would be those of the chunk that has just been kept."""
    cache = make_cache(window_frames=9, sink_frames=3)
    for _ in range(chunks):
        cache.begin_chunk()
        cache.commit()
    with pytest.raises(ValueError, match=r"no chunk is under way, expected begin_chunk\(\) before"):
        call(cache)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "max_frames must be at least 1 without window_frames, got None"),
        ({"window_frames": 2}, r"window_frames must have room .* at least 0 \+ 3 .* got 2"),
        ({"window_frames": 5, "sink_frames": 3}, r"window_frames must have room .* at least 3 \+ 3 .* got 5"),
        (
            {"window_frames": 12, "sink_frames": 6, "ema": 0.9},
            "sink_frames .* must equal frames_per_chunk = 3, .* got 6, 3 and 12",
        ),
        ({"window_frames": 8, "sink_frames": 3, "ema": 0.9}, "window_frames be a multiple .* got 3, 3 and 8"),
        (
            {"window_frames": 9, "sink_frames": 3, "ema": 0.9, "first_chunk_frames": 1},
            "first_chunk_frames must equal .* got 3, 1 and 9",
        ),
        ({"max_frames": 9, "ema": 0.9}, "ema must be None without window_frames"),
        ({"window_frames": 9, "sink_frames": 3, "ema": 1.5}, "ema must be between 0 and 1"),
        ({"window_frames": 9, "positions": "relative"}, "absolute, window"),
        ({"window_frames": 9, "first_chunk_frames": 4}, "first_chunk_frames"),
        ({"window_frames": 9, "sink_frames": -3}, "sink_frames must not be negative"),
        ({"window_frames": 9, "batch": -1}, "batch"),
        ({"window_frames": 9, "layers": 0}, "layers"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"ChunkCache.*{message}"):
        make_cache(**settings)
