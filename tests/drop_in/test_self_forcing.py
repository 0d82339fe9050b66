"""The adapter of Self Forcing's cache dictionaries against the roll and concatenation that it replaces."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from stream_r1.drop_in.self_forcing import adopt, attend, self_attention
from stream_r1.models.blocks import Block
from stream_r1.replay import read_recording, recorded_student, relative_error
from stream_r1_kernels import RotaryGrid, apply_rotary

GOLDEN = Path(__file__).parents[1] / "golden"
LAYERS, BATCH, HEADS, WIDTH, ROWS, COLUMNS = 2, 2, 2, 12, 2, 3
FRAME, CHUNK = ROWS * COLUMNS, 3
GRID = {"rows": ROWS, "columns": COLUMNS, "frames_per_chunk": CHUNK}
ROTARY = RotaryGrid(WIDTH)

SETTINGS = {
    "whole video": {"window": False},
    "window": {},
    "sink": {"sink_frames": 3},
    "sink at the window": {"sink_frames": 3, "positions": "window"},
    "averaged sink at the window": {"sink_frames": 3, "positions": "window", "ema": 0.7},
    "window of 8": {"frames": 8},
    "one frame of sink, window of 8": {"frames": 8, "sink_frames": 1, "positions": "window"},
    "four frames of sink, window of 8": {"frames": 8, "sink_frames": 4},
}


def dictionaries(frames: int, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> list[dict]:
    return dictionaries_of((BATCH, frames * FRAME, HEADS, WIDTH), dtype, layers)


def dictionaries_of(shape: tuple[int, ...], dtype: torch.dtype, layers: int) -> list[dict]:
    """As a Self Forcing pipeline makes them."""
    return [
        {
            "k": torch.zeros(shape, dtype=dtype),
            "v": torch.zeros(shape, dtype=dtype),
            "global_end_index": torch.tensor([0]),
            "local_end_index": torch.tensor([0]),
        }
        for _ in range(layers)
    ]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def rotated(x: Tensor, first_frame: int) -> Tensor:
    return apply_rotary(x, *ROTARY.phases(first_frame, x.shape[1] // FRAME, ROWS, COLUMNS))


class RolledCache:
    """One layer's dictionary the published way: un-rotated keys, the window rolled to the left when full."""

    def __init__(self, frames, window=True, sink_frames=0, positions="absolute", ema=None):
        (self.entry,) = dictionaries(frames, layers=1)
        self.window, self.sink = window, sink_frames * FRAME
        self.relative, self.ema = positions == "window", ema

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        entry, new = self.entry, q.shape[1]
        size, end = entry["k"].shape[1], start + new
        held, seen = int(entry["local_end_index"]), int(entry["global_end_index"])
        excess = held + end - seen - size
        if self.window and excess > 0:
            for name in ("k", "v"):
                buffer = entry[name]
                evicted = buffer[:, self.sink : self.sink + excess].clone()
                if self.ema is not None:
                    buffer[:, : self.sink] = self.ema * buffer[:, : self.sink] + (1 - self.ema) * evicted
                buffer[:, self.sink : held - excess] = buffer[:, self.sink + excess : held].clone()
            held -= excess
        stop = held + end - seen
        entry["k"][:, stop - new : stop] = k.detach()
        entry["v"][:, stop - new : stop] = v.detach()
        entry["global_end_index"].fill_(end)
        entry["local_end_index"].fill_(stop)
        keys = torch.cat([entry["k"][:, : stop - new].clone(), k], 1)
        values = torch.cat([entry["v"][:, : stop - new].clone(), v], 1)
        if self.relative or not self.window:
            return dense(rotated(q, (stop - new) // FRAME), rotated(keys, 0), values)
        rolling = (end - stop + self.sink) // FRAME  # frame of the first one after the sink
        keys = torch.cat([rotated(keys[:, : self.sink], 0), rotated(keys[:, self.sink :], rolling)], 1)
        return dense(rotated(q, start // FRAME), keys, values)


def random_chunk(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shape = (BATCH, CHUNK * FRAME, HEADS, WIDTH)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_outputs_and_counters_are_those_of_the_rolled_cache(settings):
    chunks = 4 if settings.get("window") is False else 9
    frames = 12 if settings.get("window") is False else settings.get("frames", 9)
    settings = {name: value for name, value in settings.items() if name != "frames"}
    generator = torch.Generator().manual_seed(0)
    kv_cache = dictionaries(frames)
    adopt(kv_cache, **GRID, **settings)
    published = [RolledCache(frames, **settings) for _ in range(LAYERS)]
    for chunk in range(chunks):
        start = chunk * CHUNK * FRAME
        for _ in range(3):  # passes
            for ours, theirs in zip(kv_cache, published, strict=True):
                q, k, v = random_chunk(generator)
                expected = theirs.attend(q, k, v, start)
                torch.testing.assert_close(attend(q, k, v, ours, start), expected, rtol=0, atol=2e-6)
                for name in ("global_end_index", "local_end_index"):
                    assert ours[name].item() == theirs.entry[name].item()


def test_bfloat16_is_as_near_to_the_truth_as_the_rolled_cache():
    settings = {"sink_frames": 3, "positions": "window"}
    generator = torch.Generator().manual_seed(0)
    (ours,) = dictionaries(9, torch.bfloat16, layers=1)
    adopt([ours], **GRID, **settings)
    narrow, exact = RolledCache(9, **settings), RolledCache(9, **settings)
    narrow.entry |= {name: narrow.entry[name].bfloat16() for name in ("k", "v")}
    for chunk in range(6):
        q, k, v = random_chunk(generator, torch.bfloat16)
        start = chunk * CHUNK * FRAME
        truth = exact.attend(q.float(), k.float(), v.float(), start)
        theirs = (narrow.attend(q, k, v, start).float() - truth).abs().max()
        mine = (attend(q, k, v, ours, start).float() - truth).abs().max()
        assert mine <= 2 * theirs + torch.finfo(torch.bfloat16).eps * truth.abs().max()


@pytest.mark.parametrize("name", ["window_ema_sink", "absolute_sink", "absolute_global"])
def test_a_published_recording_is_reproduced_through_dictionaries(name, monkeypatch):
    """Our student, its self-attention over adopted dictionaries, makes the recorded velocities."""
    recording = read_recording(GOLDEN / f"stream_{name}.safetensors")
    student = recorded_student(recording).requires_grad_(False)
    calls, config = recording.calls, student.config
    rows, columns = (side // 2 for side in calls["x"].shape[-2:])
    window, chunk = config["window_frames"], config["frames_per_chunk"]
    frames = window or recording.meta["chunks"] * chunk
    shape = (1, frames * rows * columns, config["num_attention_heads"], config["attention_head_dim"])
    kv_cache = dictionaries_of(shape, torch.float32, len(student.blocks))
    adopt(
        kv_cache,
        rows=rows,
        columns=columns,
        frames_per_chunk=chunk,
        window=window is not None,
        sink_frames=config["sink_frames"],
        positions=config["positions"],
        ema=config["sink_ema"],
    )
    layer_of = {block: layer for layer, block in enumerate(student.blocks)}
    text = student.encode_text(calls["context"])
    for call in range(len(calls["x"])):
        start = call // 5 * chunk * rows * columns
        monkeypatch.setattr(
            Block,
            "self_attention",
            lambda block, h, *_, start=start: self_attention(
                PublishedNames(block), h, kv_cache[layer_of[block]], start
            ),
        )
        v = student(calls["x"][call], calls["t"][call], text)
        assert relative_error(v, calls["v"][call]) < 1e-5, f"call {call}"


class PublishedNames:
    """Our block's attention under the names of the published module; the block projects what it returns."""

    def __init__(self, block: Block) -> None:
        attn = block.attn1
        self.q, self.k, self.v, self.o = attn.to_q, attn.to_k, attn.to_v, nn.Identity()
        self.num_heads = block.num_heads
        self.norm_q, self.norm_k = (Norm(norm.weight, block.eps) for norm in (attn.norm_q, attn.norm_k))


class Norm(nn.Module):
    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps


class TinyAttention(nn.Module):
    """The published module's members."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * WIDTH
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = (Norm(nn.Parameter(torch.rand(width) + 0.5), 1e-6) for _ in range(2))
        self.num_heads = HEADS


WAYS = {
    "without": lambda f, *x: f(*x),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
}


def new_stream(kv_cache: list[dict]) -> None:
    """As a pipeline begins its next video."""
    for entry in kv_cache:
        entry["global_end_index"], entry["local_end_index"] = torch.tensor([0]), torch.tensor([0])


def rollout(
    attn: TinyAttention,
    settings: dict,
    way: str,
    *,
    streams: int = 1,
    shared: bool = True,
    at_once: bool = False,
) -> dict[str, Tensor]:
    """Gradients of 5 chunks in a window that moves on: a pass with gradients and a clean one for each.

    `shared`: one list of dictionaries for all streams; `at_once`: a backward for each chunk.
    """
    attn.zero_grad()
    generator = torch.Generator().manual_seed(3)
    inputs, outputs = [], []
    for stream in range(streams):
        if stream == 0 or not shared:
            kv_cache = dictionaries(9, layers=1)
            adopt(kv_cache, **GRID, **settings)
        new_stream(kv_cache)
        for chunk in range(3 if settings.get("window") is False else 5):
            start = chunk * CHUNK * FRAME
            x = torch.randn(BATCH, CHUNK * FRAME, HEADS * WIDTH, generator=generator).requires_grad_()
            out = WAYS[way](self_attention, attn, x, kv_cache[0], start).square().sum()
            inputs.append(x)
            if at_once:
                out.backward()
            else:
                outputs.append(out)
            with torch.no_grad():
                self_attention(attn, x + 1, kv_cache[0], start)
    if outputs:
        torch.stack(outputs).sum().backward()
    leaves = dict(attn.named_parameters()) | {f"x{index}": x for index, x in enumerate(inputs)}
    return {name: leaf.grad.clone() for name, leaf in leaves.items()}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_gradients_are_those_of_the_rolled_cache():
    torch.manual_seed(0)
    attn = TinyAttention()
    ours = rollout(attn, {"sink_frames": 3, "positions": "window"}, "without")

    published = RolledCache(9, sink_frames=3, positions="window")
    generator = torch.Generator().manual_seed(3)

    def projected(x):
        q, k = (
            functional.rms_norm(layer(x), x.shape[-1:], norm.weight, norm.eps)
            for layer, norm in ((attn.q, attn.norm_q), (attn.k, attn.norm_k))
        )
        return [y.unflatten(-1, (HEADS, WIDTH)) for y in (q, k, attn.v(x))]

    inputs, total = [], 0
    for chunk in range(5):
        x = torch.randn(BATCH, CHUNK * FRAME, HEADS * WIDTH, generator=generator).requires_grad_()
        inputs.append(x)
        start = chunk * CHUNK * FRAME
        total = total + attn.o(published.attend(*projected(x), start).flatten(2)).square().sum()
        with torch.no_grad():
            published.attend(*projected(x + 1), start)
    leaves = dict(attn.named_parameters()) | {f"x{index}": x for index, x in enumerate(inputs)}
    expected = torch.autograd.grad(total, list(leaves.values()))
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [{"window": False}, {}], ids=["whole video", "window"])
def test_checkpointing_changes_no_gradient(settings, way):
    """Over a window as long as each chunk's backward comes before the next chunk."""
    torch.manual_seed(0)
    attn = TinyAttention()
    plain = rollout(attn, settings, "without", streams=2, shared=False)
    assert_same(rollout(attn, settings, way, streams=2, at_once=True), plain)
    if settings:
        assert_same(rollout(attn, settings, way), rollout(attn, settings, "without"))


@pytest.mark.parametrize("way", ["not reentrant", "reentrant"])
def test_checkpointing_over_a_moving_window_is_refused(way):
    with pytest.raises(ValueError, match="gradient checkpointing computes this chunk again"):
        rollout(TinyAttention(), {}, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_backward_after_a_new_stream_over_the_same_memory_raises(way):
    with pytest.raises(ValueError, match=r"written since|a new stream has begun"):
        rollout(TinyAttention(), {"window": False}, way, streams=2)


def test_a_backward_after_a_new_stream_over_a_window_has_its_own_copies():
    attn = TinyAttention()
    assert_same(
        rollout(attn, {"sink_frames": 3}, "without", streams=2),
        rollout(attn, {"sink_frames": 3}, "without", streams=2, shared=False),
    )


def test_counters_may_be_integers():
    tensors, integers = dictionaries(9), dictionaries(9)
    for entry in integers:
        entry["global_end_index"] = entry["local_end_index"] = 0
    for kv_cache in (tensors, integers):
        adopt(kv_cache, **GRID, sink_frames=3)
    generator = torch.Generator().manual_seed(0)
    for chunk in (0, 1, 2, 3, 4, 0, 1):
        if chunk == 0:
            new_stream(tensors)
            for entry in integers:
                entry["global_end_index"] = entry["local_end_index"] = 0
        for ours, theirs in zip(integers, tensors, strict=True):
            q, k, v = random_chunk(generator)
            start = chunk * CHUNK * FRAME
            assert torch.equal(attend(q, k, v, ours, start), attend(q, k, v, theirs, start))
            for name in ("global_end_index", "local_end_index"):
                assert ours[name] == int(theirs[name])
                assert type(ours[name]) is int


def test_memory_is_one_buffer_that_never_grows():
    kv_cache = dictionaries(9)
    cache = adopt(kv_cache, **GRID)
    addresses = {entry[name].data_ptr() for entry in kv_cache for name in ("k", "v")}
    assert len(addresses) == 2 * LAYERS
    for chunk in range(20):
        for entry in kv_cache:
            attend(*random_chunk(torch.Generator().manual_seed(0)), entry, chunk * CHUNK * FRAME)
    assert {entry[name].data_ptr() for entry in kv_cache for name in ("k", "v")} == addresses
    assert cache.next_frame == 19 * CHUNK


def test_counters_at_zero_begin_a_new_stream():
    (entry,) = dictionaries(9, layers=1)
    adopt([entry], **GRID)
    chunk = random_chunk(torch.Generator().manual_seed(0))
    first = attend(*chunk, entry, 0)
    for index in (1, 2):
        attend(*chunk, entry, index * CHUNK * FRAME)
    with pytest.raises(ValueError, match="or 0 with global_end_index 0"):
        attend(*chunk, entry, 0)
    new_stream([entry])
    assert torch.equal(attend(*chunk, entry, 0), first)


def test_a_chunk_that_nothing_kept_is_refused():
    (entry,) = dictionaries(9, layers=1)
    adopt([entry], **GRID)
    q, k, v = random_chunk(torch.Generator().manual_seed(0))
    attend(q.requires_grad_(), k, v, entry, 0)
    with pytest.raises(ValueError, match="no pass without gradients has kept the chunk at 0"):
        attend(q, k, v, entry, CHUNK * FRAME)


def test_what_does_not_fit_is_refused():
    lacking, flat, begun, uneven = (dictionaries(9) for _ in range(4))
    del lacking[1]["local_end_index"]
    flat[0]["k"] = flat[0]["k"][0]
    begun[1]["global_end_index"].fill_(18)
    uneven[1]["v"] = uneven[1]["v"].double()
    for kv_cache, message in (
        ([], "a dictionary a layer, got none"),
        (dictionaries(9)[0], "a dictionary a layer, got one dict"),
        (lacking, r"kv_cache\[1\]: expected k, v, global_end.*none of the name local_end"),
        (flat, r"kv_cache\[0\]\['k'\]: expected \[B, size, heads, width\]"),
        (begun, r"kv_cache\[1\]: expected a stream that has not begun.*18"),
        (uneven, r"kv_cache\[1\]\['v'\].*float64"),
    ):
        with pytest.raises(ValueError, match=message):
            adopt(kv_cache, **GRID)
    with pytest.raises(ValueError, match="whole frames of 2 x 5 tokens, got room for 54 tokens"):
        adopt(dictionaries(9), **GRID | {"columns": 5})
    (entry,) = dictionaries(9, layers=1)
    q, k, v = random_chunk(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="a dictionary that adopt"):
        attend(q, k, v, entry, 0)
    adopt([entry], **GRID)
    with pytest.raises(ValueError, match="a chunk of 3 frames of 6 tokens, got 6 tokens"):
        attend(q[:, :6], k[:, :6], v[:, :6], entry, 0)
    with pytest.raises(ValueError, match=r"q, k, v: expected \[.* as in the cache"):
        attend(q[:, :, :1], k[:, :, :1], v[:, :, :1], entry, 0)
    with pytest.raises(ValueError, match=r"expected 0 \(another pass\), 18 \(the next chunk\).*got 36"):
        attend(q, k, v, entry, 36)
