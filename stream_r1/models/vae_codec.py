"""The networks of a Wan autoencoder, run over a video in pieces of any number of frames.

`decode_piece` and `encode_piece` walk the modules of diffusers' `WanDecoder3d` and `WanEncoder3d` (plain, Wan
2.1, or residual, Wan 2.2) with their own weights. diffusers runs one latent frame a call; here a piece is one
call, and the arithmetic of every frame is the same, so results agree to rounding. Time is causal and a
video's first frame stands alone: it makes one latent frame, each following group of `temporal factor` pixel
frames another one.
"""

from __future__ import annotations

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

from stream_r1.models.causal_convolution import Past, causal_conv3d


def decode_piece(decoder: WanDecoder3d, z: Tensor, past: Past, *, first: bool) -> Tensor:
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
    return causal_conv3d(_norm_silu(x, decoder.norm_out), decoder.conv_out, past)


def encode_piece(encoder: WanEncoder3d, x: Tensor, past: Past, *, first: bool) -> Tensor:
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
    return causal_conv3d(_norm_silu(x, encoder.norm_out), encoder.conv_out, past)


def _middle(x: Tensor, block: Any, past: Past) -> Tensor:
    """A `WanMidBlock`."""
    x = _residual_block(x, block.resnets[0], past)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual_block(attention(x), resnet, past)  # attention within a frame: it needs no past
    return x


def _down_block(x: Tensor, block: Any, past: Past, first: bool) -> Tensor:
    """A `WanResidualDownBlock`."""
    y = x
    for resnet in block.resnets:
        y = _residual_block(y, resnet, past)
    if block.downsampler is not None:
        y = _downsample(y, block.downsampler, past, first)
    return y + block.avg_shortcut(x.contiguous())


def _up_block(x: Tensor, block: Any, past: Past, first: bool) -> Tensor:
    """A `WanUpBlock` or `WanResidualUpBlock`."""
    y = x
    for resnet in block.resnets:
        y = _residual_block(y, resnet, past)
    if getattr(block, "upsampler", None) is not None:
        y = _upsample(y, block.upsampler, past, first)
    elif getattr(block, "upsamplers", None) is not None:
        y = _upsample(y, block.upsamplers[0], past, first)
    shortcut = getattr(block, "avg_shortcut", None)
    return y if shortcut is None else y + _duplicate(x, shortcut, first)


def _residual_block(x: Tensor, block: WanResidualBlock, past: Past) -> Tensor:
    shortcut = (
        x if isinstance(block.conv_shortcut, nn.Identity) else causal_conv3d(x, block.conv_shortcut, past)
    )
    y = causal_conv3d(_norm_silu(x, block.norm1), block.conv1, past)
    y = causal_conv3d(_norm_silu(y, block.norm2), block.conv2, past)
    return y + shortcut


def _norm_silu(x: Tensor, norm: WanRMS_norm) -> Tensor:
    """silu(gamma * sqrt(C) * x / |x|) over the channels of x [B, C, T, H, W], the norm in float32 or
    better."""
    y = x.movedim(1, -1)  # contiguous in memory where x is channels-last
    wide = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
    inverse = wide.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()
    y = (wide * inverse).to(x.dtype) * (norm.gamma.flatten() * norm.scale)
    y = functional.silu(y, inplace=not (torch.is_grad_enabled() and y.requires_grad))
    return y.movedim(-1, 1)


def _upsample(x: Tensor, block: WanResample, past: Past, first: bool) -> Tensor:
    """Twice as high and wide and, with `upsample3d`, twice as many frames, but for a video's first."""
    if block.mode == "upsample3d":
        head, rest = (x[:, :, :1], x[:, :, 1:]) if first else (None, x)
        if rest.shape[2]:
            y = causal_conv3d(rest, block.time_conv, past)  # [B, 2C, T, H, W]: even frames | odd frames
            y = y.movedim(1, -1).unflatten(-1, (2, -1))  # [B, T, H, W, 2, C]
            y = y.movedim(-2, 2).flatten(1, 2).movedim(-1, 1)  # [B, C, 2T, H, W]
            x = y if head is None else torch.cat([head, y], dim=2)
        else:
            past.skip(x, block.time_conv.kernel_size[0] - 1)
    return _frame_by_frame(x, block.resample)


def _downsample(x: Tensor, block: WanResample, past: Past, first: bool) -> Tensor:
    """Half as high and wide and, with `downsample3d`, half as many frames, a video's first one kept as it
    is."""
    x = _frame_by_frame(x, block.resample)
    if block.mode != "downsample3d":
        return x
    joined = past.join(x, 1)  # the time convolution has stride 2 and reads the frame before its two
    conv = block.time_conv
    if not first:
        return functional.conv3d(joined, conv.weight, conv.bias, stride=conv.stride)
    if x.shape[2] == 1:
        return x
    rest = functional.conv3d(x, conv.weight, conv.bias, stride=conv.stride)
    return torch.cat([x[:, :, :1], rest], dim=2)


def _frame_by_frame(x: Tensor, layers: nn.Module) -> Tensor:
    """Apply 2D layers to each frame of x [B, C, T, H, W]."""
    frames = x.movedim(2, 1).flatten(0, 1)  # [B T, C, H, W]
    frames = layers(frames.contiguous(memory_format=torch.channels_last))
    return frames.unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2)


def _duplicate(x: Tensor, block: DupUp3D, first: bool) -> Tensor:
    """Repeat channels into pixels: [B, C, T, H, W] -> [B, out, T * factor_t, H * factor_s, W * factor_s]."""
    time, space = block.factor_t, block.factor_s
    source = torch.arange(block.out_channels * block.factor, device=x.device) // block.repeats
    source = source.view(block.out_channels, time, space, space).movedim(0, -1)
    y = x.movedim(1, -1)[..., source]  # [B, T, H, W, time, space, space, out]
    y = y.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)
    return y[:, :, time - 1 :] if first else y
