"""From a folder of weights to a stream, in the manner of diffusers' pipelines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from stream_r1.devices import decoding_dtype
from stream_r1.models.autoencoder import VideoAutoencoder
from stream_r1.models.autoencoders import load_autoencoder
from stream_r1.models.checkpoints import load_student
from stream_r1.models.fp8 import refuse_quantization
from stream_r1.models.offload import ModelOffload
from stream_r1.models.patches import patch_grid
from stream_r1.models.sequence import SequenceParallel
from stream_r1.models.taehv import TinyVAE
from stream_r1.models.text import MiniLMEncoder, TextEncoder, TransformersEncoder, UMT5Encoder
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.models.wan import video_of
from stream_r1.models.weight_files import read_config
from stream_r1.sampling.chunk import StreamTimings
from stream_r1.sampling.folders import find_parts
from stream_r1.sampling.presets import DEFAULT_PRESET, PRESETS, choose_preset
from stream_r1.sampling.sampler import Sampler
from stream_r1.sampling.stream import Stream
from stream_r1.schedule import FlowSchedule

OutputType = Literal["pt", "np", "pil"]


@dataclass(frozen=True)
class VideoOutput:
    """What a call of the pipeline gives.

    `frames` by output type: "pt" a tensor [B, T, 3, H, W], "np" an array [B, T, H, W, 3], both float32 in
    [0, 1], "pil" B lists of T pictures.
    """

    frames: Any
    timings: StreamTimings


class StreamR1Pipeline:
    """A student with everything it needs to turn a prompt into a stream of frames.

    Usually made by `from_pretrained`.

    Args:
        student, vae, text_encoder: the models, in eval mode. They may be on several devices: what goes from
            one to another is moved.
        size: height and width of the video in pixels.
        fps: frames a second that the student was trained at.
        steps, shift: of the schedule, see `Sampler` and `FlowSchedule`.
        decoder: decodes instead of the VAE.
        cuda_graph, fuse_cache_update, cache_dtype: see `Sampler`.

    Raises:
        ValueError: a size the VAE or the student's patches do not divide, or parts that do not fit.
    """

    def __init__(
        self,
        student: CausalWanTransformer,
        vae: VideoAutoencoder,
        text_encoder: TextEncoder,
        *,
        size: tuple[int, int],
        fps: float,
        steps: Sequence[float] = (1000, 750, 500, 250),
        shift: float = 5.0,
        decoder: VideoAutoencoder | None = None,
        cuda_graph: bool = False,
        fuse_cache_update: bool | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        if not fps > 0:
            raise ValueError(f"StreamR1Pipeline: fps must be positive, got {fps}")
        height, width = size
        _, patch_rows, patch_columns = student.config["patch_size"]
        rows, columns = vae.spatial_factor * patch_rows, vae.spatial_factor * patch_columns
        if height < rows or width < columns or height % rows or width % columns:
            expected = f"positive multiples of ({rows}, {columns})"
            raise ValueError(f"StreamR1Pipeline: size must be {expected}, got ({height}, {width})")
        _, *latent_size = vae.latent_shape(1, height, width)
        self.student = student
        self.vae = vae
        self.text_encoder = text_encoder
        self.size = (height, width)
        self.fps = fps
        self.sampler = Sampler(
            student,
            vae,
            FlowSchedule(shift),
            steps,
            text_encoder=text_encoder,
            decoder=decoder,
            latent_size=(latent_size[0], latent_size[1]),
            cuda_graph=cuda_graph,
            fuse_cache_update=fuse_cache_update,
            cache_dtype=cache_dtype,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | Path,
        checkpoint: str | Path | None = None,
        preset: str | None = None,
        *,
        network: str | None = None,
        adapter: str | Path | None = None,
        decoder: str | Path | None = None,
        size: tuple[int, int] | None = None,
        fps: float | None = None,
        text_encoder: TextEncoder | None = None,
        text_cache: str | Path | None = None,
        keep_text_encoder: bool = True,
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        vae_device: str | torch.device | None = None,
        text_device: str | torch.device | None = None,
        offload: bool = False,
        cuda_graph: bool = False,
        fuse_cache_update: bool | None = None,
        quantize: str | None = None,
        cache_dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> StreamR1Pipeline:
        """Load a pipeline.

        Two layouts are known: diffusers' (`transformer/ vae/ text_encoder/ tokenizer/`; a `scheduler/` is not
        read: a few-step student's schedule is part of its training) and this project's small assets
        (`student/ vae/`, prompts through MiniLM).

        Args:
            folder_or_repo: a local folder, or a repository of the Hugging Face hub, which is downloaded.
            checkpoint: the student's weights where they are not the folder's: any format of `load_student`.
            preset: how a published student streams: "stream-r1", "reward-forcing", "self-forcing". None: as
                the configuration beside its weights says; Wan's own, which says nothing: "stream-r1".
            network: which of `generator_ema`, `generator` in a checkpoint of several; None: the average if
                there is one.
            adapter: a LoRA adapter's folder, merged into the student.
            decoder: "taehv:PATH": TAEHV's tiny decoder decodes, from its file `taew2_1.pth`; the VAE only
                encodes given frames. None: the VAE decodes.
            size: height and width in pixels; None: 480 x 832, Wan 2.2 5B 704 x 1280, small assets 64 x 112.
            fps: None: 16, Wan 2.2 5B and small assets 24.
            text_encoder: instead of the folder's.
            text_cache: a folder to keep UMT5's embeddings in; a prompt that is kept does not load UMT5.
            keep_text_encoder: whether UMT5 stays in memory after prompts are encoded.
            dtype: of student and UMT5.
            vae_dtype: of the VAE and the decoder; None: bfloat16 on a GPU that has it, else float32;
                small assets on a CPU that multiplies bfloat16 take that, too: half the time, and less error
                than 8 bits a colour have.
            device: of student, decoder and, unless told otherwise, the rest.
            vae_device: None: `device`, or the CPU where a decoder leaves the VAE idle.
            text_device: None: `device`.
            offload: keep all models in the CPU's memory and on `device` the one at work alone, see
                `enable_model_cpu_offload`.
            cuda_graph: replay the student's passes as CUDA graphs, see `Sampler`.
            fuse_cache_update: fuse a chunk's cache-update pass with the next one's first pass, see `Sampler`.
            quantize: "fp8": the student's blocks multiply in FP8, on GPUs that have it (compute capability
                8.9 or later), in bfloat16 otherwise; "fp8-emulated": the same numbers on any machine, to
                measure quality. See `stream_r1.models.fp8`.
            cache_dtype: of the streams' keys and values, see `Sampler`.
            settings: of `CausalWanTransformer`, over those of the preset: `window_frames=12`, ...

        Raises:
            FileNotFoundError: parts that are missing, by name.
            ValueError: an unknown preset, parts that do not fit, `offload` with a setting it excludes,
                `quantize` on a device or in a dtype that it can't have.
            FileError: weights that can't be used, see `load_student`.
            NotImplementedError: a folder of a Wan model with parts that are not supported, by name.
        """
        for name, asked in (("dtype", dtype), ("vae_dtype", vae_dtype or dtype)):
            if not isinstance(asked, torch.dtype):
                expected = "a torch.dtype, as torch.bfloat16"
                raise TypeError(f"from_pretrained: {name} must be {expected}, got {asked!r}")
        if size is not None and (isinstance(size, str) or len(size) != 2):
            raise ValueError(f"from_pretrained: size must be (height, width), got {size!r}")
        if quantize is not None:
            refuse_quantization("from_pretrained", quantize, dtype, device)
        choose_preset(preset, {})  # a misspelt one is refused before anything is downloaded
        if offload:
            for name, value in (("vae_device", vae_device), ("text_device", text_device)):
                if value is not None:
                    expected = f"{name} must be None with offload, which moves every model"
                    raise ValueError(f"from_pretrained: {expected}, got {value}")
            _refuse_offload("from_pretrained", device, cuda_graph)
        at = "cpu" if offload else device  # where models are loaded, unless told otherwise
        decoder_file = None if decoder is None else _decoder_file(str(decoder))
        parts = find_parts(folder_or_repo, checkpoint, with_text=text_encoder is None)
        source = parts.student if checkpoint is None else Path(checkpoint)
        beside = read_config(parts.student) or {}
        chosen = choose_preset(preset, read_config(source) or beside)
        schedule = chosen or PRESETS[DEFAULT_PRESET]
        student = load_student(
            source,
            network=network,
            config=beside,
            adapter=adapter,
            dtype=dtype,
            device=at,
            quantize=quantize,
            runs_on=device,
            **((chosen.student if chosen else {}) | settings),
        )
        if text_encoder is None:
            length, text_device = student.config["text_len"], text_device or at
            if parts.small:
                text_encoder = MiniLMEncoder(length, text_device)
            else:
                text_encoder = UMT5Encoder(
                    parts.folder,
                    length,
                    dtype,
                    text_device,
                    cache=text_cache,
                    keep_loaded=keep_text_encoder,
                )
        vae_device = vae_device or (device if decoder_file is None else "cpu")
        works_on = device if offload else vae_device
        tiny = None
        if decoder_file is not None:
            tiny_dtype = vae_dtype or decoding_dtype(device, small=parts.small)
            tiny = TinyVAE.from_pretrained(decoder_file, dtype=tiny_dtype, device=at)
        vae_dtype = vae_dtype or decoding_dtype(works_on, small=parts.small)
        vae = load_autoencoder(parts.vae, dtype=vae_dtype, device=at if offload else vae_device)
        usual_size, usual_fps = ((64, 112), 24.0) if parts.small else video_of(vae.spatial_factor)
        pipeline = cls(
            student.requires_grad_(False),
            vae,
            text_encoder,
            size=size or usual_size,
            fps=usual_fps if fps is None else fps,
            decoder=tiny,
            cuda_graph=cuda_graph,
            fuse_cache_update=fuse_cache_update,
            cache_dtype=cache_dtype,
            steps=schedule.steps,
            shift=schedule.shift,
        )
        if offload:
            pipeline.enable_model_cpu_offload(device)
        return pipeline

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Offload idle models to the CPU, as diffusers' method of this name.

        The text encoder is on the device while it encodes, then the student, and the VAE or the decoder while
        it decodes a chunk; keys and values stay there. A stream gives the same frames, but takes longer: the
        weights of student and decoder are copied for each chunk. Call it before streams begin. A text encoder
        that is not of this package stays where it is.

        Raises:
            ValueError: the device is the CPU, or the passes are CUDA graphs.
        """
        _refuse_offload("enable_model_cpu_offload", device, self.sampler.cuda_graph)
        offload = ModelOffload(device, self.student, self.vae)
        if self.sampler.decoder is not None:
            offload.add(self.sampler.decoder)  # the VAE again, or a decoder of its own
        if isinstance(self.text_encoder, TransformersEncoder):
            self.text_encoder.enable_offload(offload)
        self.sampler.offload = offload

    def enable_sequence_parallel(self, sequence: SequenceParallel) -> None:
        """Share the student's passes with other processes, each with a pipeline of the same models.

        All of them make the same streams, of the same prompts and seeds, chunk after chunk; the first decodes
        them, chunks of the others have latents alone. Call it before streams begin.

        Raises:
            ValueError: heads or frames that the processes can't share evenly, idle models that are offloaded,
                or passes that are CUDA graphs.
        """
        where, sampler = "enable_sequence_parallel", self.sampler
        for name, wanted in (("offload", sampler.offload is not None), ("cuda_graph", sampler.cuda_graph)):
            if wanted:
                raise ValueError(f"{where}: {name} must be False where processes share passes, got True")
        assert sampler.latent_size is not None
        patch = self.student.patch_embedding.kernel_size
        sequence.divide(where, *patch_grid(where, *sampler.latent_size, patch))
        self.student.enable_sequence_parallel(sequence)
        if sequence.rank > 0:
            sampler.decoder = None

    def stream(
        self,
        prompt: str | Sequence[str] | Tensor,
        seed: int | Sequence[int] = 0,
        chunks: int | None = None,
        *,
        first_frames: Tensor | None = None,
    ) -> Stream:
        """Frames as they are made, indefinitely unless `chunks` are given: an iterator of `Chunk`.

        Args:
            prompt: one, or a batch.
            seed, chunks, first_frames: as for `Sampler.stream`; prompts may be embeddings, too.
        """
        return self.sampler.stream(prompt, seed=seed, chunks=chunks, first_frames=first_frames)

    def __call__(
        self,
        prompt: str | Sequence[str] | Tensor,
        seconds: float = 5.0,
        seed: int | Sequence[int] = 0,
        *,
        num_frames: int | None = None,
        first_frames: Tensor | None = None,
        output_type: OutputType = "pt",
    ) -> VideoOutput:
        """Whole videos, one a prompt, of round(seconds * fps) frames on the CPU.

        With `first_frames` they are what follows them. For long videos iterate over `stream` instead.

        Args:
            prompt, seed, first_frames: as for `stream`.
            seconds: length.
            num_frames: the length in frames instead.
            output_type: see `VideoOutput`.
        """
        if output_type not in ("pt", "np", "pil"):
            raise ValueError(f"StreamR1Pipeline: output_type must be pt, np or pil, got {output_type!r}")
        if not isinstance(seconds, int | float):
            raise TypeError(f"StreamR1Pipeline: seconds must be a number, got {seconds!r}")
        frames = round(seconds * self.fps) if num_frames is None else num_frames
        if frames < 1:
            expected = f"seconds must be at least 1 / {self.fps:g} and num_frames at least 1"
            raise ValueError(f"StreamR1Pipeline: {expected}, got {seconds} and {num_frames}")
        chunks = self.chunks(frames, goes_on=first_frames is not None)
        stream = self.stream(prompt, seed, chunks, first_frames=first_frames)
        pictures = output_type == "pil"  # of 8 bits a colour
        made = [
            chunk.to_uint8() if pictures else chunk.frames.cpu()
            for chunk in stream.ahead()
            if chunk.frames is not None
        ]
        return VideoOutput(_as_type(torch.cat(made, dim=1)[:, :frames], output_type), stream.timings)

    def chunks(self, frames: int, *, goes_on: bool = False) -> int:
        """Chunks that make at least so many pixel frames.

        A video's first chunk makes fewer than the others, for its first latent frame makes one pixel frame; a
        stream that continues from given frames has only others.
        """
        config = self.student.config
        each = config["frames_per_chunk"] * self.vae.temporal_factor
        if goes_on:
            return math.ceil(frames / each)
        first = self.vae.frames(config["first_chunk_frames"] or config["frames_per_chunk"])
        return 1 + math.ceil(max(0, frames - first) / each)


def _refuse_offload(where: str, device: str | torch.device, cuda_graph: bool) -> None:
    if torch.device(device).type == "cpu":
        raise ValueError(f"{where}: device must not be the CPU, where idle models wait, got {device}")
    if cuda_graph:
        raise ValueError(f"{where}: cuda_graph must be False with offload, whose weights move, got True")


def _decoder_file(decoder: str) -> Path:
    kind, _, path = decoder.partition(":")
    if kind != "taehv" or not path:
        raise ValueError(f"from_pretrained: decoder must be taehv:PATH or None, got {decoder!r}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"from_pretrained: no such file of the decoder: {path}")
    return Path(path)


def _as_type(video: Tensor, output_type: OutputType) -> Any:
    """[B, T, 3, H, W] as the type asked for; of uint8 for "pil", else float32."""
    if output_type == "pt":
        return video
    pictures = video.movedim(2, -1).numpy()
    if output_type == "np":
        return pictures
    return [[Image.fromarray(frame) for frame in frames] for frames in pictures]
