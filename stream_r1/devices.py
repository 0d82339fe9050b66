"""What a device can do, and how torch is set while models compute on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cpu":
        there = torch.cpu.get_capabilities()
        return bool(there.get("avx512_bf16") or there.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def decoding_dtype(device: torch.device | str, *, small: bool = False) -> torch.dtype:
    """The dtype of an autoencoder for which none was chosen: bfloat16 on a GPU that has it, as published.

    Args:
        device: where it works.
        small: whether it is one of the small assets, which a CPU with bfloat16 decodes in that, too.
    """
    device = torch.device(device)
    narrow = has_fast_bfloat16(device) and (device.type == "cuda" or small)
    return torch.bfloat16 if narrow else torch.float32


@contextmanager
def tuned_convolutions(device: torch.device) -> Iterator[None]:
    """Within it cuDNN times its algorithms for each new shape and keeps the fastest. For GPUs alone.

    Which one wins may differ from process to process, and so may the last bits. Where
    `torch.backends.cudnn.deterministic` is set, nothing is timed.
    """
    cudnn = torch.backends.cudnn
    if device.type != "cuda" or cudnn.deterministic:
        yield
        return
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before
