"""What the drop-in attention is worth in diffusers' Wan attention and over Self Forcing's cache dictionaries

pytest benchmarks/test_drop_in.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.case import DTYPES, Case, Run, check_and_time, parametrize, with_grads
from stream_r1.drop_in.diffusers_attention import MaskedProcessor
from stream_r1.drop_in.self_forcing import adopt, self_attention
from stream_r1_kernels import ChunkMask

HEADS, WIDTH, CHUNK, ROWS, COLUMNS = 12, 128, 3, 15, 26  # Wan 2.1 1.3B at 240 x 416 pixels
FRAME = ROWS * COLUMNS
CLIP_COLUMNS = 13  # half as wide: a clip's attention grows with the square
PASSES = 5


def block_causal(dtype: torch.dtype) -> Callable[[], dict[str, Run]]:
    """Self-attention of a layer over 21 frames, block-causal, forward and backward."""

    def build() -> dict[str, Run]:
        attn = WanAttention(HEADS * WIDTH, HEADS, WIDTH, eps=1e-6, processor=WanAttnProcessor()).to(dtype)
        frames, per_frame = 21, ROWS * CLIP_COLUMNS
        rotary = WanRotaryPosEmbed(WIDTH, (1, 2, 2), 1024)(
            torch.empty(1, 1, frames, 2 * ROWS, 2 * CLIP_COLUMNS)
        )
        x = torch.randn(1, frames * per_frame, HEADS * WIDTH).to(dtype).requires_grad_()
        mask = ChunkMask(per_frame, CHUNK)
        visible = mask.visible(frames * per_frame)
        leaves = [x, *attn.parameters()]

        def ours() -> Tensor:
            return MaskedProcessor(mask)(attn, x, rotary_emb=rotary)

        def theirs() -> Tensor:
            return WanAttnProcessor()(attn, x, attention_mask=visible[None, None], rotary_emb=rotary)

        return {"ours": with_grads(ours, leaves), "diffusers": with_grads(theirs, leaves)}

    return build


class PublishedAttention(nn.Module):
    """Layers of the published causal self-attention, and its data flow over a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        dim = HEADS * WIDTH
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=1e-6) for _ in range(2))
        self.num_heads = HEADS
        axes = WIDTH - 4 * (WIDTH // 6), 2 * (WIDTH // 6), 2 * (WIDTH // 6)
        self.tables = [  # complex128 [1024, pairs] of frame, row, column
            torch.polar(
                torch.ones(1024, axis // 2, dtype=torch.float64),
                torch.arange(1024, dtype=torch.float64)[:, None]
                * 10000.0 ** -(torch.arange(0, axis, 2, dtype=torch.float64) / axis),
            )
            for axis in axes
        ]

    def rotate(self, x: Tensor, first: int) -> Tensor:
        frames = x.shape[1] // FRAME
        shape = (frames, ROWS, COLUMNS, -1)
        time, row, column = self.tables
        phases = torch.cat(
            [
                time[first : first + frames].view(frames, 1, 1, -1).expand(shape),
                row[:ROWS].view(1, ROWS, 1, -1).expand(shape),
                column[:COLUMNS].view(1, 1, COLUMNS, -1).expand(shape),
            ],
            dim=-1,
        ).reshape(frames * FRAME, 1, -1)
        pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * phases).flatten(3).to(x.dtype)

    def over(self, cache: dict[str, Tensor], x: Tensor, start: int, sink: int, relative: bool) -> Tensor:
        """A pass over a window that is full, or filled by this chunk; it is rolled for a new chunk."""
        new, end, size = x.shape[1], start + x.shape[1], cache["k"].shape[1]
        q = self.norm_q(self.q(x)).unflatten(-1, (HEADS, -1))
        k = self.norm_k(self.k(x)).unflatten(-1, (HEADS, -1))
        v = self.v(x).unflatten(-1, (HEADS, -1))
        if not relative:
            q, k = self.rotate(q, start // FRAME), self.rotate(k, start // FRAME)
        if end > int(cache["global_end_index"]) and end > size:
            for name in ("k", "v"):
                cache[name][:, sink:-new] = cache[name][:, sink + new :].clone()
        stop = min(end, size)
        cache["k"][:, stop - new : stop] = k
        cache["v"][:, stop - new : stop] = v
        cache["global_end_index"].fill_(end)
        keys = cache["k"][:, :stop]
        if relative:
            q, keys = self.rotate(q, (stop - new) // FRAME), self.rotate(keys, 0)
        q, keys, v = (y.transpose(1, 2) for y in (q, keys, cache["v"][:, :stop]))
        return self.o(functional.scaled_dot_product_attention(q, keys, v).transpose(1, 2).flatten(2))


def stream(dtype: torch.dtype, positions: str) -> Callable[[], dict[str, Run]]:
    """The five passes of a chunk in one layer, its window of 9 frames full; 3 are sink in "window" mode.

    Every chunk is the same input, so that every run has the same result, wherever the stream is.
    """
    sink = 3 if positions == "window" else 0

    def build() -> dict[str, Run]:
        attn = PublishedAttention().to(dtype).requires_grad_(False)
        x = torch.randn(PASSES, 1, CHUNK * FRAME, HEADS * WIDTH).to(dtype)
        shape = (1, 9 * FRAME, HEADS, WIDTH)
        caches = [
            {name: torch.zeros(shape, dtype=dtype) for name in ("k", "v")}
            | {name: torch.tensor([0]) for name in ("global_end_index", "local_end_index")}
            for _ in range(2)
        ]
        adopt(
            caches[:1],
            rows=ROWS,
            columns=COLUMNS,
            frames_per_chunk=CHUNK,
            sink_frames=sink,
            positions=positions,
        )
        calls: tuple[Callable[[Tensor, int], Tensor], ...] = (
            lambda y, start: self_attention(attn, y, caches[0], start),
            lambda y, start: attn.over(caches[1], y, start, sink * FRAME, positions == "window"),
        )

        def chunks(call: Callable[[Tensor, int], Tensor]) -> Run:
            done = 0

            def run() -> Tensor:
                nonlocal done
                start = done % 300 * CHUNK * FRAME  # as far as the published table of phases goes
                if start == 0:
                    for cache in caches:
                        cache["global_end_index"].fill_(0)
                done += 1
                return torch.stack([call(y, start) for y in x])

            for _ in range(3):
                run()
            return run

        return {"ours": chunks(calls[0]), "published": chunks(calls[1])}

    return build


TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
CASES = [
    Case(
        "block-causal Wan attention",
        "21x15x13",
        dtype,
        (1, 21 * ROWS * CLIP_COLUMNS, HEADS, WIDTH),
        block_causal(DTYPES[dtype]),
        tolerance=TOLERANCE[dtype],
        baselines=("diffusers",),
    )
    for dtype in TOLERANCE
] + [
    Case(
        f"Self Forcing cache, {positions}",
        "9x15x26",
        dtype,
        (1, CHUNK * FRAME, HEADS, WIDTH),
        stream(DTYPES[dtype], positions),
        tolerance=TOLERANCE[dtype],
        baselines=("published",),
    )
    for dtype in TOLERANCE
    for positions in ("absolute", "window")
]


@parametrize(CASES)
def test_drop_in(benchmark: Callable, case: Case, implementation: str) -> None:
    check_and_time(benchmark, case, implementation)
