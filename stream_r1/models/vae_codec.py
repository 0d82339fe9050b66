"""The networks of a Wan autoencoder, run over a video in pieces of any number of frames.

`decode_piece` and `encode_piece` walk the modules of diffusers' `WanDecoder3d` and `WanEncoder3d` (plain, Wan
2.1, or residual, Wan 2.2) with their own weights. diffusers runs one latent frame a call; here a piece is one
call, and the arithmetic of every frame is the same, so results agree to rounding. Time is causal and a
video's first frame stands alone: it makes one latent frame, each following group of `temporal factor` pixel
frames another one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    DupUp3D,
    WanDecoder3d,
    WanEncoder3d,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanRMS_norm,
)
from torch import Tensor, nn
from torch.nn import functional

from stream_r1.models.causal_convolution import PastFrames, causal_conv3d, norm_silu_conv3d
from stream_r1.models.module_weights import weight_of
from stream_r1.models.upsampling import double_and_convolve


def decode_piece(decoder: WanDecoder3d, z: Tensor, past: PastFrames, *, first: bool) -> Tensor:
    """Decode the next latent frames of a video.

    Args:
        decoder: the frozen network, in eval mode.
        z: [B, C, F, h, w], latents after `post_quant_conv`.
        past: what earlier pieces left; updated.
        first: whether z starts with the video's first latent frame.

    Returns:
        [B, out_channels, T, H, W], still patchified; T = factor * F, less `factor - 1` frames if first.
    """
    past.rewind()
    x = causal_conv3d(z, decoder.conv_in, past)
    x = _middle(x, decoder.mid_block, past)
    for block in decoder.up_blocks:
        x = _up_block(x, block, past, first)
    return _norm_conv(x, decoder.norm_out, decoder.conv_out, past)


def encode_piece(encoder: WanEncoder3d, x: Tensor, past: PastFrames, *, first: bool) -> Tensor:
    """Encode the next pixel frames of a video.

    Args:
        encoder: the frozen network, in eval mode.
        x: [B, in_channels, T, H, W], patchified pixels in [-1, 1]; T = factor * n, plus 1 if first.
        past: what earlier pieces left; updated.
        first: whether x starts with the video's first frame.

    Returns:
        [B, 2 C, F, h, w], before `quant_conv`; F = n, plus 1 if first.
    """
    past.rewind()
    x = causal_conv3d(x, encoder.conv_in, past)
    for block in encoder.down_blocks:
        if isinstance(block, WanResidualDownBlock):
            x = _down_block(x, block, past, first)
        elif isinstance(block, WanResidualBlock):
            x = _residual_block(x, block, past)
        elif isinstance(block, WanResample):
            x = _downsample(x, block, past, first)
        else:
            x = block(x)  # attention within a frame
    x = _middle(x, encoder.mid_block, past)
    return _norm_conv(x, encoder.norm_out, encoder.conv_out, past)


def _middle(x: Tensor, block: Any, past: PastFrames) -> Tensor:
    """A `WanMidBlock`."""
    x = _residual_block(x, block.resnets[0], past)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual_block(attention(x), resnet, past)  # attention within a frame: it needs no past
    return x


def _down_block(x: Tensor, block: Any, past: PastFrames, first: bool) -> Tensor:
    """A `WanResidualDownBlock`."""
    y = x
    for resnet in block.resnets:
        y = _residual_block(y, resnet, past)
    if block.downsampler is not None:
        y = _downsample(y, block.downsampler, past, first)
    return _add(y, block.avg_shortcut(x.contiguous()))


def _up_block(x: Tensor, block: Any, past: PastFrames, first: bool) -> Tensor:
    """A `WanUpBlock` or `WanResidualUpBlock`."""
    y = x
    for resnet in block.resnets:
        y = _residual_block(y, resnet, past)
    if getattr(block, "upsampler", None) is not None:
        y = _upsample(y, block.upsampler, past, first)
    elif getattr(block, "upsamplers", None) is not None:
        y = _upsample(y, block.upsamplers[0], past, first)
    shortcut = getattr(block, "avg_shortcut", None)
    return y if shortcut is None else _add_duplicates(y, x, shortcut, first)


def _residual_block(x: Tensor, block: WanResidualBlock, past: PastFrames) -> Tensor:
    shortcut = (
        x if isinstance(block.conv_shortcut, nn.Identity) else causal_conv3d(x, block.conv_shortcut, past)
    )
    y = _norm_conv(x, block.norm1, block.conv1, past)
    return _add(_norm_conv(y, block.norm2, block.conv2, past), shortcut)


def _norm_conv(x: Tensor, norm: WanRMS_norm, conv: nn.Conv3d, past: PastFrames) -> Tensor:
    return norm_silu_conv3d(x, weight_of(norm, "gamma").flatten(), conv, past)


def _add(y: Tensor, x: Tensor) -> Tensor:
    """y + x, in y's memory where no gradient needs it."""
    return y + x if torch.is_grad_enabled() else y.add_(x)


def _upsample(x: Tensor, block: WanResample, past: PastFrames, first: bool) -> Tensor:
    """Twice as high and wide and, with `upsample3d`, twice as many frames, but for a video's first."""
    if block.mode == "upsample3d":
        head, rest = (x[:, :, :1], x[:, :, 1:]) if first else (None, x)
        if rest.shape[2]:
            y = causal_conv3d(rest, block.time_conv, past)  # [B, 2C, T, H, W]: even frames | odd frames
            y = y.movedim(1, -1).unflatten(-1, (2, -1))  # [B, T, H, W, 2, C]
            y = y.movedim(-2, 2).flatten(1, 2).movedim(-1, 1)  # [B, C, 2T, H, W]
            x = y if head is None else torch.cat([head, y], dim=2)
        else:
            past.last(x, block.time_conv.kernel_size[0] - 1)  # zeros, for the frames to come
    frames = x.movedim(2, 1).flatten(0, 1)  # [B T, C, H, W]
    frames = double_and_convolve(frames, block.resample[1])  # type: ignore[arg-type]
    return frames.unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2)


def _downsample(x: Tensor, block: WanResample, past: PastFrames, first: bool) -> Tensor:
    """Half as high and wide and, with `downsample3d`, half as many frames, a video's first one kept as it
    is."""
    frames = x.movedim(2, 1).flatten(0, 1)  # [B T, C, H, W]
    frames = block.resample(frames.contiguous(memory_format=torch.channels_last))
    x = frames.unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2)
    if block.mode != "downsample3d":
        return x
    joined = past.join(x, 1)  # the time convolution has stride 2 and reads the frame before its two
    conv = block.time_conv
    weights = weight_of(conv), weight_of(conv, "bias")
    if not first:
        return functional.conv3d(joined, *weights, stride=conv.stride)
    if x.shape[2] == 1:
        return x
    rest = functional.conv3d(x, *weights, stride=conv.stride)
    return torch.cat([x[:, :, :1], rest], dim=2)


def _add_duplicates(y: Tensor, x: Tensor, block: DupUp3D, first: bool) -> Tensor:
    """y [B, C', T, H, W] plus x [B, C, T / time, H / space, W / space], its channels repeated into pixels.

    A video's first frame of x has one frame of y, the last of those it would be repeated into.
    """
    time, space = block.factor_t, block.factor_s
    sources = _sources(block.out_channels, time, space, block.repeats, x.device)
    y, x = y.movedim(1, -1), x.movedim(1, -1)
    if not first:
        return _add_repeated(y, x, sources, time, space).movedim(-1, 1)
    head = _add_repeated(y[:, :1], x[:, :1], sources[-1:], 1, space)
    tail = _add_repeated(y[:, 1:], x[:, 1:], sources, time, space)
    whole = torch.cat([head, tail], dim=1) if torch.is_grad_enabled() else y
    return whole.movedim(-1, 1)


def _add_repeated(y: Tensor, x: Tensor, sources: Tensor, time: int, space: int) -> Tensor:
    """y [B, T, H, W, C'] plus, for each of its time * space * space cells, x's channels of `sources`."""
    batch, frames, rows, columns, _ = x.shape
    values = x[..., sources]  # [B, t, h, w, 1 or time, 1 or space, 1 or space, C']
    cells = y.view(batch, frames, time, rows, space, columns, space, y.shape[-1])
    return _add(cells, values.permute(0, 1, 4, 2, 5, 3, 6, 7)).view(y.shape)


@cache
def _sources(channels: int, time: int, space: int, repeats: int, device: torch.device) -> Tensor:
    """The input channel of every output channel and cell, [time, space, space, C'] of a `DupUp3D`.

    A dimension along which it is the same has size 1.
    """
    sources = torch.arange(channels * time * space * space) // repeats
    sources = sources.view(channels, time, space, space).movedim(0, -1)
    for dim in range(3):
        if (sources == sources.narrow(dim, 0, 1)).all():
            sources = sources.narrow(dim, 0, 1)
    return sources.to(device)
