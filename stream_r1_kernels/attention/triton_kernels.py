"""Attention for GPUs in Triton: forward, the gradient of the queries, and those of the keys and values.

One set of kernels serves both ops. In `chunk_attention` a program has a row of a table: the queries of its
block and the ranges of keys that they see; it loops over the tiles of these ranges, and no other tile is
loaded. For the gradients of keys the table is the other way round: pieces of keys, and the ranges of queries
that see all of a piece. In `cached_chunk_attention`, without a table, all queries see all keys: those of the
past, a segment of memory of its own, and the fresh ones.

Sums are in float32 and without atomics: the same input gives the same bits. Method: FlashAttention-2
(https://arxiv.org/abs/2307.08691).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LARGEST, _SMALLEST = tl.constexpr(3.4028234663852886e38), tl.constexpr(1e-30)


class Rows(NamedTuple):
    """A tensor [B, tokens, H, D] whose D values lie in a row; strides in elements, multiples of 16."""

    data: Any
    batch: int
    token: int
    head: int


# These change from call to call: a kernel must not be compiled for their values.
_NUMBERS = ("heads", "queries", "keys", "past", "ranges", "scale")


@triton.jit
def _block(table, ranges, tokens, tiles, BLOCK: tl.constexpr):
    """This program's row, before its first range; where its block begins and ends; and its ranges' tiles.

    Without a table `ranges`, the ranges of a row, is -1: blocks follow one another up to `tokens`, and each
    has `tiles`.
    """
    row, here = table + tl.program_id(0).to(tl.int64) * (3 + 2 * ranges), ranges >= 0
    begin = tl.load(row, mask=here, other=tl.program_id(0) * BLOCK)
    end = tl.load(row + 1, mask=here, other=tokens)
    return row + 1, begin, end, tl.load(row + 2, mask=here, other=tiles)


@triton.jit
def _next(tile, at, last, row, BLOCK: tl.constexpr, ranges, tiles, past_tiles, past, tokens):
    """From one tile to tile `tile`: where it begins, where its range ends, and the row from that range on.

    Without a table there are two ranges, the past, of `past_tiles`, and [0, tokens).
    """
    over = at + BLOCK >= last
    here = over & (ranges >= 0) & (tile < tiles)
    row += 2 * over.to(tl.int32)
    first = tl.load(row, mask=here, other=0)
    end = tl.load(row + 1, mask=here, other=tl.where(tile < past_tiles, past, tokens))
    return tl.where(over, first, at + BLOCK), tl.where(over, end, last), row


@triton.jit
def _either(first, a, b):
    return Rows(tl.where(first, a.data, b.data), b.batch, tl.where(first, a.token, b.token), b.head)


@triton.jit
def _rows(x, begin, there, BLOCK: tl.constexpr, D: tl.constexpr):
    """BLOCK rows of x from `begin` on, zeros where none is."""
    return tl.load(x.data + _offsets(begin, x.token, BLOCK, D), mask=there[:, None], other=0.0)


@triton.jit
def _tile(at, last, in_past, k, v, past_k, past_v, BLOCK: tl.constexpr, D: tl.constexpr):
    """The keys and values of the tile at `at` of a range that ends at `last`, and which are there."""
    seen = at + tl.arange(0, BLOCK) < last
    keys = _rows(_either(in_past, past_k, k), at, seen, BLOCK, D)
    return keys, _rows(_either(in_past, past_v, v), at, seen, BLOCK, D), seen


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
    q, k, v, past_k, past_v, out, lse, table,
    heads, queries, keys, past, ranges, scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out and lse [B, H, tokens] of one block of queries of one head: a softmax that runs over the tiles."""
    q, k, v, out = _of_head(q, heads), _of_head(k, heads), _of_head(v, heads), _of_head(out, heads)
    past_k, past_v = _of_head(past_k, heads), _of_head(past_v, heads)
    past_tiles = tl.cdiv(past, BLOCK_K)
    row, begin, end, tiles = _block(table, ranges, queries, past_tiles + tl.cdiv(keys, BLOCK_K), BLOCK_Q)
    own = begin + tl.arange(0, BLOCK_Q) < end
    queries_here = _rows(q, begin, own, BLOCK_Q, D)

    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    sums = tl.zeros((BLOCK_Q, D), tl.float32)
    at, last, row = _next(0, -BLOCK_K, 0, row, BLOCK_K, ranges, tiles, past_tiles, past, keys)
    for tile in range(tiles):
        in_past = tile < past_tiles
        keys_here, values_here, seen = _tile(at, last, in_past, k, v, past_k, past_v, BLOCK_K, D)
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
        at, last, row = _next(tile + 1, at, last, row, BLOCK_K, ranges, tiles, past_tiles, past, keys)

    sums = sums / tl.where(total == 0, 1.0, total)[:, None]  # without any key: zeros
    tl.store(
        out.data + _offsets(begin, out.token, BLOCK_Q, D), sums.to(queries_here.dtype), mask=own[:, None]
    )
    lse += tl.program_id(1).to(tl.int64) * queries
    tl.store(lse + begin + tl.arange(0, BLOCK_Q), (highest + tl.log2(total)) * _LN_2, mask=own)


@triton.jit(do_not_specialize=_NUMBERS)
def grad_queries(
    q, k, v, past_k, past_v, out, lse, grad_out, grad_lse, grad_q, delta, inverse, table,
    heads, queries, keys, past, ranges, scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_q of one block of queries; and delta = sum(out grad_out) - grad_lse, which `grad_keys` reads.

    With p = exp(scale q k^T - lse) and ds = p (grad_out v^T - delta): grad_q = scale ds k. p is divided by
    its sum, whose `inverse` `grad_keys` reads too: at scores of 1e4 lse is known to 5e-4 alone.
    """
    FLOAT16: tl.constexpr = q.data.dtype.element_ty == tl.float16
    q, k, v, out = _of_head(q, heads), _of_head(k, heads), _of_head(v, heads), _of_head(out, heads)
    past_k, past_v = _of_head(past_k, heads), _of_head(past_v, heads)
    grad_out, grad_q = _of_head(grad_out, heads), _of_head(grad_q, heads)
    past_tiles = tl.cdiv(past, BLOCK_K)
    row, begin, end, tiles = _block(table, ranges, queries, past_tiles + tl.cdiv(keys, BLOCK_K), BLOCK_Q)
    own = begin + tl.arange(0, BLOCK_Q) < end
    queries_here = _rows(q, begin, own, BLOCK_Q, D)
    upstream, result = _rows(grad_out, begin, own, BLOCK_Q, D), _rows(out, begin, own, BLOCK_Q, D)
    rows = tl.arange(0, BLOCK_Q)
    first = tl.program_id(1).to(tl.int64) * queries + begin
    shift = tl.load(lse + first + rows, mask=own, other=0.0) * _LOG2_E
    of_row = tl.sum(result.to(tl.float32) * upstream.to(tl.float32), 1)
    of_row -= tl.load(grad_lse + first + rows, mask=own, other=0.0)
    tl.store(delta + first + rows, of_row, mask=own)

    shift = tl.where(shift == float("-inf"), 0.0, shift)  # no key has a weight
    total = tl.zeros((BLOCK_Q,), tl.float32)
    unit = tl.full((BLOCK_Q,), _SMALLEST if FLOAT16 else 1.0, tl.float32)
    sums = tl.zeros((BLOCK_Q, D), tl.float32)
    at, last, row = _next(0, -BLOCK_K, 0, row, BLOCK_K, ranges, tiles, past_tiles, past, keys)
    for tile in range(tiles):
        in_past = tile < past_tiles
        keys_here, values_here, seen = _tile(at, last, in_past, k, v, past_k, past_v, BLOCK_K, D)
        scores = tl.dot(queries_here, tl.trans(keys_here)) * (scale * _LOG2_E) - shift[:, None]
        weights = tl.exp2(tl.where(seen[None, :], scores, float("-inf")))
        total += tl.sum(weights, 1)
        slope = weights * (tl.dot(upstream, tl.trans(values_here)) - of_row[:, None])
        sums, unit = _add_slope(slope, unit, keys_here, sums, FLOAT16)
        at, last, row = _next(tile + 1, at, last, row, BLOCK_K, ranges, tiles, past_tiles, past, keys)
    whole = 1.0 / tl.where(total == 0, 1.0, total)
    tl.store(inverse + first + rows, whole, mask=own)
    sums *= (scale * unit * whole)[:, None]
    tl.store(
        grad_q.data + _offsets(begin, grad_q.token, BLOCK_Q, D),
        sums.to(queries_here.dtype),
        mask=own[:, None],
    )


@triton.jit(do_not_specialize=_NUMBERS)
def grad_keys(
    q, k, v, lse, grad_out, delta, inverse, grad_k, grad_v, table,
    heads, queries, keys, past, ranges, scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of one piece of the fresh keys: a sum over the tiles of queries that see it.

    As in `grad_queries`: grad_v = p^T grad_out, grad_k = scale ds^T q.
    """
    FLOAT16: tl.constexpr = q.data.dtype.element_ty == tl.float16
    q, k, v, grad_out = _of_head(q, heads), _of_head(k, heads), _of_head(v, heads), _of_head(grad_out, heads)
    grad_k, grad_v = _of_head(grad_k, heads), _of_head(grad_v, heads)
    row, begin, end, tiles = _block(table, ranges, keys, tl.cdiv(queries, BLOCK_Q), BLOCK_K)
    own = begin + tl.arange(0, BLOCK_K) < end
    keys_here, values_here = _rows(k, begin, own, BLOCK_K, D), _rows(v, begin, own, BLOCK_K, D)
    of_head = tl.program_id(1).to(tl.int64) * queries

    unit = tl.full((BLOCK_K,), _SMALLEST if FLOAT16 else 1.0, tl.float32)
    sums_k = tl.zeros((BLOCK_K, D), tl.float32)
    sums_v = tl.zeros((BLOCK_K, D), tl.float32)
    at, last, row = _next(0, -BLOCK_Q, 0, row, BLOCK_Q, ranges, tiles, 0, 0, queries)
    for tile in range(tiles):
        there = at + tl.arange(0, BLOCK_Q) < last
        of_rows = of_head + at + tl.arange(0, BLOCK_Q)
        queries_here, upstream = _rows(q, at, there, BLOCK_Q, D), _rows(grad_out, at, there, BLOCK_Q, D)
        shift = tl.load(lse + of_rows, mask=there, other=0.0) * _LOG2_E
        shift = tl.where(shift == float("-inf"), 0.0, shift)
        of_row = tl.load(delta + of_rows, mask=there, other=0.0)
        whole = tl.load(inverse + of_rows, mask=there, other=0.0)
        scores = tl.dot(keys_here, tl.trans(queries_here)) * (scale * _LOG2_E) - shift[None, :]
        weights = tl.exp2(tl.where(there[None, :], scores, float("-inf"))) * whole[None, :]
        sums_v = tl.dot(weights.to(upstream.dtype), upstream, sums_v)
        slope = weights * (tl.dot(values_here, tl.trans(upstream)) - of_row[None, :])
        sums_k, unit = _add_slope(slope, unit, queries_here, sums_k, FLOAT16)
        at, last, row = _next(tile + 1, at, last, row, BLOCK_Q, ranges, tiles, 0, 0, queries)
    sums_k *= (scale * unit)[:, None]
    tl.store(
        grad_k.data + _offsets(begin, grad_k.token, BLOCK_K, D), sums_k.to(keys_here.dtype), mask=own[:, None]
    )
    tl.store(
        grad_v.data + _offsets(begin, grad_v.token, BLOCK_K, D), sums_v.to(keys_here.dtype), mask=own[:, None]
    )
