"""A cache uses its memory again: a backward pass that still needs it is right, or raises."""

import contextlib
import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from stream_r1_kernels import ChunkCache, RotaryGrid, cached_chunk_attention, dmd_gradient_, qk_norm_rotary

ROTARY, HEADS, WIDTH, TOKENS = RotaryGrid(16), 2, 16, 8  # tokens of a chunk: 2 frames of 2 x 2
WINDOW, WHOLE = {"window_frames": 4}, {"max_frames": 10}
SINK = {"window_frames": 6, "sink_frames": 2, "positions": "window"}


def new_cache(**settings) -> ChunkCache:
    return ChunkCache(1, 1, HEADS, ROTARY, 2, 2, 2, **settings)


def keep_everything(*_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


selective = functools.partial(create_selective_checkpoint_contexts, keep_everything)
WAYS = {
    "without": lambda f, *x: f(*x),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "selective": functools.partial(checkpoint, use_reentrant=False, context_fn=selective),
}


class Loop:
    """Chunks in a loop: a pass with gradients, then one that writes. Collects the gradients of q."""

    def __init__(self, attend, *, at_once: bool = False) -> None:
        self.attend, self.at_once = attend, at_once
        self.generator = torch.Generator().manual_seed(1)
        self.qs: list[Tensor] = []
        self.losses: list[Tensor] = []

    def chunk(self, cache: ChunkCache) -> None:
        cache.begin_chunk()
        q, k, v = (torch.randn(1, TOKENS, HEADS, WIDTH, generator=self.generator) for _ in range(3))
        self.qs.append(q.requires_grad_())
        loss = self.attend(cache, q, k, v).square().sum()
        if self.at_once:
            loss.backward()
        else:
            self.losses.append(loss)
        for slot, value in zip(cache[0].slot(), (k, v), strict=True):
            slot.copy_(value)
        cache.commit()

    def run(self, caches: list[ChunkCache], chunks: int = 5) -> "Loop":
        for cache in caches:
            cache.reset()
            for _ in range(chunks):
                self.chunk(cache)
        return self

    def gradients(self) -> list[Tensor]:
        if not self.at_once:
            torch.stack(self.losses).sum().backward()
        return [q.grad for q in self.qs]


def attend(cache: ChunkCache, q: Tensor, k: Tensor, v: Tensor, **past) -> Tensor:
    return cached_chunk_attention(q, k, v, cache[0].past(False, **past))


def expected(rollouts: int = 1, **settings) -> list[Tensor]:
    """A cache for each rollout, and a backward for each chunk before anything is written again."""
    return Loop(attend, at_once=True).run([new_cache(**settings) for _ in range(rollouts)]).gradients()


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [WHOLE, WINDOW, SINK], ids=["whole", "window", "sink"])
def test_a_snapshot_is_right_whatever_is_written_later(settings):
    cache = new_cache(**settings)
    loop = Loop(functools.partial(attend, copy=True)).run([cache, cache])
    assert_equal(loop.gradients(), expected(2, **settings))


@pytest.mark.parametrize(
    ("settings", "rollouts"), [(WHOLE, 2), (WINDOW, 1), (SINK, 1)], ids=["reset", "window", "moving sink"]
)
def test_a_backward_over_memory_that_was_written_again_raises(settings, rollouts):
    loop = Loop(attend).run(rollouts * [new_cache(**settings)])
    with pytest.raises(ValueError, match=r"past.*written.*past\(copy=True\)"):
        loop.gradients()


def test_another_attention_over_memory_that_was_written_again_raises_too():
    def plain(cache: ChunkCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past = cache[0].past(False)
        if past is None:
            return q
        return torch.einsum("bqhd,bkhd,bkhe->bqhe", q, past.k, past.v)

    loop = Loop(plain).run([new_cache(**WINDOW)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loop.gradients()


def test_memory_that_was_not_written_again_is_as_good_as_a_snapshot():
    assert_equal(Loop(attend).run([new_cache(**WHOLE)]).gradients(), expected(**WHOLE))
    cache = new_cache(**WHOLE)
    loop = Loop(attend).run([cache])
    cache.reset()  # as long as nobody writes
    cache.begin_chunk()
    assert_equal(loop.gradients(), expected(**WHOLE))
    cache = new_cache(window_frames=6)
    loop = Loop(attend).run([cache], chunks=3)  # the window is full, nothing is evicted
    assert_equal(loop.gradients(), expected(window_frames=6)[:3])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [WHOLE, WINDOW], ids=["whole", "window"])
def test_a_past_handed_to_a_checkpoint_is_kept_by_it(way, settings):
    def checkpointed(cache: ChunkCache, *qkv: Tensor) -> Tensor:
        return WAYS[way](cached_chunk_attention, *qkv, cache[0].past(False, copy=True))

    cache = new_cache(**settings)
    assert_equal(Loop(checkpointed).run([cache, cache]).gradients(), expected(2, **settings))


@pytest.mark.parametrize("way", WAYS)
def test_a_view_handed_to_a_checkpoint_raises_once_it_is_written_again(way):
    def checkpointed(cache: ChunkCache, *qkv: Tensor) -> Tensor:
        return WAYS[way](cached_chunk_attention, *qkv, cache[0].past(False))

    assert_equal(Loop(checkpointed).run([new_cache(**WHOLE)]).gradients(), expected(**WHOLE))
    loop = Loop(checkpointed).run(2 * [new_cache(**WHOLE)])
    with pytest.raises(ValueError, match=r"past.*written.*past\(copy=True\)"):
        loop.gradients()


@pytest.mark.parametrize("way", [way for way in WAYS if way != "without"])
@pytest.mark.parametrize("settings", [WHOLE, WINDOW], ids=["whole", "window"])
def test_a_cache_read_inside_of_a_checkpoint_is_right_or_refused(way, settings):
    def checkpointed(cache: ChunkCache, *qkv: Tensor) -> Tensor:
        return WAYS[way](lambda *x: attend(cache, *x, copy=True), *qkv)

    at_once = Loop(checkpointed, at_once=True).run([new_cache(**settings)])
    assert_equal(at_once.gradients(), expected(**settings))
    loop = Loop(checkpointed).run([new_cache(**settings)])
    with pytest.raises(ValueError, match=r"past: .*checkpointing"):
        loop.gradients()
    cache = new_cache(**settings)
    loop = Loop(checkpointed).run([cache])
    cache.reset()
    loop.chunk(cache)  # the same chunk of another stream
    with pytest.raises(ValueError, match=r"past: .*checkpointing"):
        torch.autograd.backward(loop.losses[0])


@pytest.mark.parametrize("way", [way for way in WAYS if way != "without"])
def test_a_checkpoint_neither_writes_nor_moves_the_cache_again(way):
    cache = new_cache(**WHOLE)
    cache.begin_chunk()

    def whole_chunk(q: Tensor) -> Tensor:
        with torch.no_grad():
            cache[0].slot()[0].copy_(q)
        return cached_chunk_attention(q, q, q, cache[0].past(False))

    def and_commit(q: Tensor) -> Tensor:
        cache.begin_chunk()
        out = cached_chunk_attention(q, q, q, cache[0].past(False))
        cache.commit()
        return out

    q = torch.randn(1, TOKENS, HEADS, WIDTH, requires_grad=True)
    out = WAYS[way](whole_chunk, q)
    before = cache.storage.clone()
    with pytest.raises(ValueError, match=r"slot: .*checkpointing"):
        out.sum().backward()
    assert torch.equal(cache.storage, before)
    out = WAYS[way](and_commit, q)
    frame = cache.next_frame
    with pytest.raises(ValueError, match="checkpointing"):
        out.sum().backward()
    assert cache.next_frame == frame


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shared", [False, True])
def test_a_checkpoint_around_a_whole_stream_is_right(way, shared):
    """It begins its streams itself, when it is run again too."""
    cache = new_cache(**WINDOW) if shared else None

    def rollout(x: Tensor, which: Tensor) -> Tensor:
        loop = Loop(lambda cache, q, k, v: attend(cache, x * q.detach(), k, v, copy=True))
        loop.generator.manual_seed(int(which))
        loop.run([cache or new_cache(**WINDOW)])
        return torch.stack(loop.losses).sum()

    def gradient(way: str) -> Tensor:
        x = torch.full((), 0.5, requires_grad=True)
        total = sum(WAYS[way](rollout, x, torch.tensor(which)) for which in range(3))
        return torch.autograd.grad(total, x)[0] if way != "reentrant" else total.backward() or x.grad

    # reentrant: each part adds what it found to x.grad by itself, which is another order of the sum
    close = 1e-6 if way == "reentrant" else 0
    torch.testing.assert_close(gradient(way), gradient("without"), rtol=close, atol=0)


def test_pinned_phases_are_copied_where_gradients_are_on():
    def gradients(pinned: bool, way: str) -> list[Tensor]:
        cache = new_cache(**WINDOW)
        if pinned:
            cache.pin_positions()
        q = torch.ones(1, TOKENS, HEADS * WIDTH, requires_grad=True)
        weight = torch.linspace(-1, 1, HEADS * WIDTH)
        losses = []
        for _ in range(3):
            cache.begin_chunk()
            rotate = functools.partial(qk_norm_rotary, num_heads=HEADS)
            out, _ = WAYS[way](rotate, q, q.detach(), weight, weight, *cache.positions())
            losses.append((out * torch.arange(WIDTH)).sum())
            cache.commit()
        torch.stack(losses).sum().backward()
        return [q.grad]

    for way in WAYS:
        assert_equal(gradients(True, way), gradients(False, "without"))
    cache = new_cache(**WINDOW)
    cache.pin_positions()
    places = set()
    for _ in range(3):
        cache.begin_chunk()
        with torch.no_grad():
            places.add(tuple(phases.data_ptr() for phases in cache.positions()))
        cache.commit()
    assert len(places) == 1


def put_a_graph(cache: ChunkCache) -> None:
    cache[0].slot()[1].copy_(torch.randn(1, TOKENS, HEADS, WIDTH, requires_grad=True))


def put_a_graph_into_the_buffer(cache: ChunkCache) -> None:
    cache.storage.mul_(torch.ones((), requires_grad=True))


def require_grad(cache: ChunkCache) -> None:
    cache.storage.requires_grad_()


def put_nan(cache: ChunkCache) -> None:
    cache.storage.fill_(torch.nan)
    for part in cache[0].slot():
        part.fill_(torch.inf)


def use_in_inference_mode(cache: ChunkCache) -> None:
    with torch.inference_mode():
        for _ in range(3):
            cache.begin_chunk()
            cache[0].slot()[0].copy_(torch.randn(1, TOKENS, HEADS, WIDTH))
            cache[0].past(False)
            cache.commit()
        cache.begin_chunk()
        cache[0].slot(), cache[0].past(False), cache.positions()


def learn_a_past(cache: ChunkCache) -> None:
    cache.commit()
    cache.begin_chunk()
    cache[0].past(False).k.requires_grad_()


MISTAKES = [
    put_a_graph,
    put_a_graph_into_the_buffer,
    require_grad,
    put_nan,
    use_in_inference_mode,
    learn_a_past,
]


@pytest.mark.parametrize("made_in_inference_mode", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_reset_repairs_whatever_was_put_in(mistake, made_in_inference_mode):
    mode = torch.inference_mode() if made_in_inference_mode else contextlib.nullcontext()
    for settings in (WINDOW, SINK | {"ema": 0.5}, WHOLE):
        with mode:
            cache = new_cache(**settings)
            cache.pin_positions()
        cache.begin_chunk()
        mistake(cache)
        cache.reset()
        copies = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        want = expected(**settings)
        for each in (cache, *copies):
            assert not each.storage.requires_grad
            assert_equal(Loop(attend, at_once=True).run([each]).gradients(), want)
            q = torch.ones(1, TOKENS, HEADS, WIDTH)
            each.begin_chunk() if settings is not WHOLE else each.reset() or each.begin_chunk()
            put = [part.copy_(q) for part in each[0].slot()]
            assert not any(part.requires_grad for part in put)
            assert cached_chunk_attention(q, None, None, each[0].past(True)).isfinite().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_writes_of_ops_are_counted_in_every_mode(mode):
    """A backward over what an op wrote to raises, as it does with torch's own ops."""
    x = torch.randn(4, 2, 3, 4, 5, 6)
    tokens, ones = torch.randn(1, TOKENS, HEADS * WIDTH), torch.ones(HEADS * WIDTH)
    phases = ROTARY.phases(0, 2, 2, 2)

    def rotate(k_out: Tensor) -> None:
        qk_norm_rotary(tokens, tokens, ones, ones, *phases, num_heads=HEADS, k_out=k_out)

    for buffer, write in (
        (torch.zeros(2, 3, 4, 5, 6), lambda buffer: dmd_gradient_(buffer, *x)),
        (torch.zeros(1, TOKENS, HEADS, WIDTH), rotate),
    ):
        leaf = torch.ones((), requires_grad=True)
        out = (leaf * buffer).sum()
        with mode():
            write(buffer)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


@pytest.mark.parametrize("settings", [WHOLE, WINDOW, SINK], ids=["whole", "window", "sink"])
@pytest.mark.parametrize("snapshot", [False, True])
def test_compiled_code_keeps_what_its_backward_needs(settings, snapshot):
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(attend, copy=snapshot))
    cache = new_cache(**settings)
    got = Loop(compiled).run([cache, cache]).gradients()
    torch.testing.assert_close(got, expected(2, **settings), rtol=1e-5, atol=1e-6)
