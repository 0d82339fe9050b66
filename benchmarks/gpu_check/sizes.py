"""Sizes of what is measured: those of Wan 2.1 1.3B at 480 x 832, and small ones for the stand-in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Of a sampler and of a training step.

    Attributes:
        grid: rows and columns of tokens of a frame; chunk, window, sink, video: in latent frames.
        student: settings of `CausalWanTransformer`; the tiny decoder's are `decoder`.
    """

    heads: int
    head_dim: int
    ffn: int
    grid: tuple[int, int]
    layers: int
    text: tuple[int, int]
    decoder: dict[str, Any]
    autoencoder: dict[str, Any]
    chunk: int = 3
    window: int = 9
    sink: int = 3
    video: int = 21
    channels: int = 16

    @property
    def frame(self) -> int:
        """Tokens of a latent frame."""
        return self.grid[0] * self.grid[1]

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of the latents: a token is 2 x 2 of their cells."""
        return 2 * self.grid[0], 2 * self.grid[1]

    @property
    def student(self) -> dict[str, Any]:
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "ffn_dim": self.ffn,
            "num_layers": self.layers,
            "text_len": self.text[0],
            "text_dim": self.text[1],
            "window_frames": self.window,
            "sink_frames": self.sink,
            "positions": "window",
            "sink_ema": 0.999,
        }


WAN = Sizes(12, 128, 8960, (30, 52), 30, (512, 4096), {}, {})
SMALL = Sizes(
    *(2, 16, 64, (2, 3), 2, (6, 8)),
    decoder={"widths": (8, 8, 8, 8), "encoder_width": 8},
    autoencoder={"base_dim": 4, "num_res_blocks": 1},
    video=9,
)


def sizes_of(small: bool) -> Sizes:
    return SMALL if small else WAN
