"""What each CUDA kernel moves and computes at the sizes of Wan 2.1 1.3B, and how many fit a processor."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.prediction.streaming import HALF, LATENT, WAN, as_on
from stream_r1.estimate.devices import DEVICES
from stream_r1.estimate.roofline import KernelSize
from stream_r1.estimate.work import Work, count, fake_tensors
from stream_r1_kernels import (
    ChunkCache,
    ChunkMask,
    Past,
    RotaryGrid,
    cached_chunk_attention,
    chunk_attention,
    dmd_gradient_,
    dmd_loss,
    gated_add,
    intra_weights,
    modulated_norm,
    modulated_norm_fp8,
    qk_norm_rotary,
    quantize_rows,
    region_saliency,
    rms_norm,
    rms_norm_silu,
)

COMPILED = Path(__file__).parents[2] / "tests" / "cuda" / "compiled.tsv"
HEADS, HEAD, LAYERS = WAN["num_attention_heads"], WAN["attention_head_dim"], WAN["num_layers"]
WIDTH, FFN = HEADS * HEAD, WAN["ffn_dim"]
ROWS, COLUMNS = LATENT[0] // 2, LATENT[1] // 2
FRAME = ROWS * COLUMNS  # tokens
CHUNK, WINDOW, VIDEO = 3, WAN["window_frames"], 21  # frames; a video of training is 21

THREADS = (  # of a block, by kernel; the launches are in csrc/cuda/*.cu
    (r"region_saliency_\w+", 128),
    (r"\w+", 256),
)
DYNAMIC = {  # bytes of shared memory asked for at the launch
    "attention_bf16_128": (128 + 2 * 64) * 128 * 2,
    "attention_bf16_64": (128 + 2 * 64) * 64 * 2,
    "region_saliency_bf16": 832 * 4,
}
SHOWN = re.compile(r"(\w+_bf16(_128|_64|_fp32)?|add_parts|dmd_sum_loss|intra_weights_\w+)")


@dataclass(frozen=True)
class OpWork:
    """One op at one size: a call of it forward, or of its backward."""

    op: str
    size: str
    work: Work


def ops() -> list[OpWork]:
    """Every op with CUDA kernels at the sizes of 1.3B: sampling's, then training's, in bfloat16."""
    found = []
    # the choice among GPUs plays no part: each op is asked for by its name
    with fake_tensors(), as_on(DEVICES["A100"]):
        for size, run, backward in _cases():
            output = run() if backward else None
            work = count(_backward_of(output) if backward else run)
            own = [w for w in work if w.op.startswith("stream_r1.")]
            assert len(own) == 1, own
            found.append(OpWork(own[0].op.removeprefix("stream_r1."), size, own[0]))
    return found


def _backward_of(output: object) -> Callable[[], object]:
    outs = [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, Tensor)]
    return lambda: torch.autograd.backward(outs, [torch.zeros_like(x) for x in outs])


def _cases() -> list[tuple[str, Callable[[], object], bool]]:
    """(size, call, whether its backward is what is counted)"""
    chunk, cuda = CHUNK * FRAME, {"backend": "cuda"}

    def half(*shape: int, grad: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=HALF, requires_grad=grad)

    def rotary(grad: bool, **given: Tensor) -> object:
        x = [half(1, chunk, WIDTH, grad=grad) for _ in range(2)]
        weight = torch.zeros(WIDTH, dtype=HALF, requires_grad=grad)
        phases = RotaryGrid(HEAD).phases(0, CHUNK, ROWS, COLUMNS)
        return qk_norm_rotary(*x, weight, weight, *phases, num_heads=HEADS, **given, **cuda)

    def norm(grad: bool, op: Callable[..., object] = modulated_norm) -> object:
        modulation = [torch.zeros(1, CHUNK, WIDTH, requires_grad=grad) for _ in range(2)]
        return op(half(1, chunk, WIDTH, grad=grad), *modulation, **cuda)

    def gate(grad: bool) -> object:
        x, y = (half(1, chunk, WIDTH, grad=grad) for _ in range(2))
        return gated_add(x, y, torch.zeros(1, CHUNK, WIDTH, requires_grad=grad), **cuda)

    def renew() -> object:
        grid = RotaryGrid(HEAD)
        options = {"window_frames": WINDOW, "sink_frames": CHUNK, "positions": "window", "ema": 0.999}
        cache = ChunkCache(LAYERS, 1, HEADS, grid, ROWS, COLUMNS, CHUNK, dtype=HALF, **options)
        turns = [grid.temporal_shift(frames) for frames in (-3, 3)]
        sinks, slot = (cache._sink_k, cache._sink_v), CHUNK * FRAME
        return torch.ops.stream_r1.renew_sink_(
            cache.storage, *sinks, slot, 0.999, False, *turns[0], *turns[1]
        )

    past = Past(*(half(1, WINDOW * FRAME, HEADS, HEAD) for _ in range(2)), True)
    video, latents = half(1, VIDEO * FRAME, HEADS, HEAD), half(1, VIDEO, 16, *LATENT)
    mask = ChunkMask(FRAME, CHUNK, window_frames=WINDOW - CHUNK, sink_frames=CHUNK)
    pixels = half(3, 1, 1 + 4 * (VIDEO - 1), 3, 480, 832)
    weights = torch.zeros(1, VIDEO, 1, *LATENT)
    pixel = 480 * 832  # of a frame
    tokens, rows = f"{chunk} tokens", f"{chunk} x {WIDTH}"
    clip = f"{VIDEO} x 16 x {LATENT[0]} x {LATENT[1]}"
    student = latents.clone().requires_grad_()
    scores = (latents, latents, latents)
    return [
        (
            f"{tokens}, {WINDOW * FRAME} keys, {HEADS} heads of {HEAD}",
            lambda: cached_chunk_attention(half(1, chunk, HEADS, HEAD), None, None, past, **cuda),
            False,
        ),
        (f"{rows}, keys into their slot", lambda: rotary(False, k_out=half(1, chunk, HEADS, HEAD)), False),
        (rows, lambda: norm(False), False),
        (rows, lambda: norm(False, modulated_norm_fp8), False),
        (f"{chunk} x {FFN}, GELU", lambda: quantize_rows(half(1, chunk, FFN), gelu=True, **cuda), False),
        (rows, lambda: gate(False), False),
        (rows, lambda: rms_norm(half(1, chunk, WIDTH), half(WIDTH), **cuda), False),
        (
            "4 x 480 x 832 of 96 channels, past of 2 frames",
            lambda: rms_norm_silu(half(1, 4 * pixel, 96), half(96), half(1, 2 * pixel, 96), **cuda),
            False,
        ),
        (f"{LAYERS} layers, sink of {chunk} tokens, averaged and moved", renew, False),
        (
            f"{VIDEO * FRAME} tokens, {HEADS} heads of {HEAD}, window of {WINDOW} frames",
            lambda: chunk_attention(video, video, video, mask, **cuda),
            False,
        ),
        (rows, lambda: rotary(True), True),
        (rows, lambda: norm(True), True),
        (rows, lambda: gate(True), True),
        (
            "3 axes, 81 frames of 480 x 832",
            lambda: region_saliency(pixels, (VIDEO, *LATENT), **cuda),
            False,
        ),
        (
            f"3 axes, {VIDEO} x {LATENT[0]} x {LATENT[1]}",
            lambda: intra_weights(torch.zeros(3, 1, VIDEO, *LATENT), torch.zeros(1, 3), **cuda),
            False,
        ),
        (clip, lambda: dmd_loss(student, *scores, w_intra=weights, **cuda), False),
        (clip, lambda: dmd_gradient_(latents.clone(), latents, *scores, w_intra=weights, **cuda), False),
    ]


def sizes() -> dict[str, dict[str, KernelSize]]:
    """kernel -> architecture ("sm_80") -> its size, as compiled and as launched."""
    head, *lines = [line.split("\t") for line in COMPILED.read_text().splitlines() if line[:1] != "#"]
    found: dict[str, dict[str, KernelSize]] = {}
    for name, *cells in lines:
        if SHOWN.fullmatch(name) is None:
            continue
        threads = next(count for pattern, count in THREADS if re.fullmatch(pattern, name))
        pairs = [tuple(map(int, cell.split())) for cell in cells]
        found[name] = {
            arch: KernelSize(threads, registers, shared + DYNAMIC.get(name, 0))
            for arch, (registers, shared) in zip(head[1:], pairs, strict=True)
        }
    return found
