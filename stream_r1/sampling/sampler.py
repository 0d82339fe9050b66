"""Sampling: a stream of chunks, each made by a few denoising passes that read what earlier chunks left.

    noise -> pass, re-noise, pass, re-noise, pass, re-noise, pass -> x0 -> decoder -> frames
                                                                     x0 -> clean pass at t = 0 -> cache

The clean pass of a chunk runs when the next chunk is asked for: frames come earlier, and the last chunk of a
finite stream needs none. With few tokens it is one pass with the next chunk's first.
Sources: Self Forcing (2506.08009), Reward Forcing (2512.04678).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from stream_r1.models.autoencoder import VideoAutoencoder
from stream_r1.models.contexts import TimeContext
from stream_r1.models.offload import ModelOffload
from stream_r1.models.text import TextEncoder
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.pixels import check_range
from stream_r1.sampling.chunk import Chunk, ChunkTimings, StreamTimings
from stream_r1.sampling.graphs import PassGraphs, refuse_graphs
from stream_r1.sampling.noise import StreamNoise
from stream_r1.sampling.recache import HeldChunks
from stream_r1.schedule import FlowSchedule

# A chunk's, of a batch: with so few, a pass over two chunks takes less than two passes on a CPU.
_FEW_TOKENS = 1200


class Sampler:
    """Makes streams with a student.

    Args:
        student: the causal transformer, in eval mode.
        vae: encodes given frames and decodes chunks; None: latents only.
        schedule: noise levels.
        steps: denoising timesteps before the schedule's shift, falling, in (0, 1000].
        text_encoder: for prompts given as text; None: streams take embeddings.
        decoder: decodes instead of the vae, which only encodes then; in the same latent space.
        latent_size: (h, w) of the latents of a stream that is not told its size.
        context_noise: timestep of the pass that leaves keys and values; 0 is the clean chunk. As in training.
        cuda_graph: replay the passes as CUDA graphs once a stream's window is full, one graph a slot of the
            ring (`PassGraphs`): for a student on a GPU, with a window. Every stream captures its own.
        merge_passes: run a chunk's clean pass and the next chunk's first denoising pass as one, the same to
            rounding: True, False, or None where that is the faster, with few tokens a chunk on a CPU.

    `offload`, None at first, is what student, vae and decoder take turns in, if they do.

    Raises:
        ValueError: parts that do not fit each other, or CUDA graphs or merged passes of a student that can't
            have them.
    """

    def __init__(
        self,
        student: CausalWanTransformer,
        vae: VideoAutoencoder | None = None,
        schedule: FlowSchedule | None = None,
        steps: Sequence[float] = (1000, 750, 500, 250),
        *,
        text_encoder: TextEncoder | None = None,
        decoder: VideoAutoencoder | None = None,
        latent_size: tuple[int, int] | None = None,
        context_noise: float = 0.0,
        cuda_graph: bool = False,
        merge_passes: bool | None = None,
    ) -> None:
        self.schedule = schedule or FlowSchedule()
        self.steps = self.schedule.denoising_steps(steps)
        if not 0 <= context_noise < 1000:
            raise ValueError(f"Sampler: context_noise must be in [0, 1000), got {context_noise}")
        channels = student.config["in_channels"]
        for name, model in (("vae", vae), ("decoder", decoder)):
            if model is not None and model.channels != channels:
                expected = f"the student's {channels} latent channels"
                raise ValueError(f"Sampler: the {name} must have {expected}, got {model.channels}")
        if decoder is not None and vae is not None and _factors(decoder) != _factors(vae):
            expected = f"the vae's pixels and frames a latent {_factors(vae)}"
            raise ValueError(f"Sampler: the decoder must have {expected}, got {_factors(decoder)}")
        if cuda_graph:
            refuse_graphs("Sampler", student)
        if merge_passes and cuda_graph:
            raise ValueError(
                "Sampler: merge_passes must not be True with cuda_graph, whose passes are single"
            )
        width = student.config["text_dim"]
        if text_encoder is not None and text_encoder.dim != width:
            expected = f"the student's text_dim {width}"
            raise ValueError(f"Sampler: the text_encoder must have {expected}, got {text_encoder.dim}")
        self.student = student
        self.vae = vae
        self.decoder = vae if decoder is None else decoder
        self.text_encoder = text_encoder
        self.latent_size = latent_size
        self.context_noise = context_noise
        self.cuda_graph = cuda_graph
        self.merge_passes = merge_passes
        self.offload: ModelOffload | None = None

    @property
    def device(self) -> torch.device:
        """Where the student computes."""
        return self.student.device if self.offload is None else self.offload.device

    def use(self, model: nn.Module) -> None:
        """Call before a model works: it may have to come to its device."""
        if self.offload is not None:
            self.offload.use(model)

    def stream(
        self,
        prompts: str | Sequence[str] | Tensor,
        *,
        seed: int | Sequence[int] = 0,
        chunks: int | None = None,
        first_frames: Tensor | None = None,
        latent_size: tuple[int, int] | None = None,
        first_index: int = 0,
    ) -> Stream:
        """Start a stream.

        Args:
            prompts: one prompt, a batch of them, or text embeddings [B, L, text_dim].
            seed: same seed, same machine, same batch size: same video, bit for bit. An int (prompts are told
                apart by their index) or one a prompt. The noise depends on seed, prompt index, chunk and pass
                alone.
            chunks: how many chunks to make after `first_frames`; None: for ever.
            first_frames: go on from these: pixels [B, T, 3, H, W] in [0, 1] (needs the VAE) or normalised
                latents [B, F, C, h, w], whole chunks; they are not yielded again. Batch 1 serves all prompts.
            latent_size: (h, w); None: that of `first_frames`, else the sampler's.
            first_index: index of the first prompt where a list is sampled in several batches.

        Raises:
            ValueError, TypeError: what does not fit, before any work but encoding.
        """
        started = time.perf_counter()
        if chunks is not None and chunks < 1:
            raise ValueError(f"stream: chunks must be at least 1 or None, got {chunks}")
        if chunks is None and self.student.config["window_frames"] is None:
            expected = "a student without window_frames sees its whole past, so chunks must be a number"
            raise ValueError(f"stream: {expected}, got None")
        with torch.no_grad():
            embeds = self.embed(prompts)
            given = None if first_frames is None else self._given_latents(first_frames, len(embeds))
            size = latent_size or (tuple(given.shape[-2:]) if given is not None else self.latent_size)
            if size is None:
                raise ValueError("stream: latent_size must be given to the stream or to its Sampler")
            if given is not None and tuple(given.shape[-2:]) != tuple(size):
                expected = f"that of first_frames {list(given.shape)}"
                raise ValueError(f"stream: latent_size must be {expected}, got {tuple(size)}")
            noise = StreamNoise(seed, len(embeds), first_index)
            return Stream(self, embeds, noise, chunks, given, (size[0], size[1]), started)

    def embed(self, prompts: str | Sequence[str] | Tensor) -> Tensor:
        """Text embeddings [B, L, text_dim] of prompts, on the student's device."""
        width = self.student.config["text_dim"]
        if isinstance(prompts, Tensor):
            if prompts.dim() != 3 or prompts.shape[2] != width or not len(prompts):
                raise ValueError(f"stream: embeddings must be [B, L, {width}], got {list(prompts.shape)}")
            return prompts.to(self.device)
        if self.text_encoder is None:
            raise ValueError("stream: prompts must be embeddings, for this Sampler has no text_encoder")
        if not isinstance(prompts, Sequence):
            expected = "a str, a sequence of them or embeddings"
            raise TypeError(f"stream: prompts must be {expected}, got {type(prompts).__name__}")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self.text_encoder.encode(prompts).to(self.device)

    def _given_latents(self, given: Tensor, batch: int) -> Tensor:
        """first_frames as normalised latents [batch, F, C, h, w], whole chunks."""
        channels, config = self.student.config["in_channels"], self.student.config
        if given.dim() != 5 or len(given) not in (1, batch):
            expected = f"[{batch} or 1, T, 3, H, W] or [{batch} or 1, F, {channels}, h, w]"
            raise ValueError(f"stream: first_frames must be {expected}, got {list(given.shape)}")
        if given.shape[2] == 3 and channels != 3:
            if self.vae is None:
                raise ValueError("stream: first_frames must be latents, for this Sampler has no vae")
            check_range(given, "stream: first_frames", finite=True)
            self.use(self.vae)
            given = self.vae.encode(given)
        elif given.shape[2] != channels:
            raise ValueError(f"stream: first_frames must have 3 or {channels} channels, got {given.shape[2]}")
        first, later = config["first_chunk_frames"] or config["frames_per_chunk"], config["frames_per_chunk"]
        frames = given.shape[1]
        if frames < first or (frames - first) % later:
            pixels = ""
            if self.vae is not None:
                pixels = f" (pixel frames: {self.vae.frames(first)}, {self.vae.frames(first + later)}, ...)"
            expected = f"whole chunks, {first}, {first + later}, ... latent frames{pixels}"
            raise ValueError(f"stream: first_frames must be {expected}, got {frames} latent frames")
        return given.to(self.device, torch.float32).expand(batch, -1, -1, -1, -1)


class Stream(Iterator[Chunk]):
    """A video being made. Iterating makes chunks; memory does not grow with them.

    `timings` sums up what the stream did so far. `switch` changes the prompts from the next chunk on.
    """

    def __init__(
        self,
        sampler: Sampler,
        embeds: Tensor,
        noise: StreamNoise,
        chunks: int | None,
        given: Tensor | None,
        size: tuple[int, int],
        started: float,
    ) -> None:
        self.timings = StreamTimings()
        self.index = 0
        self._sampler = sampler
        self._student = sampler.student
        self._device = sampler.device
        self._noise = noise
        self._chunks_left = chunks
        sampler.use(self._student)
        self._text = self._student.encode_text(embeds)
        self._batch = len(embeds)
        self._shape = (self._student.config["in_channels"], *size)
        self._decoder = None if sampler.decoder is None else sampler.decoder.stream_decoder(self._batch)
        self._times: dict[float, TimeContext] = {}  # by timestep: every chunk has the same ones
        self._joined_times: dict[int, TimeContext] = {}  # of merged passes, by the first chunk's frames
        self._uncommitted: Tensor | None = None  # the last chunk's x0, until its clean pass
        self._cache_seconds = 0.0  # of clean passes since the last chunk
        max_frames = None
        if chunks is not None:
            config = self._student.config
            later = config["frames_per_chunk"]
            before = (config["first_chunk_frames"] or later) - later if given is None else given.shape[1]
            max_frames = before + chunks * later
        self.cache = self._student.new_cache(self._batch, *size, max_frames=max_frames)
        self._held = HeldChunks(self.cache)
        self._graphs = PassGraphs(self._student, self.cache, self._text) if sampler.cuda_graph else None
        self._merges = self._whether_to_merge(sampler.merge_passes)
        self.timings.text = self._since(started)
        if given is not None:
            self._go_on_from(given)
        self.timings.total = self._since(started)

    def __iter__(self) -> Stream:
        return self

    @torch.no_grad()
    def __next__(self) -> Chunk:
        if self._chunks_left == 0:
            raise StopIteration
        start = time.perf_counter()
        if self._uncommitted is not None and not (self._merges and self.cache.keeps_last):
            self._leave_in_cache(self._uncommitted, self.index - 1)
        denoise_start = time.perf_counter()
        latents = self._denoise()
        denoise = self._since(denoise_start)
        decode_start = time.perf_counter()
        frames = self._decode(latents)
        decode = self._since(decode_start)
        self._uncommitted = latents
        self._held.add(self.index, latents)
        if self._chunks_left is not None:
            self._chunks_left -= 1

        total = self.timings
        total.denoise += denoise
        total.decode += decode
        total.total += self._since(start)
        total.chunks += 1
        total.frames += latents.shape[1] if frames is None else frames.shape[1]
        if total.chunks == 1:
            total.first_frame = total.total
        timings = ChunkTimings(denoise, self._cache_seconds, decode, total.total)
        self._cache_seconds = 0.0
        chunk = Chunk(self.index, latents, frames, timings)
        self.index += 1
        return chunk

    @torch.no_grad()
    def switch(self, prompts: str | Sequence[str] | Tensor, *, recache: bool = False) -> None:
        """Other prompts, as many, from the next chunk on: the picture goes on, its text changes.

        recache: compute what the window holds anew under them, a pass a chunk, or ValueError: `HeldChunks`.
        """
        held = self._held.chunks() if recache else []
        embeds = self._sampler.embed(prompts)
        if len(embeds) != self._batch:
            raise ValueError(f"switch: prompts must be {self._batch}, as the stream's, got {len(embeds)}")
        self._sampler.use(self._student)
        text = self._student.encode_text(embeds)
        if self._graphs is None:
            self._text = text
        else:
            self._graphs.switch(text)
        if held:
            last = None if self._uncommitted is None else held.pop()[1]  # its pass is to come in any case
            self.cache.reset()
            for index, latents in held:
                self._leave_in_cache(latents, index)
            self._uncommitted = last

    def _denoise(self) -> Tensor:
        """The next chunk's x0 [B, f, C, h, w]. Of the cache only its own slot is written, and the last
        one's by a merged pass.
        """
        self._sampler.use(self._student)
        clean, cache = self._uncommitted, self.cache
        if clean is None:
            cache.begin_chunk()
        shape = (cache.frames if clean is None else cache.frames_per_chunk, *self._shape)
        schedule, steps = self._sampler.schedule, self._sampler.steps
        x = self._noise.draw(self.index, 0, shape, self._device)
        for step, t in enumerate(steps):
            if step > 0:
                eps = self._noise.draw(self.index, step, shape, self._device)
                x = schedule.add_noise(x, eps, schedule.sigma(t))
            v = self._run(x, t) if clean is None or step > 0 else self._run_merged(clean, x, t)
            x = schedule.x0_from_v(x, v, schedule.sigma(t))
        return x

    def _leave_in_cache(self, latents: Tensor, index: int) -> None:
        """The clean pass over finished chunk `index`, whose keys and values later chunks see."""
        start = time.perf_counter()
        self._sampler.use(self._student)
        self.cache.begin_chunk()
        self._run(self._as_context(latents, index), self._sampler.context_noise)
        self.cache.commit()
        self._uncommitted = None
        seconds = self._since(start)
        self._cache_seconds += seconds
        self.timings.cache += seconds

    def _as_context(self, latents: Tensor, index: int) -> Tensor:
        """x0 of chunk `index`, as noisy as later chunks are to see it."""
        t, schedule = self._sampler.context_noise, self._sampler.schedule
        if t == 0:
            return latents
        eps = self._noise.draw(index, len(self._sampler.steps), latents.shape[1:], self._device)
        return schedule.add_noise(latents, eps, schedule.sigma(t))

    def _go_on_from(self, given: Tensor) -> None:
        """Show given latents [B, F, C, h, w] to the cache, chunk by chunk, and to the decoder."""
        rest = given
        while rest.shape[1]:
            chunk, rest = rest[:, : self.cache.frames], rest[:, self.cache.frames :]
            self._leave_in_cache(chunk, self.index)
            self._held.add(self.index, chunk)
            self.index += 1
        start = time.perf_counter()
        for frame in given.split(1, dim=1):
            self._decode(frame)  # for the decoder's caches: what follows is seamless
        self.timings.decode = self._since(start)

    def _decode(self, latents: Tensor) -> Tensor | None:
        if self._decoder is None:
            return None
        self._sampler.use(self._decoder.vae)
        return self._decoder.decode(latents)

    def _run(self, x: Tensor, t: float) -> Tensor:
        if self._graphs is not None:
            return self._graphs.run(x, t)
        return self._student.forward_chunk(x, self._time(t), self._text, self.cache, write=True)

    def _run_merged(self, clean: Tensor, x: Tensor, t: float) -> Tensor:
        """The clean pass of the last chunk and the pass over x, the next one."""
        length = clean.shape[1]
        if length not in self._joined_times:
            context = self._time(self._sampler.context_noise)
            self._joined_times[length] = context.beside(length, self._time(t), x.shape[1])
        clean = self._as_context(clean, self.index - 1)
        both = self._joined_times[length]
        return self._student.forward_chunk(x, both, self._text, self.cache, clean=clean)

    def _time(self, t: float) -> TimeContext:
        if t not in self._times:
            timestep = torch.full((self._batch,), float(t), device=self._device)
            self._times[t] = self._student.encode_time(timestep)
        return self._times[t]

    def _whether_to_merge(self, wanted: bool | None) -> bool:
        cache = self.cache
        if wanted and not cache.keeps_last:
            expected = "a student whose window keeps a chunk beside the next one"
            raise ValueError(f"stream: merge_passes needs {expected}, got {cache.window_frames} frames")
        if wanted is not None:
            return wanted
        tokens = self._batch * cache.frames_per_chunk * cache.tokens_per_frame
        return self._device.type == "cpu" and tokens <= _FEW_TOKENS

    def _since(self, start: float) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start


def _factors(model: VideoAutoencoder) -> tuple[int, int]:
    return model.spatial_factor, model.temporal_factor
