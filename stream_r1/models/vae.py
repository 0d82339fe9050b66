"""Wan's video autoencoder as the project uses it: pixels in [0, 1], normalised latents, streaming decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from stream_r1.files import FileError
from stream_r1.messages import some
from stream_r1.models.autoencoder import VideoAutoencoder
from stream_r1.models.causal_convolution import PastFrames
from stream_r1.models.library import read_library_model
from stream_r1.models.module_weights import device_of
from stream_r1.models.sizes import read_sizes
from stream_r1.models.vae_codec import decode_piece, encode_piece


class VideoVAE(VideoAutoencoder):
    """A frozen `AutoencoderKLWan` (plain or residual) between pixels and normalised latents.

    Pixels are [B, T, 3, H, W] in [0, 1] with T = 1 + temporal_factor * n, latents [B, F, C, h, w] with
    F = 1 + n, shifted and scaled by the configuration's `latents_mean` and `latents_std`. Gradients reach
    pixels and latents, never the weights. Source: Wan (2503.20314), section 4.1.
    """

    mean: Tensor  # [C, 1, 1]
    std: Tensor

    def __init__(self, autoencoder: AutoencoderKLWan) -> None:
        super().__init__()
        module: Any = autoencoder  # diffusers' classes carry no types
        config = module.config
        for name in ("latents_mean", "latents_std"):
            values = getattr(config, name)
            if values is None or len(values) != config.z_dim:
                got = "none" if values is None else len(values)
                raise ValueError(
                    f"VideoVAE: the config's {name} must have z_dim = {config.z_dim} values, got {got}"
                )
        if min(config.latents_std) <= 0:
            raise ValueError(
                f"VideoVAE: the config's latents_std must be positive, got {min(config.latents_std)}"
            )
        self.autoencoder = module.eval().requires_grad_(False)
        for layer in module.modules():
            if isinstance(layer, nn.Conv3d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
            elif isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        self.patch = int(config.patch_size or 1)
        self.channels = int(config.z_dim)
        self.spatial_factor = self.patch * 2 ** (len(config.dim_mult) - 1)
        self.temporal_factor = 2 ** sum(config.temperal_downsample)
        self.register_buffer("mean", torch.tensor(config.latents_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.latents_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> VideoVAE:
        """Load a local diffusers folder (`config.json` and weights) of an `AutoencoderKLWan`.

        Raises FileNotFoundError if the folder or its config is missing, ValueError if it holds another class,
        FileError if its files can't be read or lack weights.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"VideoVAE.from_pretrained: expected {folder}/config.json of an AutoencoderKLWan"
            )
        config = read_sizes(folder / "config.json")
        if config.get("_class_name") != "AutoencoderKLWan":
            got = config.get("_class_name")
            raise ValueError(
                f"VideoVAE.from_pretrained: {folder} must hold an AutoencoderKLWan, got {some([got])}"
            )
        model = read_library_model(AutoencoderKLWan, folder, torch_dtype=dtype)
        try:
            return cls(model).to(device)
        except ValueError as error:
            raise FileError(f"{folder / 'config.json'}: {error}") from None

    @property
    def dtype(self) -> torch.dtype:
        return self.autoencoder.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return device_of(self.autoencoder, self.autoencoder.decoder.conv_in.weight.device)

    def encode(self, video: Tensor) -> Tensor:
        """The posterior's mean for video [B, T, 3, H, W] in [0, 1]: normalised latents [B, F, C, h, w].

        float32 (float64 for a float64 VAE).
        """
        latent_frames = self._check_video(video)
        x = self._patchify(video.to(self.device, self.dtype) * 2 - 1)
        per_piece = self._latent_frames_per_piece(video.shape[0], video.shape[3], video.shape[4])
        past, out, start = PastFrames(), [], 0
        for done in range(0, latent_frames, per_piece):
            stop = self.frames(min(done + per_piece, latent_frames))
            out.append(encode_piece(self.autoencoder.encoder, x[:, :, start:stop], past, first=done == 0))
            start = stop
        moments = self.autoencoder.quant_conv(torch.cat(out, dim=2))
        latents = (moments[:, : self.channels].movedim(1, 2) - self.mean) / self.std
        return latents.to(torch.promote_types(self.dtype, torch.float32))

    def _decode_functional(self, z: Tensor, first: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        past = PastFrames(list(tensors))
        x = decode_piece(self.autoencoder.decoder, z, past, first=first)
        return (self._to_pixels(x), *past.tensors)

    def _decoder_input(self, latents: Tensor) -> Tensor:
        z = latents.to(self.device) * self.std + self.mean  # in float32 or better
        return self.autoencoder.post_quant_conv(z.movedim(2, 1).to(self.dtype))

    def _patchify(self, video: Tensor) -> Tensor:
        """[B, T, 3, H, W] -> [B, 3 p p, T, H / p, W / p], channels (colour, column, row) as in Wan 2.2."""
        batch, frames, colours, height, width = video.shape
        p = self.patch
        x = video.reshape(batch, frames, colours, height // p, p, width // p, p)
        return x.permute(0, 2, 6, 4, 1, 3, 5).flatten(1, 3)

    def _to_pixels(self, x: Tensor) -> Tensor:
        """The inverse of `_patchify`, clamped and moved to [0, 1]."""
        p = self.patch
        x = x.unflatten(1, (-1, p, p))  # [B, 3, column, row, T, H / p, W / p]
        x = x.permute(0, 4, 1, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return (x * 0.5 + 0.5).clamp(0, 1)
