"""A video being made: the chunk loop with its decoder, its noise and its clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from stream_r1.chunk_loop import ChunkLoop
from stream_r1.clock import Clock, Moment
from stream_r1.sampling.chunk import Chunk, ChunkWork, StreamTimer, StreamTimings
from stream_r1.sampling.decoding import ChunkDecoder
from stream_r1.sampling.noise import StreamNoise
from stream_r1.sampling.recache import HeldChunks
from stream_r1_kernels import ChunkCache

Prompts = str | Sequence[str] | Tensor


class Stream(Iterator[Chunk]):
    """A video being made. Iterating makes chunks; memory does not grow with them.

    `switch` changes the prompts from the next chunk on. Streams are made by `Sampler.stream`. On a GPU a
    chunk is handed out while it is in the making: see `ahead`.

    Args:
        loop: with an empty cache.
        noise: of the chunks; the loop's is the same.
        decoder: None: latents only.
        size: (h, w) of the latents.
        chunks: how many to make; None: any number.
        given: latents [B, F, C, h, w], whole chunks, that the first chunk follows.
        embed: text embeddings of prompts.
        use: is called with a model before it works.
        asked: when the stream was asked for.
    """

    def __init__(
        self,
        loop: ChunkLoop,
        noise: StreamNoise,
        decoder: ChunkDecoder | None,
        size: tuple[int, int],
        *,
        chunks: int | None,
        given: Tensor | None,
        embed: Callable[[Prompts], Tensor],
        use: Callable[[nn.Module], None],
        device: torch.device,
        asked: Moment,
    ) -> None:
        begun = Moment(device)
        sums = StreamTimings(text=begun.since(asked))
        self._loop = loop
        self._student = loop.passes.student
        self._noise, self._decoder = noise, decoder
        self._shape = (self._student.config["in_channels"], *size)
        self._chunks_left = chunks
        self._embed, self._use = embed, use
        self._device = device
        self._held = HeldChunks(loop.cache)
        if given is not None:
            frames = given.split(1, dim=1)
            while given.shape[1]:
                chunk, given = given[:, : loop.frames], given[:, loop.frames :]
                self._held.add(loop.index, chunk)
                loop.append(chunk)
            made = begun_at = Moment(device)
            sums.cache = made.since(begun)
            if decoder is not None:
                for frame in frames:  # for its caches: what follows is seamless
                    made = decoder.decode(frame, made).done
            sums.decode, begun = made.since(begun_at), made
        sums.total = begun.since(asked)
        self._timer = StreamTimer(sums, begun)

    @property
    def timings(self) -> StreamTimings:
        """Of what the stream did so far: of the chunks that are done; once it has ended, waits for all."""
        return self._timer.sums(wait=self._chunks_left == 0)

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
        loop, index, begun, clock = self._loop, self.index, Moment(self._device), Clock(self._device)
        self._use(self._student)
        if loop.owes_update:
            with clock.part("cache"):
                loop.update_cache()
        with clock.part("denoise"):
            device = self.cache.storage.device
            latents = loop.denoise(self._noise.draw(index, 0, (loop.frames, *self._shape), device))
        made = Moment(self._device)
        if device.type == "cuda" and self._chunks_left != 1:  # it is still at work
            self._noise.prepare(self.index, len(loop.steps), (loop.frames, *self._shape), device)
        decoded = None if self._decoder is None else self._decoder.decode(latents, made)
        self._held.add(index, latents)
        if self._chunks_left is not None:
            self._chunks_left -= 1
        if decoded is None:
            work = ChunkWork(begun, clock, made, None, latents.shape[1])
        else:
            work = ChunkWork(begun, clock, made, (decoded.begun, decoded.done), decoded.count)
        self._timer.add(work)
        return Chunk(index, latents, decoded, work, self._timer)

    def ahead(self) -> Iterator[Chunk]:
        """Its chunks; where a GPU decodes beside the student, each is handed out once the next one was begun.

        For a consumer that reads frames at once: the GPU is at work meanwhile. `switch` then changes the
        prompts from the chunk after the next one on.
        """
        if self._decoder is None or not self._decoder.beside:
            yield from self
            return
        last = None
        for chunk in self:
            if last is not None:
                yield last
            last = chunk
        if last is not None:
            yield last

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
