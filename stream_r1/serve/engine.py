"""The models of a live page: one thread denoises, one decodes and makes pictures, one records."""

from __future__ import annotations

import asyncio
import copy
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stream_r1.clock import Moment
from stream_r1.sampling.chunk import Chunk
from stream_r1.sampling.decoding import ChunkDecoder
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.sampling.start import read_start
from stream_r1.sampling.stream import Stream

T = TypeVar("T")
_QUALITY = 88  # of JPEG
_SHARE = 0.9  # of the time that streams may take together
_MOST_PIXELS = 3 << 25  # of a start's frames together, before they are made to fit


@dataclass
class Take:
    """A stream from its first chunk to a restart."""

    stream: Stream
    decoder: ChunkDecoder | None  # None: the stream decodes itself


@dataclass(frozen=True)
class Made:
    """A chunk before its pictures are made."""

    chunk: Chunk
    pictures: int  # frames that they are
    seconds: float


@dataclass(frozen=True)
class Picture:
    """A frame as it is sent, and as it is recorded."""

    jpeg: bytes
    pixels: NDArray[np.uint8]  # [H, W, 3]


class Engine:
    """A pipeline for several live streams, served in turn, chunk by chunk.

    Denoising of one chunk overlaps with decoding of the chunk before, but where the models take turns on a
    device (`offload`).

    Args:
        pipeline: loaded.
    """

    def __init__(self, pipeline: StreamR1Pipeline) -> None:
        self.pipeline = pipeline
        self._sampler = copy.copy(pipeline.sampler)
        self._decodes = self._sampler.offload is None and self._sampler.decoder is not None
        if self._decodes:
            self._sampler.decoder = None  # streams make latents
        self._models = ThreadPoolExecutor(1, "denoise")
        self._pictures = ThreadPoolExecutor(1, "decode")
        self._recorder = ThreadPoolExecutor(1, "record")  # a second of video is no work of a moment

    async def in_models(self, work: Callable[..., T], *args: Any) -> T:
        """Run on the thread that denoises; what was asked for first comes first."""
        return await asyncio.get_running_loop().run_in_executor(self._models, work, *args)

    async def in_pictures(self, work: Callable[..., T], *args: Any) -> T:
        """Run on the thread that decodes."""
        return await asyncio.get_running_loop().run_in_executor(self._pictures, work, *args)

    async def in_recorder(self, work: Callable[..., T], *args: Any) -> T:
        """Run on the thread that writes recordings."""
        return await asyncio.get_running_loop().run_in_executor(self._recorder, work, *args)

    def close(self) -> None:
        """Ends the threads when their work is done."""
        for pool in (self._models, self._pictures, self._recorder):
            pool.shutdown(wait=True, cancel_futures=True)

    @property
    def frames_per_chunk(self) -> int:
        """Pixel frames of a chunk in the middle of a stream."""
        return self.pipeline.student.config["frames_per_chunk"] * self.pipeline.vae.temporal_factor

    def read(self, path: Path) -> Tensor:
        """Normalised latents [1, F, C, h, w] of a picture or clip of any size; ValueError if it is none.

        The middle of it is taken, at the stream's aspect.
        """
        frames = read_start(path, self.pipeline, max_pixels=_MOST_PIXELS, fit=True).frames
        with torch.no_grad():
            self._sampler.use(self.pipeline.vae)
            return self.pipeline.vae.encode(frames)

    def begin(self, prompt: str, seed: int, given: Tensor | None = None) -> Take:
        """A stream from its start, or from latents that `read` made."""
        stream = self._sampler.stream(prompt, seed=seed, first_frames=given)
        decoder = self.pipeline.sampler.chunk_decoder(1) if self._decodes else None
        if decoder is not None and given is not None:
            given = given.to(self._sampler.device)
            made = Moment(given.device)
            for frame in given.split(1, dim=1):
                decoder.decode(frame, made)  # its caches: what follows is seamless
        return Take(stream, decoder)

    def make(self, take: Take) -> Made:
        """The next chunk. Its latents are waited for: a stream is paced by the time that they take."""
        start = time.perf_counter()
        chunk = next(take.stream)
        chunk.made.synchronize()
        vae, latents = self.pipeline.vae, chunk.latents.shape[1]
        pictures = latents * vae.temporal_factor if chunk.index else vae.frames(latents)
        return Made(chunk, pictures, time.perf_counter() - start)

    def decode(self, take: Take, made: Made) -> Tensor:
        """Its frames as bytes, [t, H, W, 3] uint8 on the CPU."""
        chunk = made.chunk
        pixels = chunk if take.decoder is None else take.decoder.decode(chunk.latents, chunk.made)
        return pixels.to_uint8()[0].movedim(1, -1)

    def measure(self) -> float:
        """Seconds of video that are made in a second, decoding and pictures included; warms everything up."""
        take = self.begin("a calm sea", 0)
        each = self.frames_per_chunk / self.pipeline.fps
        spent = []
        for _ in range(2 + (self.pipeline.student.config["window_frames"] or 9) // 3):
            start = time.perf_counter()
            encode(self.decode(take, self.make(take)))
            spent.append(time.perf_counter() - start)
        return each / float(np.median(spent[-3:]))


def streams_at_once(realtime: float) -> int:
    """How many streams a machine holds that makes `realtime` seconds of video a second; at least 1."""
    return max(1, int(_SHARE * realtime))


def encode(pixels: Tensor) -> list[Picture]:
    """JPEG of frames [t, H, W, 3] uint8."""
    pictures = []
    for picture in pixels.numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=_QUALITY, subsampling=0)
        pictures.append(Picture(file.getvalue(), picture))
    return pictures
