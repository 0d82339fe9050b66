"""What a demo run knows about itself: one JSON file beside its videos, enough to report or to continue."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from stream_r1.config import SettingsError
from stream_r1.disk.whole import write_text
from stream_r1.evaluation.spread import Figure
from stream_r1.files import read_text
from stream_r1.messages import shown, some

FILE = "record.json"


def _within(name: str) -> str:
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"expected a file of the run's folder, got {shown(name)}")
    return name


_Name = Annotated[str, AfterValidator(_within)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Number(_Part):
    """A figure of some videos, as `evaluation.Figure`: its standard error, and it without each video."""

    value: float
    spread: float
    without: list[float] = []

    @classmethod
    def of(cls, figure: Figure) -> Number:
        """A figure, to be kept."""
        return cls(value=figure.value, spread=figure.spread, without=list(figure.without))


class Clip(_Part):
    """One video of one prompt."""

    prompt: str
    video: _Name
    """mp4, relative to the run's folder."""
    sheet: _Name | None = None
    """Contact sheet (PNG), relative to the run's folder."""


class StepPoint(_Part):
    """One optimizer step of the student (with the critic's steps since the one before)."""

    step: int
    elapsed: float
    """Seconds of distillation so far, over all runs."""
    generator_loss: float | None = None
    critic_loss: float | None = None
    scores: dict[str, float] = {}
    """Mean score of the batch by reward axis."""
    weight: float | None = None
    """Mean inter-reliability weight of the batch."""


class Timing(_Part):
    """Where the time of one stream at batch 1 went, in seconds, as the sampler's ``StreamTimings``."""

    text: float
    denoise: float
    cache: float
    decode: float
    first_frame: float
    total: float
    chunks: int
    frames: int

    @property
    def fps(self) -> float:
        """Frames a second, end to end: everything between the call and the last frame."""
        return self.frames / self.total


class Record(_Part):
    """Everything about a run; written after every stage and every few steps."""

    fingerprint: str
    """Of settings and models: a run continues only if it is the same."""
    started: str
    recipe: str
    seed: int
    budget: float
    machine: dict[str, str] = {}
    prompts: list[str] = []
    size: tuple[int, int] = (64, 112)
    """Height and width of the videos."""
    fps: int = 24
    chunk_frames: int = 12
    """Pixel frames of a chunk."""
    denoising_steps: int = 4
    teacher_steps: int | None = None
    axes: list[str] = []
    """Of the reward that guides."""
    judge_axes: list[str] = []
    clips: dict[str, list[Clip]] = {}
    """By column: before, after, teacher, drawings."""
    steps: list[StepPoint] = []
    planned_steps: int | None = None
    step_seconds: float | None = None
    """One student step with its critic steps, as measured."""
    critic_steps: int = 0
    evaluations: dict[str, dict[str, Number]] = {}
    """By column (before, after, teacher, drawings): figures of ``evaluate_videos``."""
    evaluated: str = ""
    """What the figures are means over, in words."""
    timing: Timing | None = None
    maps: _Name | None = None
    """npz with frames, saliency, weights; relative to the run's folder."""
    stages: dict[str, float] = {}
    """Seconds spent by stage."""
    settings: str = ""
    """The resolved recipe, YAML."""
    finished: bool = False
    stopped: bool = False

    def save(self, folder: Path) -> None:
        """Write atomically: a run stopped half-way leaves the old file or the new one."""
        write_text(folder / FILE, self.model_dump_json(indent=1))

    @classmethod
    def load(cls, folder: Path) -> Record | None:
        """The folder's record, or None if there is none. Raises SettingsError for one that can't be read."""
        path = folder / FILE
        if not path.exists():
            return None
        text = read_text(path, "a demo's record")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
            raise SettingsError(
                f"{path}: not a demo's record ({some(wrong)}): remove it, or start over with --fresh"
            ) from None
