"""The work of a steady chunk, ours and the published data flow's, counted from the code that streams."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from benchmarks.published_flow import PublishedFlow
from stream_r1.estimate.devices import DEVICES, Device
from stream_r1.estimate.networks import make_vae
from stream_r1.estimate.streaming import ChunkWork, as_on, decoder_work, student_work
from stream_r1.estimate.work import Work, cast, count, fake_tensors
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1_kernels import backends

WAN = {  # Wan 2.1 1.3B, streaming as Reward Forcing and Stream-R1 do
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 30,
    "text_dim": 4096,
    "text_len": 512,
    "window_frames": 9,
    "sink_frames": 3,
    "positions": "window",
}
LATENT = (60, 104)  # of 480 x 832 pixels
STEPS = (1000, 750, 500, 250)
FRAMES = 12  # of a chunk
HALF = torch.bfloat16
STEADY = 3  # chunks until the window is full and rolls


def ours(device: Device, sequence: int = 1, **settings: Any) -> ChunkWork:
    """This project's sampler and decoder, in bfloat16, on a GPU; or on the first of several that share it."""
    return ChunkWork(student(device, STEPS, sequence, **settings), wan_decoder(), FRAMES)


@cache
def student(
    device: Device, steps: tuple[float, ...], sequence: int = 1, quantize: str | None = None, **settings: Any
) -> list[Work]:
    """The sampler's part."""
    config = WAN | {"sink_ema": 0.999} | settings
    return student_work(config, LATENT, steps, device, sequence, quantize=quantize)


@cache
def wan_decoder() -> list[Work]:
    """Wan's, the same on every GPU: none of its ops has a choice of backends."""
    with fake_tensors(), as_on(DEVICES["H100"]):
        return decoder_work(make_vae({}, on_gpu=True), torch.zeros(1, 3, 16, *LATENT))


def in_fp8(device: Device, *, cache: bool = False) -> ChunkWork:
    """The same with the student's linear layers in FP8, and its keys and values too."""
    kept = torch.float8_e4m3fn if cache else None
    config = WAN | {"sink_ema": 0.999}
    work = student_work(config, LATENT, STEPS, device, quantize="fp8", cache_dtype=kept)
    return ChunkWork(work, wan_decoder(), FRAMES)


def published(**settings: Any) -> ChunkWork:
    """The published data flow (benchmarks/published_flow.py), and diffusers' decoder, frame by frame."""
    with fake_tensors(), torch.no_grad():
        model = cast(CausalWanTransformer(**(WAN | settings)), HALF).eval()
        flow = PublishedFlow(model, LATENT[0] // 2, LATENT[1] // 2)
        x, text = torch.zeros(1, 3, 16, *LATENT), torch.zeros(1, 512, 4096, dtype=HALF)

        def chunk(passes: int = len(STEPS)) -> None:
            for _ in range(passes):
                flow.forward_chunk(x, torch.zeros(1, 3), text, last=False)
            flow.forward_chunk(x, torch.zeros(1, 3), text, last=True)

        for _ in range(STEADY):
            chunk(passes=0)
        return ChunkWork(count(chunk), diffusers_decoder(3, *LATENT), FRAMES)


def diffusers_decoder(frames: int, height: int, width: int) -> list[Work]:
    """Decoding so many latent frames amid a video, in bfloat16. Call it within `fake_tensors()`."""
    decoder = cast(AutoencoderKLWan(), HALF)
    latents = torch.zeros(1, 16, 1, height, width, dtype=HALF)
    with torch.no_grad():
        several = count(lambda: decoder.decode(latents.expand(-1, -1, 4, -1, -1)))
        more = count(lambda: decoder.decode(latents.expand(-1, -1, 5, -1, -1)))
    calls = {replace(w, calls=1): w.calls for w in several}
    left = [replace(w, calls=w.calls - calls.get(replace(w, calls=1), 0)) for w in more]
    return [w.times(frames) for w in left if w.calls > 0]


def attention_backend(device: Device) -> str:
    """What "auto" takes for a sampling pass on a GPU."""
    with fake_tensors(), as_on(device):
        keys = torch.zeros(1, 8, 2, 128, dtype=HALF)
        return backends.resolve("auto", "cached_chunk_attention", keys, None, None, keys, keys)
