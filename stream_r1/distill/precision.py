"""The precision in which models compute while they are trained; weights and optimizers stay float32."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "auto"]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cpu":
        there = torch.cpu.get_capabilities()
        return bool(there.get("avx512_bf16") or there.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def computing_in(precision: Precision, device: torch.device) -> torch.autocast:
    """A context in which matmuls run in `precision`; "auto" is bfloat16 where the device has it in hardware.

    Rollouts, scores and losses of the trainers run in it. Sums, norms and what is not a matmul keep the
    precision that torch's autocast gives them.
    """
    fast = precision == "auto" and has_fast_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast or precision == "bfloat16")
