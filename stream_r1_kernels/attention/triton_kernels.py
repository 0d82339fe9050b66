"""Attention for GPUs in Triton: forward, the gradient of the queries, and those of the keys and values.

One set of kernels serves both ops. Queries and keys are counted in frames, and the mask of `chunk_attention`
is arithmetic on frames, as in `ChunkMask`. To `cached_chunk_attention` all queries are one frame, which sees
one frame, that of the fresh keys, and before them the past, a segment of memory of its own.

A block of queries lies in one chunk, so that what it sees is at most three ranges of keys; the loop runs over
the tiles of these ranges, one after the other, and no other tile is loaded. A block of keys lies in one chunk
too, and loops over the ranges of queries that see any of it.

Sums are in float32 and without atomics: the same input gives the same bits. Method: FlashAttention-2
(https://arxiv.org/abs/2307.08691).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LARGEST, _SMALLEST = tl.constexpr(3.4028234663852886e38), tl.constexpr(1e-30)
_NO_QUERY = tl.constexpr(2**31 - 1)  # sees no key
_SEEN_BY_ALL = tl.constexpr(2**31 - 2)


class Rows(NamedTuple):
    """A tensor [B, tokens, H, D] whose D values lie in a row; strides in elements, multiples of 16."""

    data: Any
    batch: int
    token: int
    head: int


class Mask(NamedTuple):
    """Who sees whom; see `ChunkMask`.

    Attributes:
        queries, keys: tokens of a frame.
        past: tokens of the past, which all queries see. With a past there is no sink.
        frames: of a sequence, or of half of one when teacher forcing.
        first, chunk: frames of the first chunk, and of the others.
        window: frames of it; 0: no window.
        sink: frames of it.
        halves: 2 when teacher forcing, else 1.
    """

    queries: int
    keys: int
    past: int
    frames: int
    first: int
    chunk: int
    window: int
    sink: int
    halves: int


# These change from call to call: a kernel must not be compiled for their values.
_NUMBERS = (
    *("heads", "queries", "keys", "past", "frames", "first", "chunk", "window", "sink", "halves"),
    "scale",
)


@triton.jit
def _block(index, BLOCK: tl.constexpr, tokens, mask):
    """Where block `index` of BLOCK tokens lies, `tokens` a frame: blocks go chunk by chunk, the noisy half's
    last.

    Returns its first token, its chunk's end token, the first and the end frame of the chunk within its half,
    and whether that is the noisy one. Blocks past the end of a short last chunk begin past its end.
    """
    in_first = tl.cdiv(mask.first * tokens, BLOCK)
    in_later = tl.cdiv(mask.chunk * tokens, BLOCK)
    in_half = in_first + tl.cdiv(tl.maximum(mask.frames - mask.first, 0), mask.chunk) * in_later
    noisy = index >= in_half
    index = tl.where(noisy, index - in_half, index)
    later = tl.maximum(index - in_first, 0)
    chunk = tl.where(index < in_first, 0, 1 + later // in_later)
    start = tl.where(chunk == 0, 0, mask.first + (chunk - 1) * mask.chunk)
    end = tl.minimum(mask.first + chunk * mask.chunk, mask.frames)
    half = tl.where(noisy, mask.frames, 0)
    begin = (half + start) * tokens + tl.where(chunk == 0, index, later % in_later) * BLOCK
    return begin, (half + end) * tokens, start, end, noisy


@triton.jit
def _window_start(end, mask):
    """The first frame that a chunk up to frame `end` sees, apart from the sink."""
    return tl.where(mask.window > 0, tl.maximum(end - mask.window, 0), 0)


@triton.jit
def _visible(start, end, noisy, mask):
    """What a chunk sees: keys [0, end0), of the past if there is one, [begin1, end1) and [begin2, end2)."""
    window = _window_start(end, mask)
    last = tl.where(noisy, start, end)
    end0 = tl.maximum(tl.minimum(tl.minimum(mask.sink, window), last) * mask.keys, mask.past)
    begin1, end1 = tl.minimum(window, last) * mask.keys, last * mask.keys
    begin2 = tl.where(noisy, mask.frames + start, 0) * mask.keys
    end2 = tl.where(noisy, mask.frames + end, 0) * mask.keys
    return end0, begin1, end1, begin2, end2


@triton.jit
def _tiles(BLOCK: tl.constexpr, ranges):
    end0, begin1, end1, begin2, end2 = ranges
    return tl.cdiv(end0, BLOCK) + tl.cdiv(end1 - begin1, BLOCK) + tl.cdiv(end2 - begin2, BLOCK)


@triton.jit
def _tile(index, BLOCK: tl.constexpr, ranges, k, v, past_k, past_v, mask, D: tl.constexpr):
    """The keys and values of tile `index` of what is visible, zeros past its end, and which are there."""
    end0, begin1, end1, begin2, end2 = ranges
    tiles0 = tl.cdiv(end0, BLOCK)
    tiles1 = tl.cdiv(end1 - begin1, BLOCK)
    in_0 = index < tiles0
    in_1 = index < tiles0 + tiles1
    begin = tl.where(in_1, begin1 + (index - tiles0) * BLOCK, begin2 + (index - tiles0 - tiles1) * BLOCK)
    begin = tl.where(in_0, index * BLOCK, begin)
    end = tl.where(in_0, end0, tl.where(in_1, end1, end2))
    in_past = in_0 & (mask.past > 0)
    seen = begin + tl.arange(0, BLOCK) < end
    keys, key_step = tl.where(in_past, past_k.data, k.data), tl.where(in_past, past_k.token, k.token)
    values, value_step = tl.where(in_past, past_v.data, v.data), tl.where(in_past, past_v.token, v.token)
    keys = tl.load(keys + _offsets(begin, key_step, BLOCK, D), mask=seen[:, None], other=0.0)
    values = tl.load(values + _offsets(begin, value_step, BLOCK, D), mask=seen[:, None], other=0.0)
    return keys, values, seen


@triton.jit
def _offsets(begin, step, BLOCK: tl.constexpr, D: tl.constexpr):
    """Of BLOCK rows from row `begin` on, which is counted in 64 bits."""
    return begin.to(tl.int64) * step + (tl.arange(0, BLOCK)[:, None] * step + tl.arange(0, D)[None, :])


@triton.jit
def _of_head(x, heads):
    """The rows of this program's batch and head."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    return Rows(x.data + batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head, x.batch, x.token, x.head)


@triton.jit
def _add_slope(slope, unit, x, sums, FLOAT16: tl.constexpr):
    """Adds slope x to sums, which are in units of `unit`, one a row; what they are in units of after it.

    A float16 can't hold every slope whose product it can: in float16 they are taken in units of the row's
    largest so far. Else the unit stays 1.
    """
    if FLOAT16:
        top = tl.max(tl.abs(slope), 1)
        above = tl.where(top < float("inf"), tl.maximum(unit, top), unit)
        sums = tl.dot((slope / above[:, None]).to(x.dtype), x, sums * (unit / above)[:, None])
        unit = above
    else:
        sums = tl.dot(slope.to(x.dtype), x, sums)
    return sums, unit


@triton.jit(do_not_specialize=_NUMBERS)
def forward(
    q, k, v, past_k, past_v, out, lse,
    heads, queries, keys, past, frames, first, chunk, window, sink, halves, scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out and lse [B, H, tokens] of one block of queries of one head: a softmax that runs over the tiles."""
    mask = Mask(queries, keys, past, frames, first, chunk, window, sink, halves)
    q, k, v, out = _of_head(q, heads), _of_head(k, heads), _of_head(v, heads), _of_head(out, heads)
    past_k, past_v = _of_head(past_k, heads), _of_head(past_v, heads)
    begin, last, start, end, noisy = _block(tl.program_id(0), BLOCK_Q, queries, mask)
    rows = begin + tl.arange(0, BLOCK_Q)
    own = rows < last
    queries_here = tl.load(q.data + _offsets(begin, q.token, BLOCK_Q, D), mask=own[:, None], other=0.0)
    ranges = _visible(start, end, noisy, mask)
    tiles = tl.where(begin < last, _tiles(BLOCK_K, ranges), 0)

    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    sums = tl.zeros((BLOCK_Q, D), tl.float32)
    for index in range(tiles):
        keys_here, values_here, seen = _tile(index, BLOCK_K, ranges, k, v, past_k, past_v, mask, D)
        scores = tl.dot(queries_here, tl.trans(keys_here)) * (scale * _LOG2_E)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        # finite, so that a score of -inf weighs nothing and one of +inf makes a sum of +inf
        shift = tl.minimum(tl.maximum(above, -_LARGEST), _LARGEST)
        shrink = tl.exp2(highest - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(values_here.dtype), values_here, sums * shrink[:, None])
        highest = above

    sums = sums / tl.where(total == 0, 1.0, total)[:, None]  # without any key: zeros
    tl.store(
        out.data + _offsets(begin, out.token, BLOCK_Q, D), sums.to(queries_here.dtype), mask=own[:, None]
    )
    lse += tl.program_id(1).to(tl.int64) * (halves * frames * queries)
    tl.store(lse + rows, (highest + tl.log2(total)) * _LN_2, mask=own)


@triton.jit(do_not_specialize=_NUMBERS)
def grad_queries(
    q, k, v, past_k, past_v, out, lse, grad_out, grad_lse, grad_q, delta, inverse,
    heads, queries, keys, past, frames, first, chunk, window, sink, halves, scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_q of one block of queries; and delta = sum(out grad_out) - grad_lse, which `grad_keys` reads.

    With p = exp(scale q k^T - lse) and ds = p (grad_out v^T - delta): grad_q = scale ds k. p is divided by
    its sum, whose `inverse` `grad_keys` reads too: at scores of 1e4 lse is known to 5e-4 alone.
    """
    FLOAT16: tl.constexpr = q.data.dtype.element_ty == tl.float16
    mask = Mask(queries, keys, past, frames, first, chunk, window, sink, halves)
    q, k, v, out = _of_head(q, heads), _of_head(k, heads), _of_head(v, heads), _of_head(out, heads)
    past_k, past_v = _of_head(past_k, heads), _of_head(past_v, heads)
    grad_out, grad_q = _of_head(grad_out, heads), _of_head(grad_q, heads)
    begin, last, start, end, noisy = _block(tl.program_id(0), BLOCK_Q, queries, mask)
    rows = begin + tl.arange(0, BLOCK_Q)
    own = rows < last
    queries_here = tl.load(q.data + _offsets(begin, q.token, BLOCK_Q, D), mask=own[:, None], other=0.0)
    upstream = tl.load(
        grad_out.data + _offsets(begin, grad_out.token, BLOCK_Q, D), mask=own[:, None], other=0.0
    )
    result = tl.load(out.data + _offsets(begin, out.token, BLOCK_Q, D), mask=own[:, None], other=0.0)
    of_head = tl.program_id(1).to(tl.int64) * (halves * frames * queries)
    lse += of_head
    shift = tl.load(lse + rows, mask=own, other=0.0) * _LOG2_E
    of_row = tl.sum(result.to(tl.float32) * upstream.to(tl.float32), 1)
    of_row -= tl.load(grad_lse + of_head + rows, mask=own, other=0.0)
    tl.store(delta + of_head + rows, of_row, mask=own)
    ranges = _visible(start, end, noisy, mask)
    tiles = tl.where(begin < last, _tiles(BLOCK_K, ranges), 0)

    shift = tl.where(shift == float("-inf"), _LARGEST, shift)  # no key has a weight
    total = tl.zeros((BLOCK_Q,), tl.float32)
    unit = tl.full((BLOCK_Q,), _SMALLEST if FLOAT16 else 1.0, tl.float32)
    sums = tl.zeros((BLOCK_Q, D), tl.float32)
    for index in range(tiles):
        keys_here, values_here, seen = _tile(index, BLOCK_K, ranges, k, v, past_k, past_v, mask, D)
        scores = tl.dot(queries_here, tl.trans(keys_here)) * (scale * _LOG2_E) - shift[:, None]
        weights = tl.exp2(tl.where(seen[None, :], scores, float("-inf")))
        total += tl.sum(weights, 1)
        slope = weights * (tl.dot(upstream, tl.trans(values_here)) - of_row[:, None])
        sums, unit = _add_slope(slope, unit, keys_here, sums, FLOAT16)
    whole = 1.0 / tl.where(shift == _LARGEST, 1.0, total)
    tl.store(inverse + of_head + rows, whole, mask=own)
    sums *= (scale * unit * whole)[:, None]
    tl.store(
        grad_q.data + _offsets(begin, grad_q.token, BLOCK_Q, D),
        sums.to(queries_here.dtype),
        mask=own[:, None],
    )


@triton.jit
def _seen_until(begin, last, end, noisy, BLOCK: tl.constexpr, mask):
    """The end frame of the queries that see any of the keys [begin, begin + BLOCK) of a chunk.

    Noisy keys are seen by their own chunk, those of the sink by all chunks, others until the window has
    passed the last of their frames.
    """
    reach = (tl.minimum(begin + BLOCK, last) - 1) // mask.keys + mask.window
    always = (mask.window == 0) | (begin < mask.sink * mask.keys) | (reach >= mask.frames)
    whole = mask.first + tl.maximum(reach - mask.first, 0) // mask.chunk * mask.chunk
    return tl.where(noisy, end, tl.where(always, mask.frames, whole))


@triton.jit
def _sees_from(rows, there, mask):
    """The first key of each query's window; for what is no query, one that is never reached."""
    frame = rows // mask.queries
    frame = tl.where(frame >= mask.frames, frame - mask.frames, frame)
    chunk = tl.where(frame < mask.first, 0, 1 + tl.maximum(frame - mask.first, 0) // mask.chunk)
    end = tl.minimum(mask.first + chunk * mask.chunk, mask.frames)
    return tl.where(there, _window_start(end, mask) * mask.keys, _NO_QUERY)


@triton.jit(do_not_specialize=_NUMBERS)
def grad_keys(
    q, k, v, lse, grad_out, delta, inverse, grad_k, grad_v,
    heads, queries, keys, past, frames, first, chunk, window, sink, halves, scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of one block of fresh keys: a sum over the tiles of queries that see any of it.

    As in `grad_queries`: grad_v = p^T grad_out, grad_k = scale ds^T q.
    """
    FLOAT16: tl.constexpr = q.data.dtype.element_ty == tl.float16
    mask = Mask(queries, keys, past, frames, first, chunk, window, sink, halves)
    q, k, v, grad_out = _of_head(q, heads), _of_head(k, heads), _of_head(v, heads), _of_head(grad_out, heads)
    grad_k, grad_v = _of_head(grad_k, heads), _of_head(grad_v, heads)
    lse += tl.program_id(1).to(tl.int64) * (halves * frames * queries)
    delta += tl.program_id(1).to(tl.int64) * (halves * frames * queries)
    inverse += tl.program_id(1).to(tl.int64) * (halves * frames * queries)
    begin, last, start, end, noisy = _block(tl.program_id(0), BLOCK_K, keys, mask)
    columns = begin + tl.arange(0, BLOCK_K)
    own = columns < last
    keys_here = tl.load(k.data + _offsets(begin, k.token, BLOCK_K, D), mask=own[:, None], other=0.0)
    values_here = tl.load(v.data + _offsets(begin, v.token, BLOCK_K, D), mask=own[:, None], other=0.0)

    # clean queries, or those of the keys' own noisy chunk; then the noisy ones of later chunks
    until = _seen_until(begin, last, end, noisy, BLOCK_K, mask)
    half = tl.where(noisy, frames, 0)
    begin0, end0 = (half + start) * queries, (half + until) * queries
    later = (halves == 2) & (until > end)
    begin1, end1 = tl.where(later, frames + end, 0) * queries, tl.where(later, frames + until, 0) * queries
    tiles0 = tl.cdiv(end0 - begin0, BLOCK_Q)
    tiles = tl.where(begin < last, tiles0 + tl.cdiv(end1 - begin1, BLOCK_Q), 0)

    # A query sees the keys from its window's start on: one comparison for window, sink and what is no query.
    place = tl.where(noisy | (columns < sink * keys), _SEEN_BY_ALL, columns)
    unit = tl.full((BLOCK_K,), _SMALLEST if FLOAT16 else 1.0, tl.float32)
    sums_k = tl.zeros((BLOCK_K, D), tl.float32)
    sums_v = tl.zeros((BLOCK_K, D), tl.float32)
    for index in range(tiles):
        at = tl.where(index < tiles0, begin0 + index * BLOCK_Q, begin1 + (index - tiles0) * BLOCK_Q)
        rows = at + tl.arange(0, BLOCK_Q)
        there = rows < tl.where(index < tiles0, end0, end1)
        queries_here = tl.load(q.data + _offsets(at, q.token, BLOCK_Q, D), mask=there[:, None], other=0.0)
        upstream = tl.load(
            grad_out.data + _offsets(at, grad_out.token, BLOCK_Q, D), mask=there[:, None], other=0.0
        )
        shift = tl.load(lse + rows, mask=there, other=0.0) * _LOG2_E
        shift = tl.where(shift == float("-inf"), 0.0, shift)
        of_row = tl.load(delta + rows, mask=there, other=0.0)
        whole = tl.load(inverse + rows, mask=there, other=0.0)
        visible = place[:, None] >= _sees_from(rows, there, mask)[None, :]
        scores = tl.dot(keys_here, tl.trans(queries_here)) * (scale * _LOG2_E) - shift[None, :]
        weights = tl.exp2(tl.where(visible, scores, float("-inf"))) * whole[None, :]
        sums_v = tl.dot(weights.to(upstream.dtype), upstream, sums_v)
        slope = weights * (tl.dot(values_here, tl.trans(upstream)) - of_row[None, :])
        sums_k, unit = _add_slope(slope, unit, queries_here, sums_k, FLOAT16)
    sums_k *= (scale * unit)[:, None]
    tl.store(
        grad_k.data + _offsets(begin, grad_k.token, BLOCK_K, D), sums_k.to(keys_here.dtype), mask=own[:, None]
    )
    tl.store(
        grad_v.data + _offsets(begin, grad_v.token, BLOCK_K, D), sums_v.to(keys_here.dtype), mask=own[:, None]
    )
