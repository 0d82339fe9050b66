"""Models with random weights, made where they are used."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_check.context import CannotRunError
from benchmarks.gpu_check.sizes import Sizes
from stream_r1.estimate.work import cast
from stream_r1.models.autoencoder import VideoAutoencoder
from stream_r1.models.taehv import TinyVAE
from stream_r1.models.transformer import CausalWanTransformer


def random_student(s: Sizes, device: torch.device, **settings: Any) -> CausalWanTransformer:
    """In bfloat16, but for the parts that stay float32."""
    torch.manual_seed(0)
    with torch.device(device):
        return (
            cast(CausalWanTransformer(**(s.student | settings)), torch.bfloat16).eval().requires_grad_(False)
        )


def random_decoder(name: str, s: Sizes, device: torch.device) -> VideoAutoencoder:
    """ "wan" or "taehv", in bfloat16.

    Raises:
        CannotRunError: diffusers, whose class Wan's autoencoder is, is not installed.
    """
    with torch.device(device):
        if name == "taehv":
            return TinyVAE(s.channels, **s.decoder).to(torch.bfloat16)
        try:
            from diffusers import AutoencoderKLWan

            from stream_r1.models.vae import VideoVAE
        except ImportError as error:
            raise CannotRunError(f"Wan's autoencoder needs diffusers: {error}") from error
        return VideoVAE(cast(AutoencoderKLWan(z_dim=s.channels, **s.autoencoder), torch.bfloat16))
