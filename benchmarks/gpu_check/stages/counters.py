"""Hardware counters of five kernels by Nsight Compute, then FlexAttention, which compiles for long."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu_check.clock import time_rotated
from benchmarks.gpu_check.context import CannotRunError, Context
from benchmarks.gpu_check.sizes import sizes_of
from benchmarks.gpu_check.stages.sanitizer import find_tool
from stream_r1_kernels import ChunkMask

ROOT = Path(__file__).parents[3]
OPS = ("cached_chunk_attention", "modulated_norm", "gated_add", "qk_norm_rotary", "rms_norm_silu")
METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
)


def run(context: Context) -> None:
    problem = None
    try:
        _counters(context)
    except CannotRunError as error:
        problem = error
    _flex(context)
    if problem is not None:
        raise problem


def _counters(context: Context) -> None:
    tool = find_tool("ncu")
    if context.small:
        raise CannotRunError("Nsight Compute needs a GPU")
    asked = [x for op in OPS for x in ("--op", op)]
    command = [
        *(tool, "--csv", "--metrics", ",".join(METRICS), "--target-processes", "all"),
        *("--kernel-name", "regex:stream_r1|attention_|modulated|gated|norm_rotary|rms_norm"),
        *(sys.executable, "-m", "benchmarks.gpu_check.small_ops", "--device", "cuda", "--full"),
        *("--backend", "cuda", *asked),
    ]
    left = max(5.0, context.left / 2)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=left)
    except subprocess.TimeoutExpired as error:
        raise CannotRunError(f"Nsight Compute took more than {left:.0f} s") from error
    table = done.stdout[done.stdout.find('"ID"') :] if '"ID"' in done.stdout else ""
    rows = list(csv.DictReader(io.StringIO(table)))
    if not rows:
        raise CannotRunError(f"Nsight Compute gave no table: {(done.stderr or done.stdout).strip()[-300:]}")
    for row in rows:
        columns = {
            "kernel": "Kernel Name",
            "metric": "Metric Name",
            "unit": "Metric Unit",
            "value": "Metric Value",
        }
        context.record("counter", **{name: row.get(column) for name, column in columns.items()})


def _flex(context: Context) -> None:
    """The masked training case and the dense sampling one."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    s, device = sizes_of(context.small), context.device
    flex = flex_attention if context.small else torch.compile(flex_attention)
    frames = ChunkMask(1, s.chunk, window_frames=s.window - s.sink, sink_frames=s.sink)
    visible, tokens = frames.visible(s.video).to(device), s.video * s.frame

    def sees(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return visible[query // s.frame, key // s.frame]

    blocks = create_block_mask(sees, None, None, tokens, tokens, device=str(device))
    for name, queries, keys, chosen in (
        ("sampling", s.chunk * s.frame, s.window * s.frame, None),
        ("training", tokens, tokens, blocks),
    ):
        q, k, v = (
            torch.randn(1, s.heads, n, s.head_dim, device=device, dtype=torch.bfloat16)
            for n in (queries, keys, keys)
        )
        with torch.no_grad():
            seconds, best, rounds = time_rotated(
                [lambda q=q, k=k, v=v, chosen=chosen: flex(q, k, v, block_mask=chosen)], device, 0.3
            )
        context.record("flex", name=name, seconds=seconds, best=best, rounds=rounds)
