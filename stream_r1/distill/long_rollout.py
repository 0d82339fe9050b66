"""Rollouts past the teacher's window: students learn from the end of a long video of their own.

    made without a graph, in constant memory                              learnt from
    chunk 0 | chunk 1 | ... | chunk i                                     | chunk i + 1 | ... | last chunk
                              its end: context, the first frame encoded again

The teacher and the critic know clips that begin with a frame of their own: a latent frame that stands for one
picture, where later ones stand for several. So the last pixel frame of the clip's first latent frame is
decoded and encoded as such a beginning. The rest of what was made before is seen by all, and learns nothing.
Source: the public code of Self Forcing (2506.08009).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stream_r1.chunk_loop import ChunkLoop
from stream_r1.distill.rollout import self_rollout
from stream_r1.models.autoencoder import StreamDecoder, VideoAutoencoder
from stream_r1.models.sequence import SampleShare, SequenceParallel


class RolloutClip(NamedTuple):
    """What a rollout gives to the losses."""

    x: Tensor  # [B, F, C, h, w]
    loss_mask: Tensor | None = None  # bool [1, F, 1, 1, 1], frames that have a graph; None: all


def long_rollout(
    rollout: ChunkLoop,
    draw: Callable[[int], Tensor],
    *,
    length: int,
    frames: int,
    codec: VideoAutoencoder,
    grad: bool,
    sequence: SequenceParallel | None = None,
) -> RolloutClip:
    """The last `frames` frames of a video of `length`, as a clip by itself.

    Args:
        rollout: at its beginning, of a student with a window, for a video of `length` frames.
        draw: standard normal noise [B, f, C, h, w] of so many frames.
        length, frames: latent frames, of whole chunks both, length > frames.
        grad: build a graph, of the chunks after the clip's first.
        sequence: processes that share the rollout, and the samples that have to be decoded.
    """
    first, chunk = rollout.cache.first_chunk_frames, rollout.cache.frames_per_chunk
    if length <= frames or (length - frames) % chunk or (frames - first) % chunk:
        raise ValueError(
            f"long_rollout: expected frames {first} + a multiple of {chunk} and a length longer by another, "
            f"got frames {frames} and length {length}"
        )
    if not rollout.cache.overwrites:
        raise ValueError("long_rollout: expected a student with window_frames, got one that sees everything")
    if grad and not rollout.cache.evicts and length > rollout.cache.capacity:
        raise ValueError(
            f"long_rollout: expected a rollout begun with max_frames of at least its length, {length}, "
            f"got one that never leaves its window of {rollout.cache.capacity} frames"
        )
    x0 = rollout.denoise(draw(first), grad=False)
    share = SampleShare(len(x0), sequence)
    decoder = None if share.idle else codec.stream_decoder(len(x0[share.own]))
    pixels = _decode(decoder, x0[share.own])
    for _ in range((length - frames) // chunk):
        x0 = rollout.denoise(draw(chunk), grad=False)
        pixels = _decode(decoder, x0[share.own])
    encoded = None
    with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
        if pixels is not None:
            picture = pixels[:, pixels.shape[1] - codec.temporal_factor * (first - 1) - 1]
            encoded = codec.encode(picture[:, None]).to(x0)
        encoded = share.gathered(encoded, x0, len(x0), 1, *x0.shape[2:])
        beginning = torch.cat([encoded, x0[:, x0.shape[1] - first + 1 :]], dim=1)
    rest = self_rollout(rollout, draw(frames - first), grad=grad)
    loss_mask = torch.arange(frames, device=x0.device).view(1, -1, 1, 1, 1) >= first
    return RolloutClip(torch.cat([beginning, rest], dim=1), loss_mask)


def _decode(decoder: StreamDecoder | None, x0: Tensor) -> Tensor | None:
    """Pixels [B, T, 3, H, W] of the next chunk, if there is something to decode."""
    if decoder is None:
        return None
    with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
        return decoder.decode(x0)
