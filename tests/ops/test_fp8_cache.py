"""A cache in FP8 beside one in float32: the same frames, within what rounding to 8 bits may change."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stream_r1_kernels import ChunkCache, Fp8ChunkCache, RotaryGrid
from stream_r1_kernels.attention.past import Past

HEADS, WIDTH, ROWS, COLUMNS, LAYERS, BATCH = 2, 12, 2, 3, 2, 2
TOKENS = ROWS * COLUMNS
SETTINGS: dict[str, dict[str, Any]] = {
    "whole past": {"max_frames": 40},
    "window": {"window_frames": 9},
    "static sink": {"window_frames": 9, "sink_frames": 3},
    "sink at the window": {"window_frames": 9, "sink_frames": 3, "positions": "window"},
    "averaged sink": {"window_frames": 9, "sink_frames": 3, "ema": 0.7},
    "averaged sink at the window": {"window_frames": 12, "sink_frames": 3, "ema": 0.7, "positions": "window"},
    "window of no whole chunks": {"window_frames": 8},
    "sink that ends within a chunk": {"window_frames": 9, "sink_frames": 4, "positions": "window"},
    "first frame alone": {"window_frames": 10, "sink_frames": 1, "first_chunk_frames": 1},
}


def pair(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[ChunkCache, Fp8ChunkCache]:
    sizes = (LAYERS, BATCH, HEADS, RotaryGrid(WIDTH), ROWS, COLUMNS, 3)
    return ChunkCache(*sizes, dtype=dtype, **settings), Fp8ChunkCache(*sizes, dtype=dtype, **settings)


def assert_near(ours: Past | None, exact: Past | None, roundings: int = 1) -> None:
    """Each of a head's rows is within 2^-4 of its numbers, or a step of 2^-10 of 448th of its largest."""
    assert (ours is None) == (exact is None)
    if ours is None or exact is None:
        return
    assert ours.holds_fresh == exact.holds_fresh
    for a, b in zip(ours[:2], exact[:2], strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        largest = b.abs().amax(-1, keepdim=True)
        assert ((a - b).abs() <= roundings * largest * 2.0**-4).all()  # a turn mixes two numbers of a row


@pytest.mark.parametrize("name", SETTINGS)
def test_what_chunks_see(name: str) -> None:
    torch.manual_seed(0)
    exact, ours = pair(**SETTINGS[name])
    for _ in range(8):
        for cache in (exact, ours):
            cache.begin_chunk()
        tokens = exact.frames * TOKENS
        for layer in range(LAYERS):
            for _ in range(2):  # what the last pass wrote stays
                k, v = torch.randn(2, BATCH, tokens, HEADS, WIDTH).unbind(0)
                for cache in (exact, ours):
                    cache[layer].write(k, v)
            assert_near(ours[layer].past(True), exact[layer].past(True), roundings=2)
            assert_near(ours[layer].past(False), exact[layer].past(False), roundings=2)
        for cache in (exact, ours):
            cache.commit()


def test_a_sink_that_moves_is_rounded_once_and_not_again() -> None:
    """Its error after many chunks is that of the first rounding and one more."""
    torch.manual_seed(0)
    exact, ours = pair(window_frames=6, sink_frames=3, positions="window")
    errors = []
    for _ in range(40):
        for cache in (exact, ours):
            cache.begin_chunk()
        k, v = torch.randn(2, BATCH, 3 * TOKENS, HEADS, WIDTH).unbind(0)
        for cache in (exact, ours):
            for layer in range(LAYERS):
                cache[layer].write(k, v)
        seen: list[Tensor] = [cache[0].past(True).k[:, : 3 * TOKENS] for cache in (ours, exact)]
        errors.append((seen[0] - seen[1]).norm() / seen[1].norm())
        for cache in (exact, ours):
            cache.commit()
    assert max(errors[2:]) < 1.6 * errors[1]


def test_memory_is_a_byte_a_number_and_four_a_row() -> None:
    half, ours = pair(torch.bfloat16, window_frames=9)
    numbers = half.storage.numel()
    assert ours.storage.nbytes + ours.scales.nbytes == numbers + 4 * numbers // WIDTH
    assert half.storage.nbytes == 2 * numbers


def test_it_begins_anew() -> None:
    torch.manual_seed(0)
    _, ours = pair(window_frames=6, sink_frames=3, positions="window", ema=0.5)
    chunks = torch.randn(4, 2, BATCH, 3 * TOKENS, HEADS, WIDTH)

    def run() -> Tensor:
        for k, v in chunks:
            ours.begin_chunk()
            for layer in range(LAYERS):
                ours[layer].write(k, v)
            seen = ours[1].past(True)
            ours.commit()
        return torch.stack(seen[:2])

    first = run()
    ours.reset()
    assert torch.equal(run(), first)


def test_what_is_refused() -> None:
    _, ours = pair(window_frames=6)
    with pytest.raises(ValueError, match=r"^ChunkCache: place, write: no chunk is under way"):
        ours[0].write(torch.zeros(0), torch.zeros(0))
    ours.begin_chunk()
    with pytest.raises(ValueError, match=r"^Fp8ChunkCache: slot: expected write\(k, v\)"):
        ours[0].slot()
