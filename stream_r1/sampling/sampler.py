"""A student and what it needs to make streams: from prompts, seeds and given frames to a `Stream`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stream_r1.chunk_loop import ChunkLoop, StudentPasses
from stream_r1.clock import Moment
from stream_r1.models.autoencoder import VideoAutoencoder
from stream_r1.models.offload import ModelOffload
from stream_r1.models.text import TextEncoder
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.pixels import check_range
from stream_r1.sampling.decoding import ChunkDecoder, SideStream
from stream_r1.sampling.graphs import PassGraphs, refuse_graphs
from stream_r1.sampling.noise import StreamNoise
from stream_r1.sampling.stream import Prompts, Stream
from stream_r1.schedule import FlowSchedule
from stream_r1_kernels import ChunkCache

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
        fuse_cache_update: fuse a chunk's cache-update pass with the next chunk's first denoising pass, the
            same to rounding: True, False, or None where that is the faster, with few tokens a chunk on a CPU.
        cache_dtype: of keys and values; torch.float8_e4m3fn: half the memory of bfloat16, with a scale a
            token and head; None: that in which the student computes.

    `offload`, None at first, brings student, vae and decoder to the device when they work.

    Raises:
        ValueError: parts that do not fit each other, or CUDA graphs or fused passes of a student that can't
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
        fuse_cache_update: bool | None = None,
        cache_dtype: torch.dtype | None = None,
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
        if fuse_cache_update and cuda_graph:
            raise ValueError(
                "Sampler: fuse_cache_update must not be True with cuda_graph, whose passes are single"
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
        self.fuse_cache_update = fuse_cache_update
        self.cache_dtype = cache_dtype
        self.offload: ModelOffload | None = None
        self._side: SideStream | None = None

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
        prompts: Prompts,
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
            seed: same seed, same machine, same batch size: same latents, bit for bit, and the same pixels,
                unless cuDNN picks other convolutions on a GPU (`tuned_convolutions`). An int (prompts are
                told apart by their index) or one a prompt. The noise depends on seed, prompt index, chunk
                and pass alone.
            chunks: how many chunks to make after `first_frames`; None: indefinitely.
            first_frames: continue from these: pixels [B, T, 3, H, W] in [0, 1] (needs the VAE) or normalised
                latents [B, F, C, h, w], whole chunks; they are not yielded again. Batch 1 serves all prompts.
            latent_size: (h, w); None: that of `first_frames`, else the sampler's.
            first_index: index of the first prompt where a list is sampled in several batches.

        Raises:
            ValueError, TypeError: what does not fit, before any work but encoding.
        """
        asked = Moment(self.device)
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
            height, width = size
            noise = StreamNoise(seed, len(embeds), first_index)
            self.use(self.student)
            loop = self._loop(embeds, noise, self._max_frames(chunks, given), (height, width))
            return Stream(
                loop,
                noise,
                self.chunk_decoder(len(embeds)),
                (height, width),
                chunks=chunks,
                given=given,
                embed=self.embed,
                use=self.use,
                device=self.device,
                asked=asked,
            )

    def chunk_decoder(self, batch: int) -> ChunkDecoder | None:
        """A new one, for a stream; None: latents only."""
        if self.decoder is None:
            return None
        return ChunkDecoder(self.decoder.stream_decoder(batch), self.device, self._side_stream(), self.use)

    def _side_stream(self) -> SideStream | None:
        """For decoding beside the student, where both stay on one GPU; one for all streams."""
        assert self.decoder is not None
        if self.offload is not None or self.device.type != "cuda" or self.decoder.device != self.device:
            return None
        if self._side is None:
            self._side = SideStream(self.device)
        return self._side

    def _loop(
        self, embeds: Tensor, noise: StreamNoise, max_frames: int | None, size: tuple[int, int]
    ) -> ChunkLoop:
        student = self.student
        cache = student.new_cache(len(embeds), *size, max_frames=max_frames, dtype=self.cache_dtype)
        passes = PassGraphs if self.cuda_graph else StudentPasses
        return ChunkLoop(
            passes(student, cache, student.encode_text(embeds)),
            schedule=self.schedule,
            steps=self.steps,
            renoise=noise.like,
            context_noise=self.context_noise,
            fuse=self._fuses(cache),
        )

    def _max_frames(self, chunks: int | None, given: Tensor | None) -> int | None:
        """Latent frames of the whole video; None: any number."""
        if chunks is None:
            return None
        later = self.student.config["frames_per_chunk"]
        first = self.student.config["first_chunk_frames"] or later
        return (first - later if given is None else given.shape[1]) + chunks * later

    def _fuses(self, cache: ChunkCache) -> bool:
        wanted = self.fuse_cache_update
        if wanted and not cache.keeps_last:
            expected = "a student whose window keeps a chunk beside the next one"
            raise ValueError(f"stream: fuse_cache_update needs {expected}, got {cache.window_frames} frames")
        if wanted is not None:
            return wanted
        tokens = cache.batch * cache.frames_per_chunk * cache.tokens_per_frame
        return self.device.type == "cpu" and tokens <= _FEW_TOKENS

    def embed(self, prompts: Prompts) -> Tensor:
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


def _factors(model: VideoAutoencoder) -> tuple[int, int]:
    return model.spatial_factor, model.temporal_factor
