"""The ops beside their rivals on one device: SDPA, FlexAttention, FlashAttention if installed, eager."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from stream_r1_kernels import (
    ChunkMask,
    Past,
    RotaryGrid,
    backends,
    cached_chunk_attention,
    chunk_attention,
    dispatch,
    gated_add,
    modulated_norm,
    qk_norm_rotary,
)

Run = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Sizes:
    """Of a sampler and of a training step.

    Attributes:
        grid: rows and columns of tokens of a frame; chunk, window, video: in frames.
        compiled: whether FlexAttention is compiled, without which it is no rival.
    """

    heads: int = 12
    head_dim: int = 128
    grid: tuple[int, int] = (30, 52)
    chunk: int = 3
    window: int = 9
    video: int = 21
    compiled: bool = True

    @property
    def frame(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Case:
    """One op at one size. The first of `runs` is what the others are checked against: plain torch."""

    name: str
    op: str
    backward: bool
    runs: dict[str, Run]


def cases(sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """One after the other, so that one case's tensors are in memory at a time."""
    torch.manual_seed(0)
    draw = partial(torch.randn, device=device, dtype=dtype)
    yield _sampling(sizes, draw)
    yield _training(sizes, draw, backward=False)
    yield _training(sizes, draw, backward=True)
    yield from _rows(sizes, draw)


def _backends(op: str, q: Tensor, *others: Tensor, pieces: int = 1) -> list[str]:
    """Of this package, those that take the call."""
    call = backends.describe_call(op, q, *others, pieces=pieces)
    named = [name for name in ("cpu", "cuda", "triton") if call.device in (name, "cuda" * (name == "triton"))]
    return [name for name in named if dispatch.refusal(name, call, backends.build()) is None]


def _flex(sizes: Sizes) -> Callable[..., Tensor]:
    return torch.compile(flex_attention) if sizes.compiled else flex_attention


def _sampling(sizes: Sizes, draw: Callable[..., Tensor]) -> Case:
    """A pass of a full window: one chunk's queries, the window's keys, no mask."""
    op, tokens, keys = "cached_chunk_attention", sizes.chunk * sizes.frame, sizes.window * sizes.frame
    q, k, v = (draw(1, n, sizes.heads, sizes.head_dim) for n in (tokens, keys, keys))
    past = Past(k, v, True)
    flex = _flex(sizes)
    runs: dict[str, Run] = {"sdpa": lambda: cached_chunk_attention(q, None, None, past, backend="sdpa")}
    for name in _backends(op, q, k, v):
        runs[f"ours, {name}"] = partial(cached_chunk_attention, q, None, None, past, backend=name)
    runs["FlexAttention"] = lambda: _heads_first(flex, q, k, v)
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_func

        runs["FlashAttention"] = lambda: flash_attn_func(q, k, v)
    return Case(f"sampling: {tokens} queries, {keys} keys", op, False, runs)


def _training(sizes: Sizes, draw: Callable[..., Tensor], *, backward: bool) -> Case:
    """All chunks of a video at once, each with a window and a sink."""
    op, tokens = "chunk_attention", sizes.video * sizes.frame
    mask = ChunkMask(
        sizes.frame, sizes.chunk, window_frames=sizes.window - sizes.chunk, sink_frames=sizes.chunk
    )
    q, k, v = (draw(1, tokens, sizes.heads, sizes.head_dim).requires_grad_(backward) for _ in range(3))
    visible = mask.visible(sizes.video).to(q.device)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[query // sizes.frame, key // sizes.frame]

    blocks = create_block_mask(sees, None, None, tokens, tokens, device=str(q.device))
    flex = partial(_flex(sizes), block_mask=blocks)
    forward: dict[str, Run] = {"sdpa": partial(chunk_attention, q, k, v, mask, backend="sdpa")}
    for name in _backends(op, q, k, v):
        forward[f"ours, {name}"] = partial(chunk_attention, q, k, v, mask, backend=name)
    if not (backward and q.device.type == "cpu"):  # where it has no backward
        forward["FlexAttention"] = lambda: _heads_first(flex, q, k, v)
    passes = "forward and backward" if backward else "forward"
    runs = {name: with_grads(run, (q, k, v)) if backward else run for name, run in forward.items()}
    return Case(f"training, {passes}: {tokens} tokens, window of {sizes.window} frames", op, backward, runs)


def _rows(sizes: Sizes, draw: Callable[..., Tensor]) -> Iterator[Case]:
    tokens, width = sizes.chunk * sizes.frame, sizes.heads * sizes.head_dim
    x, y = draw(1, tokens, width), draw(1, tokens, width)
    shift, scale = (draw(1, sizes.chunk, width).float() for _ in range(2))
    weight = draw(width)
    phases = RotaryGrid(sizes.head_dim).phases(0, sizes.chunk, *sizes.grid, device=x.device)
    rows: dict[str, Callable[..., Any]] = {
        "modulated_norm": partial(modulated_norm, x, shift, scale),
        "gated_add": partial(gated_add, x, y, scale),
        "qk_norm_rotary": partial(qk_norm_rotary, x, y, weight, weight, *phases, num_heads=sizes.heads),
    }
    for op, call in rows.items():
        runs: dict[str, Run] = {"eager": partial(call, backend="reference")}
        runs |= {f"ours, {name}": partial(call, backend=name) for name in _backends(op, x)}
        yield Case(f"{tokens} x {width}", op, False, runs)


def _heads_first(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlexAttention's layout is [B, H, T, D]."""
    return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def with_grads(run: Run, leaves: tuple[Tensor, ...]) -> Run:
    """The output and the leaves' gradients, of the same incoming gradient for all that are compared."""
    incoming: list[Tensor] = []

    def both() -> tuple[Tensor, ...]:
        out = run()
        assert isinstance(out, Tensor)
        if not incoming:
            generator = torch.Generator().manual_seed(0)
            incoming.append(torch.randn(out.shape, generator=generator).to(out))
        return out.detach(), *torch.autograd.grad(out, leaves, incoming[0])

    return both
