"""Versions, the device, what is built, and which of torch's attention kernels runs at the sizes of 1.3B."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_check.context import Context
from benchmarks.gpu_check.sizes import sizes_of

PACKAGES = (
    *("numpy", "safetensors", "pytest", "triton", "diffusers", "transformers", "pydantic", "av", "ninja"),
    *("flash-attn", "nvidia-cuda-nvcc", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
)


def run(context: Context) -> None:
    context.record(
        "versions",
        python=platform.python_version(),
        machine=platform.machine(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        packages={name: _version(name) for name in PACKAGES},
        commit=_said("git", "rev-parse", "--short", "HEAD"),
        nvcc=_said("nvcc", "--version").rpartition("\n")[2],
        driver=_said(
            "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"
        ),
    )
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(context.device)
        context.record(
            "device",
            name=properties.name,
            capability=[properties.major, properties.minor],
            memory=properties.total_memory,
            processors=properties.multi_processor_count,
            l2=getattr(properties, "L2_cache_size", 0),
        )
    else:
        context.record(
            "device", name=platform.processor() or "CPU", capability=None, why="torch finds no GPU"
        )
    from stream_r1_kernels import backends, info

    context.record(
        "kernels",
        build=backends.read_build_record(),
        unavailable=backends.unavailable(),
        info=info.describe(),
    )
    for name, queries, keys in _shapes(context):
        context.record("sdpa", name=name, kernels=_kernels_of_sdpa(context, queries, keys))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=5, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _shapes(context: Context) -> list[tuple[str, int, int]]:
    s = sizes_of(context.small)
    return [
        ("sampling", s.chunk * s.frame, s.window * s.frame),
        ("teacher", s.video * s.frame, s.video * s.frame),
    ]


def _kernels_of_sdpa(context: Context, queries: int, keys: int) -> dict[str, list[str]]:
    """The kernels, longest first, of a call without gradients and of one with a backward."""
    s = sizes_of(context.small)
    activity = torch.profiler.ProfilerActivity
    found = {}
    for grad in (False, True):
        q, k, v = (
            torch.randn(
                *(1, s.heads, n, s.head_dim), device=context.device, dtype=torch.bfloat16, requires_grad=grad
            )
            for n in (queries, keys, keys)
        )
        activities = [activity.CPU, *[activity.CUDA] * (context.device.type == "cuda")]
        with torch.profiler.profile(activities=activities) as profiler:
            out = scaled_dot_product_attention(q, k, v)
            if grad:
                out.sum().backward()
            context.synchronize()
        events = profiler.key_averages()
        on_gpu = [e for e in events if getattr(e, "self_device_time_total", 0) > 0]
        longest = sorted(on_gpu, key=lambda e: e.self_device_time_total, reverse=True)
        chosen = longest or [e for e in events if "attention" in e.key]
        found["backward" if grad else "forward"] = [e.key[:160] for e in chosen[:4]]
    return found
