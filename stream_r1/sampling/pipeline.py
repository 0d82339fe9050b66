"""From a folder of weights to a stream, in the manner of diffusers' pipelines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from stream_r1.models.checkpoints import load_student
from stream_r1.models.text import MiniLMEncoder, TextEncoder, UMT5Encoder
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.models.vae import VideoVAE
from stream_r1.sampling.sampler import Sampler, Stream
from stream_r1.schedule import FlowSchedule


@dataclass(frozen=True)
class Preset:
    """How a published student streams: what its weights do not tell."""

    student: Mapping[str, Any] = field(default_factory=dict)  # settings of `CausalWanTransformer`
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0


_SINK_IN_WINDOW = MappingProxyType({"frames_per_chunk": 3, "window_frames": 9, "sink_frames": 3})

# Sources: Self Forcing (2506.08009), whose cache holds 21 frames; Reward Forcing (2512.04678); Stream-R1
# (2605.03849), which streams as Reward Forcing does.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "stream-r1": Preset(_SINK_IN_WINDOW | {"positions": "window", "sink_ema": 0.999}),
        "reward-forcing": Preset(_SINK_IN_WINDOW | {"positions": "window", "sink_ema": 0.999}),
        "self-forcing": Preset({"frames_per_chunk": 3, "window_frames": 21, "positions": "absolute"}),
    }
)

# Parts of diffusers folders of other Wan models, and what they would take.
_NOT_SUPPORTED = {
    "transformer_2": "a second expert transformer (Wan 2.2 A14B)",
    "image_encoder": "image conditioning (Wan I2V); start from given frames with first_frames instead",
}


class StreamR1Pipeline:
    """A student with everything it needs to turn a prompt into a stream of frames.

    Usually made by `from_pretrained`.

    Args:
        student, vae, text_encoder: the models, in eval mode, on one device.
        size: height and width of the video in pixels.
        fps: frames a second that the student was trained at.
        steps, shift: of the schedule, see `Sampler` and `FlowSchedule`.

    Raises:
        ValueError: a size the VAE or the student's patches do not divide, or parts that do not fit.
    """

    def __init__(
        self,
        student: CausalWanTransformer,
        vae: VideoVAE,
        text_encoder: TextEncoder,
        *,
        size: tuple[int, int],
        fps: float,
        steps: Sequence[float] = (1000, 750, 500, 250),
        shift: float = 5.0,
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
            latent_size=(latent_size[0], latent_size[1]),
        )

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | Path,
        checkpoint: str | Path | None = None,
        preset: str | None = None,
        *,
        size: tuple[int, int] | None = None,
        fps: float | None = None,
        text_encoder: TextEncoder | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **settings: Any,
    ) -> StreamR1Pipeline:
        """Load a pipeline.

        Two layouts are known: diffusers' (`transformer/ vae/ text_encoder/ tokenizer/`; a `scheduler/` is not
        read: a few-step student's schedule is part of its training) and this project's small assets
        (`student/ vae/`, prompts through MiniLM).

        Args:
            folder_or_repo: a local folder, or a repository of the Hugging Face hub, which is downloaded.
            checkpoint: the student's weights where they are not in the folder: any format of `load_student`.
            preset: how a published student streams: "stream-r1", "reward-forcing", "self-forcing". None: as
                the configuration beside its weights says.
            size: height and width in pixels; None: 480 x 832, small assets 64 x 112.
            fps: None: 16, small assets 24.
            text_encoder: instead of the folder's.
            dtype: of student and UMT5; the VAE stays in float32.
            device: where everything goes.
            settings: of `CausalWanTransformer`, over those of the preset: `window_frames=12`, ...

        Raises:
            FileNotFoundError: parts that are missing, by name.
            ValueError: an unknown preset, parts that do not fit.
            NotImplementedError: a folder of a Wan model with parts that are not supported, by name.
        """
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"from_pretrained: preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        chosen = Preset() if preset is None else PRESETS[preset]
        folder = _local_folder(folder_or_repo, with_student=checkpoint is None)
        small = (folder / "student").is_dir() and not (folder / "transformer").is_dir()
        student_folder = folder / ("student" if small else "transformer")
        _refuse_what_is_not_supported(folder)
        _require(folder, student_folder.name, checkpoint, has_text=small or text_encoder is not None)

        head_dim = 128
        if checkpoint is not None and (student_folder / "config.json").is_file():
            config = json.loads((student_folder / "config.json").read_text())
            head_dim = config.get("attention_head_dim", head_dim)
        student = load_student(
            student_folder if checkpoint is None else checkpoint,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            **{**chosen.student, **settings},
        )
        if text_encoder is None:
            length = student.config["text_len"]
            if small:
                text_encoder = MiniLMEncoder(length, device)
            else:
                text_encoder = UMT5Encoder(folder, length, dtype, device)
        return cls(
            student.requires_grad_(False),
            VideoVAE.from_pretrained(folder / "vae", device=device),
            text_encoder,
            size=size or ((64, 112) if small else (480, 832)),
            fps=fps or (24 if small else 16),
            steps=chosen.steps,
            shift=chosen.shift,
        )

    def stream(
        self,
        prompt: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        chunks: int | None = None,
        *,
        first_frames: Tensor | None = None,
    ) -> Stream:
        """Frames as they are made, for ever unless `chunks` are given: an iterator of `Chunk`.

        Args:
            prompt: one, or a batch.
            seed, chunks, first_frames: as for `Sampler.stream`.
        """
        return self.sampler.stream(prompt, seed=seed, chunks=chunks, first_frames=first_frames)

    def __call__(
        self,
        prompt: str | Sequence[str],
        seconds: float = 5.0,
        seed: int | Sequence[int] = 0,
        *,
        first_frames: Tensor | None = None,
    ) -> Tensor:
        """A whole video, [B, T, 3, H, W] float32 in [0, 1] on the CPU, with T = round(seconds * fps).

        With `first_frames` it is what follows them. For long videos iterate over `stream` instead.
        """
        frames = round(seconds * self.fps)
        if frames < 1:
            raise ValueError(f"StreamR1Pipeline: seconds must be at least 1 / {self.fps:g}, got {seconds}")
        config, factor = self.student.config, self.vae.temporal_factor
        first = 0
        if first_frames is None:  # a video's first latent frame makes one pixel frame
            first = self.vae.frames(config["first_chunk_frames"] or config["frames_per_chunk"])
        later = math.ceil(max(0, frames - first) / (factor * config["frames_per_chunk"]))
        chunks = self.stream(prompt, seed, later + (first > 0), first_frames=first_frames)
        made = [chunk.frames.cpu() for chunk in chunks if chunk.frames is not None]
        return torch.cat(made, dim=1)[:, :frames]


def _local_folder(folder_or_repo: str | Path, with_student: bool) -> Path:
    if Path(folder_or_repo).is_dir():
        return Path(folder_or_repo)
    name = str(folder_or_repo)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"from_pretrained: no such folder: {name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    parts = ["vae/*", "text_encoder/*", "tokenizer/*", "transformer/config.json", "model_index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=[*parts, *(["transformer/*"] * with_student)]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        expected = "a local folder or a repository of the hub that can be reached"
        raise FileNotFoundError(f"from_pretrained: expected {expected}, got {name}: {error}") from error


def _refuse_what_is_not_supported(folder: Path) -> None:
    for part, meaning in _NOT_SUPPORTED.items():
        if (folder / part).is_dir():
            raise NotImplementedError(f"from_pretrained: {folder} has {part}/: {meaning} is not supported")


def _require(folder: Path, student: str, checkpoint: str | Path | None, has_text: bool) -> None:
    """Everything that is missing, at once, before anything is loaded."""
    needed = ["vae/config.json"]
    if checkpoint is None:
        needed.append(f"{student}/config.json")
    elif not Path(checkpoint).exists():
        raise FileNotFoundError(f"from_pretrained: no such checkpoint: {checkpoint}")
    if not has_text:
        needed += ["text_encoder/config.json", "tokenizer"]
    missing = [part for part in needed if not (folder / part).exists()]
    if missing:
        raise FileNotFoundError(f"from_pretrained: {folder} lacks {', '.join(missing)}")
