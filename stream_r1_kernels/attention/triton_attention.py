"""The attention ops on Triton's kernels: arguments, configurations, launches, and autograd.

Imported when the backend is first used: it needs Triton. `torch.ops.stream_r1.triton_attention` does both
ops; `torch.compile` takes it as one node.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import shapes
from . import triton_kernels as kernels
from .mask import blocks_of, transposed
from .triton_kernels import Rows


class Config(NamedTuple):
    """How a kernel is compiled: tokens of a block of queries and of keys, warps of a program, and stages of
    its loop that are in flight at once."""

    block_q: int
    block_k: int
    warps: int
    stages: int


# (kernel, head's width) -> by the GPU's generation. 8: mma.sync, and at most 99 KiB of shared memory, which
# all GPUs from 8.0 on have, 12.x too. 9: wgmma. 10: tcgen05.
CONFIGS: dict[tuple[str, int], dict[int, Config]] = {
    ("forward", 64): {8: Config(128, 64, 8, 3), 9: Config(128, 64, 8, 3), 10: Config(128, 64, 4, 3)},
    ("forward", 128): {8: Config(128, 64, 8, 3), 9: Config(128, 64, 8, 3), 10: Config(128, 64, 8, 3)},
    ("grad_queries", 64): {8: Config(128, 64, 8, 2), 9: Config(128, 64, 8, 2), 10: Config(128, 64, 8, 2)},
    ("grad_queries", 128): {8: Config(128, 64, 8, 2), 9: Config(128, 64, 8, 2), 10: Config(128, 64, 8, 2)},
    ("grad_keys", 64): {8: Config(64, 64, 4, 2), 9: Config(64, 64, 4, 2), 10: Config(64, 64, 4, 2)},
    ("grad_keys", 128): {8: Config(64, 64, 8, 2), 9: Config(32, 128, 8, 2), 10: Config(64, 64, 8, 2)},
}


def generation(device: torch.device) -> int:
    """The column of `CONFIGS` for a GPU."""
    major, _ = torch.cuda.get_device_capability(device)
    return major if major in (9, 10) else 8


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, table: Sequence[int], scale: float) -> Tensor:
    return torch.ops.stream_r1.triton_attention(q, k, v, None, None, table, scale)[0]


def cached_chunk_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, past_k: Tensor | None, past_v: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if k is None or v is None:  # fresh keys lie inside the past
        k, v, past_k, past_v = past_k, past_v, None, None
    return torch.ops.stream_r1.triton_attention(q, k, v, past_k, past_v, (), scale)


@torch.library.custom_op("stream_r1::triton_attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    table: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] and lse [B, H, T]. table: of `RangeMask.table`; empty: all queries see all keys."""
    call = _Call(q, k, v, past_k, past_v, table, scale)
    out, lse = call.new(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    call.launch("forward", "q", *call.all_rows, call.rows(out), lse)
    return call.narrow(out), lse


@torch.library.custom_op("stream_r1::triton_attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    table: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; the past has none."""
    call = _Call(q, k, v, past_k, past_v, table, scale)
    of_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.float().contiguous()
    upstream, delta, inverse = call.rows(grad_out.to(q.dtype)), torch.empty_like(lse), torch.empty_like(lse)
    grad_q, grad_k, grad_v = call.new(q), call.new(k), call.new(v)
    rows_q, rows_k, rows_v, *_ = call.all_rows
    of_rows = (lse, upstream, of_lse, call.rows(grad_q), delta, inverse)
    call.launch("grad_queries", "q", *call.all_rows, call.rows(out), *of_rows)
    grads = (call.rows(grad_k), call.rows(grad_v))
    call.launch("grad_keys", "k", rows_q, rows_k, rows_v, lse, upstream, delta, inverse, *grads)
    return call.narrow(grad_q), call.narrow(grad_k), call.narrow(grad_v)


attention.register_fake(shapes.outputs)
attention_backward.register_fake(shapes.gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.table, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = attention_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.table, ctx.scale)
    return *grads, None, None, None, None


attention.register_autograd(_backward, setup_context=_save)


@cache  # captured graphs read them
def _on_device(
    table: tuple[int, ...], of: str, longest: int, tile: int, device: torch.device
) -> tuple[Tensor, int]:
    """The rows that programs take, begin, end and ranges of each, int32; and the ranges of one.

    Args:
        of: "q": blocks of queries and the ranges of keys that they see; "k": pieces of keys and the ranges of
            queries that see them.
        longest: tokens of a block at most.
    """
    blocks = blocks_of(table) if of == "q" else transposed(blocks_of(table))
    most = max((len(ranges) for _, _, ranges in blocks), default=0)
    rows = [
        [
            at,
            min(at + longest, end),
            sum(-(-(last - first) // tile) for first, last in ranges),
            *chain.from_iterable(ranges),
            *[0, 0] * (most - len(ranges)),
        ]
        for begin, end, ranges in blocks
        for at in range(begin, end, longest)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device), most


class _Call:
    """What the launches of one call have in common.

    Attributes:
        all_rows: q, k, v and the past, as the kernels take them. Without a past k and v stand in for it.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor | None,
        past_v: Tensor | None,
        table: Sequence[int],
        scale: float,
    ) -> None:
        self._device, self._scale = q.device, scale
        self._batch, _, self._heads, self._head_dim = q.shape
        self._width = 64 if self._head_dim <= 64 else 128
        self._table, self._queries, self._keys = tuple(table), q.shape[1], k.shape[1]
        self._past = 0 if past_k is None else past_k.shape[1]
        own = [self.rows(x) for x in (q, k, v)]
        old = own[1:] if past_k is None or past_v is None else [self.rows(past_k), self.rows(past_v)]
        self.all_rows = [*own, *old]

    def rows(self, x: Tensor) -> Rows:
        """The tensor, or a copy, with rows of the kernels' width and steps of multiples of 16 values."""
        if x.shape[3] != self._width:
            x = functional.pad(x, (0, self._width - x.shape[3]))
        steps = [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
        if x.stride(3) != 1 or any(step % 16 for step in steps[:3]) or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
            steps = list(x.stride())
        return Rows(x, *steps[:3])

    def new(self, like: Tensor) -> Tensor:
        return like.new_empty((*like.shape[:3], self._width))

    def narrow(self, x: Tensor) -> Tensor:
        return x if self._head_dim == self._width else x[..., : self._head_dim].contiguous()

    def launch(self, name: str, blocks_of: str, *arguments: Any) -> None:
        """Runs a kernel with a program a block of "q" or "k" and head."""
        config = CONFIGS[name, self._width][generation(self._device)]
        longest, tile, tokens = config.block_q, config.block_k, self._queries
        if blocks_of == "k":
            longest, tile, tokens = config.block_k, config.block_q, self._keys
        if self._table and tokens:
            table, ranges = _on_device(self._table, blocks_of, longest, tile, self._device)
            blocks = len(table)
        else:
            table, ranges = torch.empty(1, dtype=torch.int32, device=self._device), -1
            blocks = -(-tokens // longest)
        grid = (blocks, self._batch * self._heads)
        if 0 in grid:
            return
        kernel = getattr(kernels, name)
        numbers = (self._heads, self._queries, self._keys, self._past, ranges, self._scale)
        with torch.cuda.device_of(arguments[0].data):
            run(kernel, grid, config, (*arguments, table, *numbers), self._width)


def run(
    kernel: Any, grid: tuple[int, int], config: Config, arguments: tuple[Any, ...], head_dim: int
) -> None:
    """Compiles the kernel, if it is the first time, and puts it on the current stream."""
    kernel[grid](
        *arguments,
        D=head_dim,
        BLOCK_Q=config.block_q,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
