"""The work of a stream's steady chunk, counted from the code that streams, as a GPU would run it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from stream_r1.estimate import roofline
from stream_r1.estimate.devices import DEVICES, Device
from stream_r1.estimate.exchange import CountedSequence
from stream_r1.estimate.networks import make_vae
from stream_r1.estimate.roofline import ASSUMED, Assumptions
from stream_r1.estimate.work import SHALLOW, Work, cast, count, fake_tensors, grown_work
from stream_r1.models.autoencoder import VideoAutoencoder
from stream_r1.models.fp8 import make_room
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.sampling.sampler import Sampler
from stream_r1_kernels import backends, dispatch


@dataclass(frozen=True)
class ChunkWork:
    """Of a chunk of a full window: denoising and cache pass, and decoding.

    `frames` are those of the video that it makes.
    """

    student: Sequence[Work]
    decoder: Sequence[Work]
    frames: int

    def seconds(
        self, device: Device, *, graph: bool = False, assumed: Assumptions = ASSUMED
    ) -> tuple[float, float]:
        """Predicted, of the student and of the decoder. Of the two, graphs replay the student."""
        student = roofline.seconds(self.student, device, assumed, graph=graph)
        return student, roofline.seconds(self.decoder, device, assumed)

    def fps(self, device: Device, *, graph: bool = False, assumed: Assumptions = ASSUMED) -> float:
        """Predicted frames a second of one stream."""
        return self.frames / sum(self.seconds(device, graph=graph, assumed=assumed))


def as_on(device: Device) -> AbstractContextManager[None]:
    """Within it ops pick their backends as on that GPU, with the CUDA kernels built and Triton there."""
    kernels = {"cuda": frozenset(dispatch.OPS) - {*dispatch.CPU_ALONE}, "triton": dispatch.TRITON_OPS}
    known = sorted(DEVICES.values(), key=lambda known: known.capability)
    archs = dict.fromkeys(each.architecture.removeprefix("sm_") for each in known)
    return backends.picking_for(device.capability, dispatch.Build(kernels, tuple(archs)))


def chunk_work(
    student: dict[str, Any],
    autoencoder: dict[str, Any],
    latent: tuple[int, int],
    steps: Sequence[float],
    device: Device,
    sequence: int = 1,
    *,
    quantize: str | None = None,
    cache_dtype: torch.dtype | None = None,
) -> ChunkWork:
    """One stream's, all in bfloat16 but what is in FP8.

    Args:
        student, autoencoder: configurations; the student's has a window.
        latent: height and width of the latents.
        steps: timesteps of the denoising passes, before the shift.
        device: whose backends are counted.
        sequence: GPUs that share the student's passes; the first one decodes, and its work is counted.
        quantize: "fp8" or None.
        cache_dtype: torch.float8_e4m3fn or None.

    Raises:
        ValueError: a student without a window, whose chunks are never alike, or FP8 on a GPU without.
    """
    work = student_work(student, latent, steps, device, sequence, quantize=quantize, cache_dtype=cache_dtype)
    with fake_tensors(), as_on(device):
        vae = make_vae(autoencoder, on_gpu=True)
        frames, channels = student.get("frames_per_chunk", 3), student.get("in_channels", 16)
        decoding = decoder_work(vae, torch.zeros(1, frames, channels, *latent))
        return ChunkWork(work, decoding, vae.temporal_factor * frames)


def student_work(
    student: dict[str, Any],
    latent: tuple[int, int],
    steps: Sequence[float],
    device: Device,
    sequence: int = 1,
    *,
    quantize: str | None = None,
    cache_dtype: torch.dtype | None = None,
) -> list[Work]:
    """The student's part of `chunk_work`, whose arguments and errors these are."""
    if quantize is not None and device.matmul8 is None:
        raise ValueError(f"chunk_work: quantize: expected None on {device.name}, got {quantize!r}")
    if student.get("window_frames") is None:
        raise ValueError("chunk_work: expected a student with window_frames, got one that sees everything")
    with fake_tensors(), as_on(device):
        shallow, deeper = (
            _student_work(student | {"num_layers": n}, latent, steps, sequence, quantize, cache_dtype)
            for n in SHALLOW
        )
        return grown_work(shallow, shallow, deeper, student["num_layers"] - SHALLOW[0])


def decoder_work(vae: VideoAutoencoder, latents: torch.Tensor) -> list[Work]:
    """Decoding a chunk [1, F, C, h, w] amid a stream. Call it within `fake_tensors()`."""
    decoder = vae.stream_decoder(1)
    decoding = [count(lambda: decoder.decode(latents)) for _ in range(2)]  # the first piece is shorter
    return decoding[1]


def cache_bytes(
    student: dict[str, Any], latent: tuple[int, int], cache_dtype: torch.dtype = torch.bfloat16
) -> int:
    """Of the keys and values of one stream of a student with a window."""
    with torch.device("meta"):
        model = CausalWanTransformer(**student).bfloat16()
        return model.new_cache(1, *latent, dtype=cache_dtype).nbytes


def _student_work(
    student: dict[str, Any],
    latent: tuple[int, int],
    steps: Sequence[float],
    sequence: int = 1,
    quantize: str | None = None,
    cache_dtype: torch.dtype | None = None,
) -> list[Work]:
    model = cast(CausalWanTransformer(**student), torch.bfloat16).eval()
    if quantize is not None:
        make_room(model, quantize)
    if sequence > 1:
        model.enable_sequence_parallel(CountedSequence(sequence))
    config: Any = model.config
    text = torch.zeros(1, config.text_len, config.text_dim)
    sampler = Sampler(model, steps=steps, fuse_cache_update=False, cache_dtype=cache_dtype)
    stream = sampler.stream(text, latent_size=latent)
    for _ in range(-(-config.window_frames // config.frames_per_chunk)):  # as if chunks had been made
        stream.cache.begin_chunk()
        stream.cache.commit()
    for _ in range(2):  # each timestep has been read by then; a cache pass is the next chunk's
        next(stream)
    return count(lambda: next(stream))
