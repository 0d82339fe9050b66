"""TAEHV: a tiny autoencoder in Wan 2.1's latent space, for previews and for slow machines.

Layout and weights as published (github.com/madebyollin/taehv, `taew2_1.pth`). All convolutions are within a
frame; time enters through memory blocks, which read the frame before, and through 1 x 1 convolutions that
pool frames into channels or grow them out of channels. A stream needs one frame a memory block to continue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stream_r1.files import FileError
from stream_r1.models.autoencoder import VideoAutoencoder
from stream_r1.models.checkpoints import check_fit
from stream_r1.models.tensor_files import require_finite
from stream_r1.models.weight_files import read_tensors

_POOLED = (2, 2, 1)  # frames that each stage of the encoder makes one
_GROWN = (1, 2, 2)  # frames that each stage of the decoder makes of one


class TinyVAE(VideoAutoencoder):
    """TAEHV for Wan 2.1: 8 x 8 pixels a latent cell, 4 frames a latent frame; it stands in for a `VideoVAE`.

    Args:
        channels: of the latents.
        widths: of the decoder's three stages and its last convolution.
        encoder_width: of the encoder.
    """

    spatial_factor = 8
    temporal_factor = math.prod(_GROWN)

    def __init__(
        self, channels: int = 16, widths: tuple[int, ...] = (256, 128, 64, 64), encoder_width: int = 64
    ) -> None:
        super().__init__()
        self.channels = channels
        encoder: list[nn.Module] = [_conv(3, encoder_width), nn.ReLU()]
        for frames in _POOLED:
            down = _conv(encoder_width, encoder_width, stride=2, bias=False)
            encoder += [_Pool(encoder_width, frames), down, *(_Memory(encoder_width) for _ in range(3))]
        self.encoder = nn.Sequential(*encoder, _conv(encoder_width, channels))
        decoder: list[nn.Module] = [_SoftClamp(), _conv(channels, widths[0]), nn.ReLU()]
        for width, following, frames in zip(widths, widths[1:], _GROWN, strict=False):
            decoder += [_Memory(width) for _ in range(3)]
            decoder += [
                nn.Upsample(scale_factor=2),
                _Grow(width, frames),
                _conv(width, following, bias=False),
            ]
        self.decoder = nn.Sequential(*decoder, nn.ReLU(), _conv(widths[-1], 3))
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> TinyVAE:
        """Load a published file, `taew2_1.pth` or the same as `.safetensors`.

        Raises:
            FileNotFoundError: no such file.
            FileError: another layout; names the missing, unexpected and wrongly shaped parameters.
        """
        state = read_tensors(path)
        sizes = [_size(state, f"decoder.{index}.weight", str(path)) for index in (1, 8, 14, 20)]
        encoder_width = _size(state, "encoder.0.weight", str(path))[0]
        with torch.device("meta"):  # the weights are there already: no time for random ones
            model = cls(sizes[0][1], tuple(size[0] for size in sizes), encoder_width)
        for index, layer in enumerate(model.decoder):
            name = f"decoder.{index}.conv.weight"
            if isinstance(layer, _Grow) and name in state:
                # trained to make more frames than this decoder does: its last ones are the ones to make
                state[name] = state[name][-layer.conv.weight.shape[0] :]
        check_fit(model, state, str(path))
        require_finite(state.items(), str(path))
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False).to(device, dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self._first.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._first.weight.device

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents [B, F, C, h, w], float32 or better, of video [B, T, 3, H, W] in [0, 1].

        A latent frame is made of the four frames from its own on; the last group repeats its frame, as
        published. A rough stand-in for Wan's encoder: where continuations matter, encode with that.
        """
        latent_frames = self._check_video(video)
        x = video.to(self.device, self.dtype)
        missing = latent_frames * self.temporal_factor - x.shape[1]
        x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        past: list[Tensor] = []
        frames = self.temporal_factor * self._latent_frames_per_piece(len(x), *x.shape[-2:])
        latents = [_run(self.encoder, piece, past) for piece in x.split(frames, dim=1)]
        return torch.cat(latents, dim=1).to(torch.promote_types(self.dtype, torch.float32))

    @property
    def _first(self) -> nn.Conv2d:
        layer = self.decoder[1]
        assert isinstance(layer, nn.Conv2d)
        return layer

    def _decoder_input(self, latents: Tensor) -> Tensor:
        return latents.to(self.device, self.dtype).movedim(2, 1)

    def _decode_functional(self, z: Tensor, first: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        past = list(tensors)
        x = _run(self.decoder, z.movedim(2, 1), past)
        if first:  # a video's first latent frame is one pixel frame, the last of what it grows to
            x = x[:, self.temporal_factor - 1 :]
        return (x.to(torch.promote_types(x.dtype, torch.float32)).clamp(0, 1), *past)


class _SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class _Memory(nn.Module):
    """A residual block over a frame and the frame before it, both [N, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = (
            _conv(2 * width, width),
            nn.ReLU(),
            _conv(width, width),
            nn.ReLU(),
            _conv(width, width),
        )
        self.conv = nn.Sequential(*convolutions)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return torch.relu(x + self.conv(torch.cat([x, before], dim=1)))


class _Pool(nn.Module):
    """[B, T, C, H, W] -> [B, T / frames, C, H, W]."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(frames * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        joined = x.unflatten(1, (-1, self.frames)).flatten(2, 3)  # [B, T / frames, frames * C, H, W]
        return _by_frame(self.conv, joined)


class _Grow(nn.Module):
    """[B, T, C, H, W] -> [B, T * frames, C, H, W]."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(width, frames * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _by_frame(self.conv, x).unflatten(2, (self.frames, -1)).flatten(1, 2)


def _run(layers: nn.Sequential, x: Tensor, past: list[Tensor]) -> Tensor:
    """The next frames [B, T, C, H, W] of a video through the layers.

    Args:
        past: the last input frame [B, 1, C, H, W] of every memory block, empty at the start; updated.
    """
    block = 0
    for layer in layers:
        if isinstance(layer, _Memory):
            if block == len(past):
                past.append(torch.zeros_like(x[:, :1]))
            before = torch.cat([past[block], x[:, :-1]], dim=1)
            past[block] = x[:, -1:].clone()  # a view would keep all of x alive
            x = layer(x.flatten(0, 1), before.flatten(0, 1)).unflatten(0, x.shape[:2])
            block += 1
        elif isinstance(layer, (_Pool, _Grow)):
            x = layer(x)
        else:
            x = _by_frame(layer, x)
    return x


def _by_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer over frames: [B, T, C, H, W] -> [B, T, C', H', W']."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _conv(inputs: int, outputs: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def _size(state: Mapping[str, Tensor], name: str, source: str) -> torch.Size:
    if name not in state or state[name].dim() != 4:
        found = ", ".join(list(state)[:5])
        raise FileError(f"{source}: expected the layout of taew2_1.pth with {name}, found {found}")
    return state[name].shape
