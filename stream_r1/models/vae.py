"""The video autoencoder as the project uses it: pixels in [0, 1], normalised latents, streaming decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from stream_r1.models.causal_convolution import Past
from stream_r1.models.vae_codec import decode_piece, encode_piece

# Pixels (of all frames and samples) that one call of a network may hold: several latent frames a call are
# faster while they are small; at 480p this leaves one latent frame a call, as diffusers does.
_PIXELS_PER_PIECE = 1 << 20


class VideoVAE(nn.Module):
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

        Raises FileNotFoundError if the folder or its config is missing, ValueError if it holds another class.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"VideoVAE.from_pretrained: expected {folder}/config.json of an AutoencoderKLWan"
            )
        config = AutoencoderKLWan.load_config(folder)
        if config.get("_class_name") != "AutoencoderKLWan":
            got = config.get("_class_name")
            raise ValueError(f"VideoVAE.from_pretrained: {folder} must hold an AutoencoderKLWan, got {got}")
        return cls(AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype)).to(device)

    @property
    def dtype(self) -> torch.dtype:
        return self.autoencoder.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.autoencoder.decoder.conv_in.weight.device

    def frames(self, latent_frames: int) -> int:
        """Pixel frames of a video of `latent_frames` latent frames: 1 + temporal_factor * (F - 1)."""
        return 1 + self.temporal_factor * (latent_frames - 1)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(F, h, w) of a video of so many pixel frames; ValueError where they do not fit."""
        if frames < 1 or (frames - 1) % self.temporal_factor:
            raise ValueError(f"VideoVAE: frames must be 1 + {self.temporal_factor} n, got {frames}")
        if height < 1 or width < 1 or height % self.spatial_factor or width % self.spatial_factor:
            expected = f"height and width must be positive multiples of {self.spatial_factor}"
            raise ValueError(f"VideoVAE: {expected}, got {height} x {width}")
        latent_frames = 1 + (frames - 1) // self.temporal_factor
        return latent_frames, height // self.spatial_factor, width // self.spatial_factor

    def encode(self, video: Tensor) -> Tensor:
        """The posterior's mean for video [B, T, 3, H, W] in [0, 1]: normalised latents [B, F, C, h, w].

        float32 (float64 for a float64 VAE).
        """
        if video.dim() != 5 or video.shape[2] != 3:
            raise ValueError(f"VideoVAE.encode: video must be [B, T, 3, H, W], got {list(video.shape)}")
        if not video.is_floating_point():
            raise TypeError(f"VideoVAE.encode: video must be floating point in [0, 1], got {video.dtype}")
        latent_frames, _, _ = self.latent_shape(video.shape[1], video.shape[3], video.shape[4])
        x = self._patchify(video.to(self.device, self.dtype) * 2 - 1)
        per_piece = self._latent_frames_per_piece(video.shape[0], video.shape[3], video.shape[4])
        past, out, start = Past(), [], 0
        for done in range(0, latent_frames, per_piece):
            stop = self.frames(min(done + per_piece, latent_frames))
            out.append(encode_piece(self.autoencoder.encoder, x[:, :, start:stop], past, first=done == 0))
            start = stop
        moments = self.autoencoder.quant_conv(torch.cat(out, dim=2))
        latents = (moments[:, : self.channels].movedim(1, 2) - self.mean) / self.std
        return latents.to(torch.promote_types(self.dtype, torch.float32))

    def decode(self, latents: Tensor, *, checkpoint: bool = False) -> Tensor:
        """Pixels [B, T, 3, H, W] in [0, 1] of whole videos, from normalised latents [B, F, C, h, w].

        Differentiable with respect to latents; the result is float32 (float64 for a float64 VAE).

        Args:
            latents: whole videos, the first latent frame first.
            checkpoint: keep only the causal caches between pieces for the backward and compute the rest again
                (slower by one forward; memory of one piece instead of the whole video).
        """
        z = self._denormalise(latents, "decode")
        per_piece = self._latent_frames_per_piece(z.shape[0], *self._size(z))
        recompute = checkpoint and torch.is_grad_enabled() and latents.requires_grad
        tensors: list[Tensor] = []
        pixels: list[Tensor] = []
        for index, piece in enumerate(z.split(per_piece, dim=2)):
            if recompute:
                frames, *tensors = run_checkpointed(
                    self._decode_functional, piece, index == 0, *tensors, use_reentrant=False
                )
            else:
                frames, *tensors = self._decode_functional(piece, index == 0, *tensors)
            pixels.append(frames)
        return torch.cat(pixels, dim=1)

    def stream_decoder(self, batch: int) -> StreamDecoder:
        """A decoder that takes latents as they are made; its memory does not grow."""
        return StreamDecoder(self, batch)

    def _decode_functional(self, z: Tensor, first: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        past = Past(list(tensors))
        x = decode_piece(self.autoencoder.decoder, z, past, first=first)
        return (self._to_pixels(x), *past.tensors)

    def _denormalise(self, latents: Tensor, caller: str) -> Tensor:
        """[B, F, C, h, w] -> [B, C, F, h, w], what the decoder was trained on."""
        if latents.dim() != 5 or latents.shape[2] != self.channels or 0 in latents.shape:
            expected = f"[B, F, {self.channels}, h, w], nothing empty"
            raise ValueError(f"VideoVAE.{caller}: latents must be {expected}, got {list(latents.shape)}")
        if not latents.is_floating_point():
            raise TypeError(f"VideoVAE.{caller}: latents must be floating point, got {latents.dtype}")
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

    def _size(self, z: Tensor) -> tuple[int, int]:
        return z.shape[-2] * self.spatial_factor, z.shape[-1] * self.spatial_factor

    def _latent_frames_per_piece(self, batch: int, height: int, width: int) -> int:
        return max(1, _PIXELS_PER_PIECE // (batch * height * width * self.temporal_factor))


class StreamDecoder:
    """Decodes a video's latents chunk by chunk with the causal caches: equal to decoding everything at once.

    `frames_done` counts the latent frames so far. Without gradients.
    """

    def __init__(self, vae: VideoVAE, batch: int) -> None:
        if batch < 1:
            raise ValueError(f"stream_decoder: batch must be at least 1, got {batch}")
        self.vae = vae
        self.batch = batch
        self.frames_done = 0
        self._tensors: list[Tensor] = []
        self._size: tuple[int, int] | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next latents [B, F, C, h, w] of the stream -> pixels [B, T, 3, H, W] in [0, 1].

        The stream's first latent frame gives one pixel frame, each later one `temporal_factor`.
        """
        z = self.vae._denormalise(latents, "stream_decoder")
        size = self.vae._size(z)
        if z.shape[0] != self.batch or size != (self._size or size):
            expected = f"batch {self.batch}" + (
                f" and {self._size[0]} x {self._size[1]} pixels" if self._size else ""
            )
            raise ValueError(f"stream_decoder: the stream has {expected}, got latents {list(latents.shape)}")
        self._size = size
        pixels: list[Tensor] = []
        for piece in z.split(self.vae._latent_frames_per_piece(self.batch, *size), dim=2):
            frames, *self._tensors = self.vae._decode_functional(piece, self.frames_done == 0, *self._tensors)
            self.frames_done += piece.shape[2]
            pixels.append(frames)
        return torch.cat(pixels, dim=1)

    def memory(self) -> int:
        """Bytes that the caches hold."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)
