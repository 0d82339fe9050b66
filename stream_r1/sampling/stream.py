"""A video being made: the chunk loop with its decoder, its noise and its clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from stream_r1.chunk_loop import ChunkLoop
from stream_r1.clock import Clock
from stream_r1.models.autoencoder import StreamDecoder
from stream_r1.sampling.chunk import Chunk, StreamTimings
from stream_r1.sampling.noise import StreamNoise
from stream_r1.sampling.recache import HeldChunks
from stream_r1_kernels import ChunkCache

Prompts = str | Sequence[str] | Tensor


class Stream(Iterator[Chunk]):
    """A video being made. Iterating makes chunks; memory does not grow with them.

    `timings` sums up what the stream did so far. `switch` changes the prompts from the next chunk on. Streams
    are made by `Sampler.stream`.

    Args:
        loop: with an empty cache.
        noise: of the chunks; the loop's is the same.
        decoder: None: latents only.
        size: (h, w) of the latents.
        chunks: how many to make; None: any number.
        given: latents [B, F, C, h, w], whole chunks, that the first chunk follows.
        embed: text embeddings of prompts.
        use: is called with a model before it works.
        clock: since the stream was asked for.
    """

    def __init__(
        self,
        loop: ChunkLoop,
        noise: StreamNoise,
        decoder: StreamDecoder | None,
        size: tuple[int, int],
        *,
        chunks: int | None,
        given: Tensor | None,
        embed: Callable[[Prompts], Tensor],
        use: Callable[[nn.Module], None],
        clock: Clock,
    ) -> None:
        self.timings = StreamTimings(text=clock.elapsed())
        self._loop = loop
        self._student = loop.passes.student
        self._noise, self._decoder = noise, decoder
        self._shape = (self._student.config["in_channels"], *size)
        self._chunks_left = chunks
        self._embed, self._use = embed, use
        self._device = clock.device
        self._held = HeldChunks(loop.cache)
        if given is not None:
            frames = given.split(1, dim=1)
            with clock.part("cache"):
                while given.shape[1]:
                    chunk, given = given[:, : loop.frames], given[:, loop.frames :]
                    self._held.add(loop.index, chunk)
                    loop.append(chunk)
            with clock.part("decode"):
                for frame in frames:
                    self._decode(frame)  # for the decoder's caches: what follows is seamless
            self.timings.cache, self.timings.decode = clock.seconds["cache"], clock.seconds["decode"]
        self.timings.total = clock.elapsed()

    @property
    def index(self) -> int:
        """Of the next chunk in the video, given frames counted."""
        return self._loop.index

    @property
    def cache(self) -> ChunkCache:
        return self._loop.cache

    def __iter__(self) -> Stream:
        return self

    @torch.no_grad()
    def __next__(self) -> Chunk:
        if self._chunks_left == 0:
            raise StopIteration
        loop, clock, index = self._loop, Clock(self._device), self.index
        self._use(self._student)
        if loop.owes_update:
            with clock.part("cache"):
                loop.update_cache()
        with clock.part("denoise"):
            device = self.cache.storage.device
            latents = loop.denoise(self._noise.draw(index, 0, (loop.frames, *self._shape), device))
            if device.type == "cuda" and self._chunks_left != 1:  # it is still at work
                self._noise.prepare(self.index, len(loop.steps), (loop.frames, *self._shape), device)
        with clock.part("decode"):
            frames = self._decode(latents)
        self._held.add(index, latents)
        if self._chunks_left is not None:
            self._chunks_left -= 1
        made = latents.shape[1] if frames is None else frames.shape[1]
        return Chunk(index, latents, frames, self.timings.add(clock.seconds, clock.elapsed(), made))

    @torch.no_grad()
    def switch(self, prompts: Prompts, *, recache: bool = False) -> None:
        """Other prompts, as many, from the next chunk on: the picture continues, its text changes.

        recache: compute what the window holds again under them, a pass a chunk, or ValueError: `HeldChunks`.
        """
        held = self._held.chunks() if recache else []
        embeds, batch = self._embed(prompts), self.cache.batch
        if len(embeds) != batch:
            raise ValueError(f"switch: prompts must be {batch}, as the stream's, got {len(embeds)}")
        self._use(self._student)
        self._loop.passes.switch(self._student.encode_text(embeds))
        if held:
            self._loop.recompute(held)

    def _decode(self, latents: Tensor) -> Tensor | None:
        if self._decoder is None:
            return None
        self._use(self._decoder.vae)
        return self._decoder.decode(latents)
