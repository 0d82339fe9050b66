"""From a trainer's events to records, and from records to every writer."""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from stream_r1.config import SettingsError
from stream_r1.distill.events import Event, Preview, StepDone, summarise
from stream_r1.distill.loop import TrainingLoop
from stream_r1.distill.noise import global_streams_kept
from stream_r1.maps import frame_strip, heat_strip, unit_range
from stream_r1.messages import first_line
from stream_r1.pixels import check_range, to_uint8
from stream_r1.watch.settings import WatchSettings
from stream_r1.watch.writers import (
    EVENTS,
    FolderWriter,
    Picture,
    TensorBoardWriter,
    WandbWriter,
    Writer,
)

_GIB = 2**30
_MAP_COLUMNS = 7  # frames that maps are shown over, at most
_MAP_WIDTH = 160  # pixels of a frame there, at least where the video has them


class Watcher:
    """Records a run: passes its numbers, sample videos and maps to the configured writers.

    On the first rank; the others only help to sample where the student is in parts. What it does never
    changes the training: randomness is put back as it was, and what goes wrong is a warning. Only when it is
    made does it refuse.

    Args:
        trainer: resumed, if it is to be: what was recorded of steps that it has not done is removed.
        settings: see `WatchSettings`.
        folder: the run's; is made.
        config: the recipe, to be shown beside its run.
        warn: called with what goes wrong, a sentence each; None: `warnings.warn`.

    Raises:
        SettingsError: a package that is missing, or wandb refuses.
        OSError: the folder can't be written. What lies there from before and is damaged refuses nothing.
    """

    def __init__(
        self,
        trainer: TrainingLoop,
        settings: WatchSettings,
        folder: Path | str,
        *,
        config: dict[str, Any] | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.trainer, self.settings, self.folder = trainer, settings, Path(folder)
        self._warn = warn or (lambda text: warnings.warn(text, RuntimeWarning, stacklevel=3))
        self._window: list[dict[str, float]] = []
        self._files: FolderWriter | None = None
        self._others: dict[str, Writer] = {}
        self._failing: set[str] = set()
        self._prompts = list(settings.prompts or trainer.prompts[:2])
        self._mapped = trainer.step if trainer.step else -1  # the last step that maps were made for
        if not trainer.ranks.is_main:
            return
        settings.require_packages()
        self.folder.mkdir(parents=True, exist_ok=True)
        with global_streams_kept():
            self._files = FolderWriter(self.folder, trainer.step)
            for text in self._files.told:
                self._warn(f"watching: {text}")
            begun = trainer.step // settings.every * settings.every  # steps after it are summarised together
            for row in self._files.begun:
                if row.pop("step") > begun:
                    self._window.append(row)
            self._open(config or {})

    def _open(self, config: dict[str, Any]) -> None:
        done = self.trainer.step
        if self.settings.tensorboard:
            texts = {f"prompts/{i}": prompt for i, prompt in enumerate(self._prompts)}
            if config:
                texts["settings"] = textwrap.indent(yaml.safe_dump(config, sort_keys=False), " " * 4)
            self._try("tensorboard", self._open_events, texts)
        if self.settings.wandb is not None:
            try:
                self._others["wandb"] = WandbWriter(self.settings.wandb, self.folder, done, config)
            except Exception as error:
                raise SettingsError(
                    f"watch.wandb: {first_line(error)} (mode: offline needs no account)"
                ) from error

    def _open_events(self, texts: dict[str, str]) -> None:
        self._others["tensorboard"] = TensorBoardWriter(self.folder / EVENTS, self.trainer.step, texts)

    def __enter__(self) -> Watcher:
        if self.trainer.step == 0 and self.settings.sample_every:
            self._sample(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, writer in self._writers():
            self._try(name, writer.close)

    def see(self, event: Event) -> None:
        """Takes in one event of `TrainingLoop.run`; every rank must."""
        if not isinstance(event, StepDone):
            return
        every, step = self.settings.sample_every, event.step
        if self._files is not None:
            with global_streams_kept():
                self._record(event)
                if event.preview is not None and every and step // every > self._mapped // every:
                    self._mapped = step
                    self._show_maps(step, event.preview)
        if every and (step % every == 0 or step == event.steps):
            self._sample(step)

    def _record(self, event: StepDone) -> None:
        values = event.scalars | {f"seconds/{part}": spent for part, spent in event.seconds.items()}
        values["seconds/step"] = sum(event.seconds.values())
        if "tokens" in values:
            values["tokens/second"] = values.pop("tokens") / values["seconds/step"]
        values |= memory(self.trainer.ranks.device)
        self._window.append(values)
        assert self._files is not None
        self._try("metrics.csv", self._files.scalars, event.step, values)
        if event.step % self.settings.every == 0 or event.step == event.steps:
            summary = summarise(self._window)
            self._window = []
            for name, writer in self._others.items():
                self._try(name, writer.scalars, event.step, summary)

    def _show_maps(self, step: int, preview: Preview) -> None:
        pictures: dict[str, Picture] = {}
        axes = getattr(self.trainer, "weights").axes  # noqa: B009 (only a trainer with a reward has previews)
        self._try("maps", lambda: pictures.update(draw_maps(preview, axes)))
        for name, writer in self._writers():
            self._try(name, writer.pictures, step, pictures)

    def _sample(self, step: int) -> None:
        trainer = self.trainer
        if trainer.vae is None:
            return
        if self._files is None and not isinstance(trainer.student, FSDPModule):
            return
        with global_streams_kept():
            for index in range(len(self._prompts)):
                self._try("sample", self._sample_one, step, index)

    def _sample_one(self, step: int, index: int) -> None:
        trainer = self.trainer
        assert trainer.vae is not None
        latents = trainer.sample([self._prompts[index]], [self.settings.seed + index])
        if self._files is None:
            return
        with torch.no_grad():
            frames = to_bytes(trainer.vae.decode(latents)[0])
        for name, writer in self._writers():
            self._try(name, writer.video, step, f"sample/{index}", frames, self.settings.fps)

    def _writers(self) -> list[tuple[str, Writer]]:
        return [("files", self._files), *self._others.items()] if self._files is not None else []

    def _try(self, name: str, act: Callable[..., object], *arguments: Any) -> None:
        """Acts; what goes wrong is reported once until it works again."""
        try:
            act(*arguments)
            self._failing.discard(name)
        except Exception as error:  # nothing here is worth a run
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            if name not in self._failing:
                self._failing.add(name)
                self._warn(f"watching, {name}: {first_line(error)}; the training continues")


def memory(device: torch.device) -> dict[str, float]:
    """What this process holds of the machine's memory and of a GPU's, now and at its peak, in GiB."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    out = {"memory/rss_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB}
    now = Path("/proc/self/statm")
    if now.is_file():
        out["memory/rss_gib"] = int(now.read_text().split()[1]) * resource.getpagesize() / _GIB
    if device.type == "cuda":
        out["memory/cuda_gib"] = torch.cuda.memory_allocated(device) / _GIB
        out["memory/cuda_peak_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
        out["memory/cuda_reserved_peak_gib"] = torch.cuda.max_memory_reserved(device) / _GIB
    return out


def to_bytes(video: Tensor) -> Tensor:
    """[T, 3, H, W] in [0, 1] -> uint8 in host memory."""
    check_range(video, "to_bytes: video", finite=True)
    return to_uint8(video).cpu()


def draw_maps(preview: Preview, axes: tuple[str, ...]) -> dict[str, Picture]:
    """The saliency of each axis and the weights over the first video of a preview, frames side by side.

    Each is scaled to its own range; a frame is the last of the pixel frames that its latent frame makes.
    """
    weights = preview.weights
    assert preview.video is not None  # the first process always has one
    intra = weights.intra[0, :, 0].float().cpu().numpy()  # [F, h, w]
    count, rows, _ = intra.shape
    pixel_frames, _, height, width = preview.video.shape[1:]
    cell = height // rows
    strides = [n for n in range(1, cell + 1) if cell % n == 0 and width // n >= _MAP_WIDTH]
    stride = max(strides, default=1)
    last = (pixel_frames - 1) // max(1, count - 1) if count > 1 else 1
    shown = np.unique(np.linspace(0, count - 1, min(count, _MAP_COLUMNS)).round().astype(int))
    small = preview.video[0, ::last][:count, :, ::stride, ::stride]
    frames = to_bytes(small).permute(0, 2, 3, 1).contiguous().numpy()[shown]
    scale = -(-_MAP_WIDTH // frames.shape[2])
    pictures = {
        "maps/frames": frame_strip(frames, scale=scale),
        "maps/weights": heat_strip(frames, unit_range(intra)[shown], scale=scale, cmap="viridis"),
    }
    if weights.saliency is not None:
        for axis, values in zip(axes, weights.saliency[:, 0].float().cpu().numpy(), strict=True):
            heat = unit_range(values)[shown]
            pictures[f"maps/saliency-{axis}"] = heat_strip(frames, heat, scale=scale)
    return pictures
