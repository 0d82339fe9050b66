"""``stream-r1 sample``: a stream into mp4 files, frame by frame."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stream_r1.commands.console import make_console
from stream_r1.commands.outputs import check_files, check_folder
from stream_r1.disk.whole import written
from stream_r1.messages import shown
from stream_r1.models.sequence import SequenceParallel
from stream_r1.models.text import UMT5Encoder, check_prompt
from stream_r1.recipe import locate
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.sampling.start import read_start
from stream_r1.sampling.stream import Stream
from stream_r1.sampling.video import VideoWriter, check_side, contact_sheet

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHEET_FRAMES = 240  # kept in memory for the contact sheet, however long the stream


@dataclass(frozen=True)
class Output:
    """Where a stream goes, and how large."""

    path: Path
    scale: int = 1
    sheet: bool = False

    @property
    def picture(self) -> Path:
        """The contact sheet."""
        return self.path.with_suffix(".png")

    def files(self, count: int) -> list[Path]:
        """One mp4 a prompt."""
        if self.path.suffix != ".mp4":
            raise ValueError(f"--out: expected a path that ends in .mp4, got {self.path}")
        if count == 1:
            return [self.path]
        return [self.path.with_stem(f"{self.path.stem}-{index}") for index in range(count)]


@dataclass(frozen=True)
class ModelChoice:
    """What streams: arguments of `StreamR1Pipeline.from_pretrained`, as they are typed."""

    folder: str
    checkpoint: Path | None = None
    network: str | None = None
    adapter: Path | None = None
    preset: str | None = None
    decoder: str | None = None
    dtype: str = "auto"
    vae_dtype: str = "auto"
    device: str = "auto"
    vae_device: str | None = None
    text_device: str | None = None
    offload: bool = False
    text_cache: Path | None = None
    cuda_graph: bool = False
    quantize: str | None = None
    cache_dtype: str = "auto"

    def files(self) -> dict[str, Path | None]:
        """What is read, by option."""
        decoder = None if self.decoder is None else Path(self.decoder.partition(":")[2])
        named = {"--checkpoint": self.checkpoint, "--adapter": self.adapter, "--decoder": decoder}
        return {"--models": locate(self.folder), **named}

    def load(self, size: tuple[int, int] | None, keep_text_encoder: bool = False) -> StreamR1Pipeline:
        device = _device("--device", self.device)
        return StreamR1Pipeline.from_pretrained(
            locate(self.folder),
            self.checkpoint,
            self.preset,
            network=self.network,
            adapter=self.adapter,
            decoder=self.decoder,
            size=size,
            text_cache=self.text_cache or Path.home() / ".cache" / "stream-r1" / "prompts",
            keep_text_encoder=keep_text_encoder,
            dtype=_dtype("--dtype", self.dtype, device),
            vae_dtype=None if self.vae_dtype == "auto" else _dtype("--vae-dtype", self.vae_dtype, device),
            device=device,
            vae_device=self.vae_device and _device("--vae-device", self.vae_device),
            text_device=self.text_device and _device("--text-device", self.text_device),
            offload=self.offload,
            cuda_graph=self.cuda_graph,
            quantize=self.quantize,
            cache_dtype=_cache_dtype(self.cache_dtype),
        )


def run(
    prompts: list[str],
    output: Output,
    models: ModelChoice,
    *,
    size: str | None,
    seconds: float | None,
    seed: int,
    start: Path | None,
    processes: int = 1,
) -> None:
    """Stream `seconds` (None: until Ctrl-C) of every prompt, and say how fast it was.

    processes: that torchrun started, which share the student's passes; the first talks and writes.
    """
    if processes > 1 and seconds is None:
        raise ValueError("--forever: expected --seconds with --sequence-parallel: processes end together")
    with _sharing(processes, models) as (sequence, models):
        _run(prompts, output, models, sequence, size=size, seconds=seconds, seed=seed, start=start)


@contextmanager
def _sharing(processes: int, models: ModelChoice) -> Iterator[tuple[SequenceParallel | None, ModelChoice]]:
    """The group of this process, and its models on the device that it has there."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != started:
        raise ValueError(
            "--sequence-parallel: expected the number of processes that torchrun started (--nproc-per-node), "
            f"{started}, got {processes}"
        )
    if processes == 1:
        yield None, models
        return
    from stream_r1.distill.ranks import join
    from stream_r1.distill.run_settings import DistributedSettings

    backends = {"auto": "auto", "cpu": "gloo", "cuda": "nccl"}
    if models.device not in backends:
        raise ValueError(
            "--device: expected auto, cpu or cuda (a GPU a process) with --sequence-parallel, "
            f"got {models.device}"
        )
    settings = DistributedSettings.model_validate({"sequence": processes, "backend": backends[models.device]})
    with join(settings) as ranks:
        yield SequenceParallel(), replace(models, device=str(ranks.device))


def _run(
    prompts: list[str],
    output: Output,
    models: ModelChoice,
    sequence: SequenceParallel | None,
    *,
    size: str | None,
    seconds: float | None,
    seed: int,
    start: Path | None,
) -> None:
    writes = sequence is None or sequence.rank == 0
    console = make_console(lasting=True, quiet=not writes)
    wanted = None if size is None else as_size(size)
    if wanted is not None:
        check_side("--scale", *wanted, output.scale)
    for prompt in prompts:
        check_prompt(prompt, "prompts")
    if start is not None and not start.is_file():
        raise FileNotFoundError(f"--start: no such file: {start}")
    files = output.files(len(prompts))
    outputs = [*files, output.picture] if output.sheet else files
    check_files("--out", outputs, {"--start": start, **models.files()})
    if models.text_cache is not None:
        check_folder("--text-cache", models.text_cache, {})
    with console.status("loading the models"):
        pipeline = models.load(wanted)
        if sequence is not None:
            pipeline.enable_sequence_parallel(sequence)
        check_side("--scale", *pipeline.size, output.scale)
        encoder = pipeline.text_encoder
        if isinstance(encoder, UMT5Encoder):
            encoder.encode(prompts)  # reads gigabytes; the stream asks again and finds them remembered
    chunks = None
    if seconds is not None:
        chunks = pipeline.chunks(round(seconds * pipeline.fps), goes_on=start is not None)
    given = None
    if start is not None:
        found = read_start(start, pipeline)
        console.print(f"{start}: continues from {found.meaning}", soft_wrap=True, highlight=False)
        given = found.frames
    stream = pipeline.stream(prompts, seed, chunks, first_frames=given)
    if not writes:
        for _ in stream:
            pass
        return
    stopped = False
    frames: list[Tensor] = []
    with ExitStack() as stack:
        writers = [stack.enter_context(VideoWriter(file, pipeline.fps, scale=output.scale)) for file in files]
        status = stack.enter_context(console.status("streaming; Ctrl-C ends it"))
        try:
            _write(stream, pipeline.fps, writers, frames, status.update)
        except KeyboardInterrupt:
            stopped = True
    timings = stream.timings
    for file in files:
        console.print(str(file), soft_wrap=True, highlight=False)
    if output.sheet and frames:
        sheet = contact_sheet(list(torch.cat(frames, 1)), labels=prompts, scale=2, enlarge="bicubic")
        with written(output.picture) as place:
            sheet.save(place)
        console.print(str(output.picture), soft_wrap=True, highlight=False)
    console.print(
        f"{timings.frames / pipeline.fps:.1f} s of video, {timings.fps:.1f} frames a second, "
        f"first frame after {1000 * timings.first_frame:.0f} ms",
        highlight=False,
    )
    if stopped and seconds is not None:
        sys.exit(130)


def _write(
    stream: Stream,
    fps: float,
    writers: list[VideoWriter],
    frames: list[Tensor],
    tell: Callable[[str], object],
) -> None:
    kept = 0
    for chunk in stream.ahead():
        pixels = chunk.to_uint8()
        for writer, video in zip(writers, pixels, strict=True):
            writer.write(video)
        if kept < _SHEET_FRAMES:
            frames.append(pixels)
            kept += pixels.shape[1]
        tell(
            f"{stream.timings.frames / fps:.1f} s at {stream.timings.fps:.1f} frames a second; Ctrl-C ends it"
        )


def as_size(text: str) -> tuple[int, int]:
    """Height and width of text such as 64x112; ValueError for another."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        raise ValueError(f"--size: expected height x width as 64x112, got {shown(text)}")
    return int(found[1]), int(found[2])


def _device(option: str, name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{option}: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{option}: expected a device of the {torch.cuda.device_count()} GPUs here, got {name}"
        )
    return device


def _cache_dtype(name: str) -> torch.dtype | None:
    if name not in ("auto", "fp8"):
        raise ValueError(f"--cache-dtype: expected auto or fp8, got {name!r}")
    return torch.float8_e4m3fn if name == "fp8" else None


def _dtype(option: str, name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ValueError(f"{option}: expected auto, {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]
