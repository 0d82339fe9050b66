"""Streams under torch.compile's default backend against eager: what they return and what the cache holds."""

import copy

import pytest
import torch
from torch import Tensor, nn

from stream_r1_kernels import ChunkCache, RotaryGrid, cached_chunk_attention, qk_norm_rotary

HEADS, WIDTH, CHUNKS = 2, 8, 11
ROLLING = {"window_frames": 6, "sink_frames": 2, "positions": "window", "ema": 0.9}

pytestmark = pytest.mark.usefixtures("one_thread")


def make_cache(layers: int = 2, batch: int = 1, dtype: torch.dtype = torch.float32, **settings) -> ChunkCache:
    return ChunkCache(layers, batch, HEADS, RotaryGrid(WIDTH), 1, 3, 2, dtype=dtype, **settings)


class Stream(nn.Module):
    """Layers that rotate, write, and attend; with a cache of its own or one that it is given."""

    def __init__(self, by_views: bool, cache: ChunkCache | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.rand(HEADS * WIDTH) + 0.5)
        self.by_views, self.cache = by_views, cache

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        cache = self.cache if cache is None else cache
        for layer in cache.layers:
            cos, sin = cache.positions()
            k, v = 1.5 * x, (x - 1).unflatten(-1, (HEADS, WIDTH))
            if self.by_views:
                k_slot, v_slot = layer.slot()
                q, k = qk_norm_rotary(x, k, self.weight, self.weight, cos, sin, num_heads=HEADS, k_out=k_slot)
                v_slot.copy_(v)
            else:
                q, k = qk_norm_rotary(x, k, self.weight, self.weight, cos, sin, num_heads=HEADS)
                layer.write(k, v)
            x = cached_chunk_attention(q, None, None, layer.past(holds_fresh=True)).flatten(2) + x
        return x


class Steps(Stream):
    """The same with the whole of a chunk's life in the graph."""

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        self.cache.begin_chunk()
        x = super().forward(x, cache)
        self.cache.commit()
        return x


def chunks(count: int = CHUNKS, batch: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count, batch, 6, HEADS * WIDTH, generator=generator).to(dtype))


def assert_streams_agree(compiled, ours: ChunkCache, eager, theirs: ChunkCache, xs, warm: int) -> None:
    """Chunk by chunk, two passes each; nothing is compiled from chunk `warm` on."""
    # inductor keeps in float32 what eager code rounds in between, here up to four times, of values of about 1
    close = {"rtol": 2**-6, "atol": 2**-6} if ours.storage.dtype == torch.bfloat16 else {}
    for index, x in enumerate(xs):
        for cache in (ours, theirs):
            cache.begin_chunk()
        for passed in (x, x.flip(1)):
            with torch._dynamo.config.patch(error_on_recompile=index >= warm):
                got = compiled(passed, ours)
            torch.testing.assert_close(got, eager(passed, theirs), **close)
        torch.testing.assert_close(ours.storage, theirs.storage, **close)
        for cache in (ours, theirs):
            cache.commit()


@torch.no_grad()
@pytest.mark.parametrize(("by_views", "dynamic"), [(True, None), (False, None), (False, True)])
def test_a_function_that_is_given_the_cache(by_views, dynamic):
    torch.compiler.reset()
    stream = Stream(by_views)
    compiled = torch.compile(stream, fullgraph=True, dynamic=dynamic)
    ours, theirs = make_cache(**ROLLING), make_cache(**ROLLING)
    assert_streams_agree(compiled, ours, stream, theirs, chunks(), 2)  # graphs: a first chunk's, any chunk's
    if not by_views and dynamic is None:
        # a cache of any size, a batch of any size, then nothing new for another one
        ours, theirs = make_cache(max_frames=8), make_cache(max_frames=8)
        assert_streams_agree(compiled, ours, stream, theirs, chunks(4), 2)
        for batch, warm in ((3, 3), (2, 0)):
            ours, theirs = (make_cache(batch=batch, **ROLLING) for _ in range(2))
            assert_streams_agree(compiled, ours, stream, theirs, chunks(6, batch), warm)


@torch.no_grad()
def test_a_stream_in_bfloat16():
    torch.compiler.reset()
    stream = Stream(False)
    compiled = torch.compile(stream, fullgraph=True)
    ours, theirs = (make_cache(dtype=torch.bfloat16, **ROLLING) for _ in range(2))
    assert_streams_agree(compiled, ours, stream, theirs, chunks(6, 1, torch.bfloat16), 3)


@torch.no_grad()
def test_a_module_that_holds_the_cache():
    torch.compiler.reset()
    ours, theirs = make_cache(**ROLLING), make_cache(**ROLLING)
    module, plain = Steps(False, ours), Steps(False, theirs)
    compiled = torch.compile(module, fullgraph=True)
    for index, x in enumerate(chunks(14)):
        if index == 12:
            for cache in (ours, theirs):
                cache.reset()
        # the first chunk, those that fill the window, any one over a full window
        with torch._dynamo.config.patch(error_on_recompile=index >= 4):
            got = compiled(x)
        torch.testing.assert_close(got, plain(x))
        torch.testing.assert_close(ours.storage, theirs.storage)
    assert ours.next_frame == theirs.next_frame == 4


@torch.no_grad()
def test_the_sink_of_one_layer_is_renewed_in_a_graph():
    def passes(cache: ChunkCache, x: Tensor) -> Tensor:
        cache.begin_chunk(renew_sink=False)
        for layer in cache.layers:
            layer.renew_sink()
            layer.write(x, 2 * x)
        seen = [layer.past(holds_fresh=True).k.sum() for layer in cache.layers]
        cache.commit()
        return torch.stack(seen)

    torch.compiler.reset()
    compiled = torch.compile(passes, fullgraph=True)
    ours = make_cache(3, **ROLLING)
    theirs = copy.deepcopy(ours)
    for x in chunks(7):
        x = x.unflatten(-1, (HEADS, WIDTH))
        torch.testing.assert_close(compiled(ours, x), passes(theirs, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.storage, theirs.storage)


@pytest.mark.parametrize("op", ["write_slot_", "renew_sinks_"])
def test_opcheck(op):
    torch.manual_seed(0)
    storage, part = torch.randn(3, 2, 1, 8, 2, 4), torch.randn(1, 2, 2, 4)
    sinks, phases = torch.randn(2, 3, 1, 2, 2, 4), RotaryGrid(4).temporal_shift(3)
    arguments = {
        "write_slot_": (storage, part, part + 1, 1, 4),
        "renew_sinks_": (storage, *sinks, 1, 2, 4, 0.9, 0, *phases, *phases),
    }
    torch.library.opcheck(getattr(torch.ops.stream_r1, op).default, arguments[op])
