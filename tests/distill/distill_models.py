"""Random models small enough for tests, of the classes that real runs use."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.models.vae import VideoVAE

SIZES = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
LATENT = (4, 4, 6)  # channels, rows, columns


def tiny_student(seed: int = 0, **settings: Any) -> CausalWanTransformer:
    torch.manual_seed(seed)
    return CausalWanTransformer(**(SIZES | {"text_len": 8, "frames_per_chunk": 3} | settings))


def tiny_teacher(seed: int = 1, **settings: Any) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(**(SIZES | settings))


def tiny_vae(seed: int = 2) -> VideoVAE:
    torch.manual_seed(seed)
    layers = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_dim": LATENT[0]}
    statistics = {"latents_mean": [0.0] * LATENT[0], "latents_std": [1.0] * LATENT[0]}
    return VideoVAE(AutoencoderKLWan(**layers, **statistics, temperal_downsample=[False, True, True]))


class LetterEncoder:
    """Embeds a prompt by its letters: nothing random, different for different prompts."""

    text_len, dim = 8, 16

    def encode(self, prompts: list[str]) -> Tensor:
        out = torch.zeros(len(prompts), 8, 16)
        for row, prompt in zip(out, prompts, strict=True):
            for place, letter in enumerate(prompt[:8]):
                row[place, ord(letter) % 16] = 1.0
        return out


class StretchDecoder:
    """Latents as pixels: three channels, a cell 4 x 4 pixels and, but for the first frame, 4 frames."""

    def decode(self, latents: Tensor) -> Tensor:
        pixels = latents[:, :, :3].repeat_interleave(4, 1)[:, 3:].sigmoid()
        return pixels.repeat_interleave(4, 3).repeat_interleave(4, 4)
