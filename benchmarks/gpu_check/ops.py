"""Every op at one size: its inputs, those who do it, and what is right, in float32 and in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.sizes import Sizes
from stream_r1_kernels import (
    ChunkMask,
    Past,
    RotaryGrid,
    backends,
    cached_chunk_attention,
    chunk_attention,
    dispatch,
    dmd_loss,
    gated_add,
    intra_weights,
    modulated_norm,
    qk_norm_rotary,
    region_saliency,
    rms_norm_silu,
)

Tensors = tuple[Tensor, ...]
Call = Callable[..., Any]


@dataclass(frozen=True)
class OpAtSize:
    """One op.

    Attributes:
        name: of the case.
        op: what a backend is asked for.
        shapes: of the inputs, the first `grads` of which get gradients.
        call: `call(*inputs, backend=...)`.
        right: the same in float32, in pieces that fit beside it; None: the reference backend in float32.
        work: (bytes, flops) that can't be avoided.
        others: by name, what else does the same: `other(*inputs)`.
    """

    name: str
    op: str
    shapes: Sequence[tuple[int, ...]]
    call: Call
    work: tuple[int, int]
    grads: int = 0
    pieces: int = 1
    positive: bool = False
    right: Call | None = None
    others: dict[str, Call] | None = None

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        draw = torch.rand if self.positive else torch.randn
        made = [draw(shape, generator=generator, device=device, dtype=torch.float32) for shape in self.shapes]
        return tuple(x.to(dtype).requires_grad_(i < self.grads) for i, x in enumerate(made))

    def backends(self, inputs: Tensors) -> dict[str, Call]:
        """Of this package, those that take the call, kernels first, and who else does it."""
        call = backends.describe_call(self.op, *inputs[:3], pieces=self.pieces)
        names = [
            name
            for name in ("cuda", "triton", "cpu", "sdpa")
            if dispatch.refusal(name, call, backends.build()) is None
        ]
        found = {name: partial(self.call, backend=name) for name in (*names, "reference")}
        if self.right is not None:
            del found["reference"]  # whole scores: more memory than there is
        return found | (self.others or {})

    def results(self, call: Call, inputs: Tensors) -> Tensors:
        """Outputs and, of inputs with gradients, these, of the same incoming ones each time."""
        out = call(*inputs)
        outs = tuple(x for x in (out if isinstance(out, tuple) else (out,)) if x is not None)
        if not self.grads:
            return outs
        incoming = []
        for index, x in enumerate(outs):
            generator = torch.Generator(x.device).manual_seed(index)
            incoming.append(torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype))
        grads = torch.autograd.grad(outs, inputs[: self.grads], incoming)
        return (*(x.detach() for x in outs), *grads)

    def expected(self, inputs: Tensors) -> Tensors:
        wide = tuple(x.detach().float().requires_grad_(x.requires_grad) for x in inputs)
        return self.results(self.right or partial(self.call, backend="reference"), wide)


def errors(got: Tensors, expected: Tensors) -> list[float]:
    """Of each result, the largest difference by the largest value; infinite where a number is missing."""
    found = []
    for one, right in zip(got, expected, strict=True):
        difference = (one.float() - right.float()).abs().max().item() if one.numel() else 0.0
        largest = max(right.float().abs().max().item(), 1e-30) if one.numel() else 1.0
        found.append(difference / largest if difference == difference else float("inf"))
    return found


def ops(s: Sizes) -> Iterator[OpAtSize]:
    tokens, keys, video = s.chunk * s.frame, s.window * s.frame, s.video * s.frame
    fresh, past, whole = ((1, n, s.heads, s.head_dim) for n in (tokens, keys, video))
    half = 2  # bytes of a number
    dense = 4 * tokens * keys * s.width  # two matrix products; a backward has five more, on the past three
    yield OpAtSize(
        f"cached_chunk_attention, {tokens} queries, {keys} keys",
        "cached_chunk_attention",
        [fresh, past, past],
        _sampling,
        (half * s.width * 2 * (tokens + keys), dense),
        right=_dense,
        others=_sdpa_by_name(),
    )
    yield OpAtSize(
        f"cached_chunk_attention, forward and backward, {tokens} fresh, {keys - tokens} past",
        "cached_chunk_attention",
        [fresh, fresh, fresh, *[(1, keys - tokens, s.heads, s.head_dim)] * 2],
        _with_past,
        (half * s.width * 4 * (tokens + keys), tokens * (14 * tokens + 10 * (keys - tokens)) * s.width),
        grads=3,
        pieces=2,
        right=_dense_with_past,
    )
    mask = ChunkMask(s.frame, s.chunk, window_frames=s.window - s.sink, sink_frames=s.sink)
    pairs = mask.visible_pairs(s.video * s.frame)
    for grads in (0, 3):
        yield OpAtSize(
            f"chunk_attention, {'forward and backward' if grads else 'forward'}, {video} tokens",
            "chunk_attention",
            [whole] * 3,
            partial(_masked, mask=mask),
            (half * s.width * (12 if grads else 4) * video, (14 if grads else 4) * pairs * s.width),
            grads=grads,
            right=partial(_blocks, mask=mask),
        )
    x, modulation = (1, tokens, s.width), (1, s.chunk, s.width)
    moved = half * tokens * s.width
    yield OpAtSize(
        "modulated_norm", "modulated_norm", [x, modulation, modulation], modulated_norm, (2 * moved, 0)
    )
    yield OpAtSize("gated_add", "gated_add", [x, x, modulation], gated_add, (3 * moved, 0))
    rotary = partial(_rotary, sizes=s)
    yield OpAtSize("qk_norm_rotary", "qk_norm_rotary", [x, x, (s.width,), (s.width,)], rotary, (4 * moved, 0))
    for name, call, shapes in (
        ("modulated_norm", modulated_norm, [x, modulation, modulation]),
        ("gated_add", gated_add, [x, x, modulation]),
        ("qk_norm_rotary", rotary, [x, x, (s.width,), (s.width,)]),
    ):
        grads = len(shapes)
        yield OpAtSize(f"{name}, forward and backward", name, shapes, call, (6 * moved, 0), grads=grads)
    cells = s.frame * 4  # latent cells of a frame
    latents = (1, s.video, s.channels, *s.latent)
    pixels = (
        64 * 32 * cells
    )  # of one frame of a video 8 x as high and wide, at 96 channels: a decoder's widest
    decoder = (1, pixels // 96 // 8, 96)
    yield OpAtSize(
        "rms_norm_silu", "rms_norm_silu", [decoder, (96,)], rms_norm_silu, (2 * half * decoder[1] * 96, 0)
    )
    video_shape = (3, 1, 1 + 4 * (s.video - 1), 3, 8 * s.latent[0], 8 * s.latent[1])
    saliency = partial(region_saliency, latent_shape=(s.video, *s.latent))
    numbers = 3 * video_shape[2] * 3 * 64 * cells
    yield OpAtSize("region_saliency", "region_saliency", [video_shape], saliency, (half * numbers, 0))
    maps = (3, 1, s.video, *s.latent)
    weights = intra_weights
    yield OpAtSize(
        "intra_weights", "intra_weights", [maps, (1, 3)], weights, (16 * s.video * cells, 0), positive=True
    )
    size = half * s.video * s.channels * cells
    yield OpAtSize(
        "dmd_loss, forward and backward", "dmd_loss", [latents] * 4, dmd_loss, (6 * size, 0), grads=1
    )


def _sampling(q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
    return cached_chunk_attention(q, None, None, Past(k, v, True), backend=backend)


def _with_past(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, *, backend: str) -> Tensor:
    return cached_chunk_attention(q, k, v, Past(past_k, past_v, False), backend=backend)


def _masked(q: Tensor, k: Tensor, v: Tensor, *, mask: ChunkMask, backend: str) -> Tensor:
    return chunk_attention(q, k, v, mask, backend=backend)


def _rotary(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *, sizes: Sizes, backend: str) -> Any:
    phases = RotaryGrid(sizes.head_dim).phases(0, sizes.chunk, *sizes.grid, device=q.device)
    return qk_norm_rotary(q, k, q_weight, k_weight, *phases, num_heads=sizes.heads, backend=backend)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head and some queries at a time, in plain softmax."""
    out = []
    for queries in q.split(1024, 1):
        heads = []
        for head in range(q.shape[2]):
            scores = queries[:, :, head] @ k[:, :, head].transpose(1, 2) * q.shape[-1] ** -0.5
            heads.append(scores.softmax(-1) @ v[:, :, head])
        out.append(torch.stack(heads, 2))
    return torch.cat(out, 1)


def _dense_with_past(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    return _dense(q, torch.cat((past_k, k), 1), torch.cat((past_v, v), 1))


def _blocks(q: Tensor, k: Tensor, v: Tensor, *, mask: ChunkMask) -> Tensor:
    """Block by block, each with the keys that it sees alone."""
    out = []
    for begin, end, ranges in mask.blocks(q.shape[1]):
        keys, values = (torch.cat([x[:, first:last] for first, last in ranges], 1) for x in (k, v))
        out.append(_dense(q[:, begin:end], keys, values))
    return torch.cat(out, 1)


def _sdpa_by_name() -> dict[str, Call]:
    """torch's attention by the kernel that is asked for; one that can't is left out when it is called."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forced(q: Tensor, k: Tensor, v: Tensor, *, which: Any) -> Tensor:
        with sdpa_kernel(which):
            return torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v))
            ).transpose(1, 2)

    kinds = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cuDNN": SDPBackend.CUDNN_ATTENTION}
    return {name: partial(forced, which=kind) for name, kind in kinds.items()}
