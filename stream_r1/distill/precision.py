"""The precision in which models compute while they are trained; weights and optimizers stay float32."""

from __future__ import annotations

from typing import Literal

import torch

from stream_r1.devices import has_fast_bfloat16

Precision = Literal["float32", "bfloat16", "auto"]


def computing_in(precision: Precision, device: torch.device) -> torch.autocast:
    """A context in which matmuls run in `precision`; "auto" is bfloat16 where the device has it in hardware.

    Rollouts, scores and losses of the trainers run in it. Sums, norms and what is not a matmul keep the
    precision that torch's autocast gives them.
    """
    fast = precision == "auto" and has_fast_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast or precision == "bfloat16")
