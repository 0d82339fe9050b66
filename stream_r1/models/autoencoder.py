"""What video autoencoders have in common: frame counts, and decoding piece by piece, whole or as a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from stream_r1.devices import tuned_convolutions
from stream_r1.pixels import check_range

# Pixels (of all frames and samples) that one call of a network may hold: several latent frames a call are
# faster while they are small; at 480p this leaves one latent frame a call, as diffusers does.
_PIXELS_PER_PIECE = 1 << 20


class Decoder(Protocol):
    """What makes pixels of latents: an autoencoder, whole videos; its stream decoder, the next piece."""

    def decode(self, latents: Tensor) -> Tensor:
        """[B, F, C, h, w] -> [B, T, 3, H, W] in [0, 1]."""
        ...


class VideoAutoencoder(nn.Module, ABC):
    """A frozen causal autoencoder between pixels and normalised latents.

    Pixels are [B, T, 3, H, W] in [0, 1] with T = 1 + temporal_factor * n, latents [B, F, C, h, w] with
    F = 1 + n. Gradients reach pixels and latents, never the weights.
    """

    channels: int  # of a latent
    spatial_factor: int  # pixels a latent cell, in rows and in columns
    temporal_factor: int  # pixel frames a latent frame, after the first
    tune = True  # decode within `tuned_convolutions`

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents [B, F, C, h, w], float32 or better, of video [B, T, 3, H, W] in [0, 1]."""

    @abstractmethod
    def _decoder_input(self, latents: Tensor) -> Tensor:
        """Checked latents [B, F, C, h, w] as the decoder takes them, [B, C', F, h, w], on its device."""

    @abstractmethod
    def _decode_functional(self, z: Tensor, first: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The next piece [B, C', F, h, w] of a video -> (pixels [B, T, 3, H, W] in [0, 1], *tensors).

        `tensors` are what the decoder keeps from piece to piece; none before the first.
        """

    def frames(self, latent_frames: int) -> int:
        """Pixel frames of a video of `latent_frames` latent frames: 1 + temporal_factor * (F - 1)."""
        return 1 + self.temporal_factor * (latent_frames - 1)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(F, h, w) of a video of so many pixel frames; ValueError where they do not fit."""
        if frames < 1 or (frames - 1) % self.temporal_factor:
            raise ValueError(
                f"{type(self).__name__}: frames must be 1 + {self.temporal_factor} n, got {frames}"
            )
        if height < 1 or width < 1 or height % self.spatial_factor or width % self.spatial_factor:
            expected = f"height and width must be positive multiples of {self.spatial_factor}"
            raise ValueError(f"{type(self).__name__}: {expected}, got {height} x {width}")
        latent_frames = 1 + (frames - 1) // self.temporal_factor
        return latent_frames, height // self.spatial_factor, width // self.spatial_factor

    def decode(self, latents: Tensor, *, checkpoint: bool = False) -> Tensor:
        """Pixels [B, T, 3, H, W] in [0, 1] of whole videos, from normalised latents [B, F, C, h, w].

        Differentiable with respect to latents; the result is float32 (float64 for a float64 VAE).

        Args:
            latents: whole videos, the first latent frame first.
            checkpoint: keep only the causal caches between pieces for the backward and compute the rest again
                (slower by one forward; memory of one piece instead of the whole video).
        """
        z = self._checked_input(latents, "decode")
        per_piece = self._latent_frames_per_piece(z.shape[0], *self._size(z))
        recompute = checkpoint and torch.is_grad_enabled() and latents.requires_grad
        tensors: list[Tensor] = []
        pixels: list[Tensor] = []
        with self._tuned():
            for index, piece in enumerate(z.split(per_piece, dim=2)):
                if recompute:
                    frames, *tensors = run_checkpointed(
                        self._decode_functional, piece, index == 0, *tensors, use_reentrant=False
                    )
                else:
                    frames, *tensors = self._decode_functional(piece, index == 0, *tensors)
                pixels.append(frames)
        return torch.cat(pixels, dim=1)

    def _tuned(self) -> AbstractContextManager[None]:
        return tuned_convolutions(self.device) if self.tune else nullcontext()

    def stream_decoder(self, batch: int) -> StreamDecoder:
        """A decoder that takes latents as they are made; its memory does not grow."""
        return StreamDecoder(self, batch)

    def _checked_input(self, latents: Tensor, caller: str) -> Tensor:
        name = f"{type(self).__name__}.{caller}"
        if latents.dim() != 5 or latents.shape[2] != self.channels or 0 in latents.shape:
            expected = f"[B, F, {self.channels}, h, w], nothing empty"
            raise ValueError(f"{name}: latents must be {expected}, got {list(latents.shape)}")
        if not latents.is_floating_point():
            raise TypeError(f"{name}: latents must be floating point, got {latents.dtype}")
        return self._decoder_input(latents)

    def _check_video(self, video: Tensor) -> int:
        """Latent frames of a video to encode; ValueError or TypeError where it does not fit."""
        name = f"{type(self).__name__}.encode"
        if video.dim() != 5 or video.shape[2] != 3:
            raise ValueError(f"{name}: video must be [B, T, 3, H, W], got {list(video.shape)}")
        if not video.is_floating_point():
            raise TypeError(f"{name}: video must be floating point in [0, 1], got {video.dtype}")
        latent_frames = self.latent_shape(video.shape[1], video.shape[3], video.shape[4])[0]
        check_range(video, f"{name}: video")
        return latent_frames

    def _size(self, z: Tensor) -> tuple[int, int]:
        return z.shape[-2] * self.spatial_factor, z.shape[-1] * self.spatial_factor

    def _latent_frames_per_piece(self, batch: int, height: int, width: int) -> int:
        return max(1, _PIXELS_PER_PIECE // (batch * height * width * self.temporal_factor))


class StreamDecoder:
    """Decodes a video's latents chunk by chunk with the causal caches: equal to decoding everything at once.

    `frames_done` counts the latent frames so far. Without gradients.
    """

    def __init__(self, vae: VideoAutoencoder, batch: int) -> None:
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
        z = self.vae._checked_input(latents, "stream_decoder")
        size = self.vae._size(z)
        if z.shape[0] != self.batch or size != (self._size or size):
            expected = f"batch {self.batch}" + (
                f" and {self._size[0]} x {self._size[1]} pixels" if self._size else ""
            )
            raise ValueError(f"stream_decoder: the stream has {expected}, got latents {list(latents.shape)}")
        self._size = size
        pixels: list[Tensor] = []
        with self.vae._tuned():
            for piece in z.split(self.vae._latent_frames_per_piece(self.batch, *size), dim=2):
                first = self.frames_done == 0
                frames, *self._tensors = self.vae._decode_functional(piece, first, *self._tensors)
                self.frames_done += piece.shape[2]
                pixels.append(frames)
        return torch.cat(pixels, dim=1)

    def memory(self) -> int:
        """Bytes that the caches hold."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)
