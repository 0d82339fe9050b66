"""A small student and a tiny decoder that stream, of torch alone."""

from __future__ import annotations

from typing import Any

import torch

from stream_r1.models.taehv import TinyVAE
from stream_r1.models.transformer import CausalWanTransformer

CHANNELS, TEXT_DIM, TEXT_LEN = 4, 8, 6


def tiny_student(**settings: Any) -> CausalWanTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "text_len": TEXT_LEN,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "frames_per_chunk": 3,
        "window_frames": 9,
        "sink_frames": 3,
        "positions": "window",
    }
    return CausalWanTransformer(**(sizes | settings)).eval().requires_grad_(False)


def small_decoder() -> TinyVAE:
    torch.manual_seed(1)
    return TinyVAE(CHANNELS, widths=(8, 8, 8, 8), encoder_width=8)
