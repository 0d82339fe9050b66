"""What is evaluated: models, prompts, seed and parts, from a YAML file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stream_r1.config import Count, Positive, Settings, SettingsError, load_recipe
from stream_r1.evaluation.vbench import DIMENSIONS, read_prompt_list
from stream_r1.messages import shown
from stream_r1.recipe import locate, read_prompts

Part = Literal["figures", "reward", "drift", "latency", "vbench", "judge"]
VBENCH_PROMPTS = "vbench"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ModelSettings(Settings):
    """One model, by the options of ``stream-r1 sample``.

    folder: `--models`: with student/ and vae/, or a diffusers folder or hub repository.
    checkpoint: another student: a .pt or .safetensors file, or a folder of them.
    network: of several in the checkpoint: generator_ema or generator.
    adapter: LoRA adapter's folder, merged into it.
    preset: how it streams: stream-r1, reward-forcing or self-forcing.
    decoder: "taehv:PATH" decodes instead of the VAE.
    dtype, vae_dtype: float32, bfloat16, float16 or auto.
    device: cpu, cuda, cuda:1, or auto: a GPU if there is one.
    vae_device, text_device: if another.
    offload: idle models wait in the CPU's memory.
    cuda_graph: replay the student's passes as CUDA graphs.
    quantize: fp8 or fp8-emulated: the student multiplies in FP8.
    cache_dtype: fp8: keys and values in 8 bits; auto: as dtype.
    """

    folder: str
    checkpoint: str | None = None
    network: str | None = None
    adapter: str | None = None
    preset: str | None = None
    decoder: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    vae_device: str | None = None
    text_device: str | None = None
    offload: bool = False
    cuda_graph: bool = False
    quantize: Literal["fp8", "fp8-emulated"] | None = None
    cache_dtype: Literal["auto", "fp8"] = "auto"


class VBenchSettings(Settings):
    """Where VBench is, and what it is asked.

    full_info: its `VBench_full_info.json`, or a folder that has it: of a checkout or an installation.
    python: of the environment in which its tool runs, see `stream_r1.evaluation.vbench_env`. None: videos are
        written and results read, but nothing is run.
    dimensions: which of the 16; without all of them there are no totals.
    device: that its tool runs on.
    """

    full_info: str
    python: str | None = None
    dimensions: tuple[str, ...] = tuple(DIMENSIONS)
    device: str = "cuda"

    @model_validator(mode="after")
    def _known(self) -> VBenchSettings:
        for name in self.dimensions:
            if name not in DIMENSIONS:
                raise ValueError(f"dimensions: expected some of {', '.join(DIMENSIONS)}, got {shown(name)}")
        flickering = "temporal_flickering" in self.dimensions and self.python is not None
        if flickering and not self.device.startswith("cuda"):
            told = "for temporal_flickering, as VBench's filter of static videos runs on a GPU alone"
            raise ValueError(f"device: expected cuda {told}, got {shown(self.device)}")
        return self


class JudgeSettings(Settings):
    """A vision-language model that rates videos from 1 to 5.

    folder: of a Qwen3-VL, Qwen2.5-VL or Qwen2-VL model with its tokenizer.
    kind: "rating": visual quality, motion dynamics and text alignment; "videoscore2": that model's axes,
        visual quality, text-to-video alignment and physical consistency.
    instruction: a text file with {text_prompt} in it, instead of the fixed question: the one that a model
        was trained with.
    fps: frames a second that it is shown.
    max_frames: that it is shown at most, evenly spread.
    max_pixels: of a frame that it is shown.
    max_tokens: of an answer.
    retries: how often it is asked again where an axis has no digit.
    dtype: of the weights; auto: bfloat16 on a GPU, else float32.
    device: cpu, cuda, cuda:1, or auto.
    """

    folder: str
    kind: Literal["rating", "videoscore2"] = "rating"
    instruction: str | None = None
    fps: Positive = 1.0
    max_frames: Annotated[int, Field(ge=2, le=768)] = 64
    max_pixels: Annotated[int, Field(ge=28 * 28, lt=2**31)] = 448 * 448
    max_tokens: Annotated[int, Field(ge=1, le=8192)] = 64
    retries: Annotated[int, Field(ge=0, le=20)] = 2
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"


class EvalSettings(Settings):
    """An evaluation: every model makes the same videos from the same noise, and they are compared in pairs.

    models: by name.
    prompts: a text file, one prompt a line, a .parquet file, "drawn" or "vbench": those of
        `vbench.full_info`.
    prompt_count: how many of them, evenly spread; null: all.
    videos: of each prompt.
    seed: of the first video of a prompt; the next ones have those that follow.
    seconds: length of a video.
    size: height and width in pixels; null: as `stream-r1 sample`.
    parts: what is measured.
    against: the model that the others are compared with; null: the first.
    reward: folder of the reward whose axes are reported, and which says how drift matches the prompt.
    reference: statistics of real videos that KID compares with. null: no KID.
    window: seconds over which drift is measured; null: a thirtieth of the length, from 1 second on.
    vbench: where VBench is.
    judges: by name.
    shown: prompts whose videos are on the page.
    text_cache: folder that keeps prompt embeddings; null: as `stream-r1 sample`.
    out: folder of the videos, the tables and the page.
    """

    models: Annotated[dict[str, ModelSettings], Field(min_length=1, max_length=100)]
    prompts: str
    prompt_count: Count | None = None
    videos: Annotated[int, Field(ge=1, le=1000)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    seconds: Annotated[float, Field(gt=0, le=86_400)] = 5.0
    size: tuple[Count, Count] | None = None
    parts: Annotated[tuple[Part, ...], Field(min_length=1)] = ("figures", "latency")
    against: str | None = None
    reward: str | None = None
    reference: str | None = None
    window: Positive | None = None
    vbench: VBenchSettings | None = None
    judges: dict[str, JudgeSettings] = Field(default={})
    shown: Annotated[int, Field(ge=0, le=16)] = 3
    text_cache: str | None = None
    out: str = "out/eval"

    @model_validator(mode="after")
    def _fits(self) -> EvalSettings:
        for key, names in (("models", self.models), ("judges", self.judges)):
            for name in names:
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{key}: expected names of letters, digits, . _ -, got {shown(name)}")
        if self.against is not None and self.against not in self.models:
            raise ValueError(f"against: expected one of {', '.join(self.models)}, got {shown(self.against)}")
        for part, given in (("reward", self.reward), ("vbench", self.vbench), ("judge", self.judges)):
            if part in self.parts and not given:
                key = "judges" if part == "judge" else part
                raise ValueError(f"{key}: expected one for the part {part}, got none")
        if "vbench" in self.parts and self.prompts != VBENCH_PROMPTS:
            raise ValueError(f'prompts: expected "vbench" for the part vbench, got {shown(self.prompts)}')
        if self.prompts == VBENCH_PROMPTS and self.vbench is None:
            raise ValueError('vbench: expected where it is, for prompts: "vbench", got none')
        return self

    @property
    def base(self) -> str:
        """The model that the others are compared with."""
        return self.against or next(iter(self.models))

    @property
    def window_seconds(self) -> float:
        return self.window or max(1.0, self.seconds / 30)


@dataclass(frozen=True)
class Video:
    """One video that every model makes: number `copy` of prompt `index`."""

    index: int
    copy: int
    prompt: str
    name: str  # of its mp4

    @property
    def stem(self) -> str:
        """Of files about it."""
        return f"{self.index:04d}-{self.copy}"


@dataclass(frozen=True)
class Evaluation:
    """The settings with the videos that they ask for."""

    settings: EvalSettings
    videos: list[Video]

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    def file(self, model: str, video: Video) -> Path:
        """The mp4; a folder of them holds nothing else, in the layout that VBench's tool reads."""
        return self.out / model / "videos" / video.name

    def result(self, model: str, part: str, video: Video) -> Path:
        """What a part found out about a video; part "made": how it was made."""
        return self.out / model / part / f"{video.stem}.json"

    def vbench_results(self, model: str) -> Path:
        return self.out / model / "vbench"

    def inputs(self, path: Path) -> dict[str, Path | None]:
        """What is read, the recipe at `path` included, by key."""
        s = self.settings
        named: dict[str, str | None] = {"reward": s.reward, "reference": s.reference}
        named |= {f"models.{name}": model.folder for name, model in s.models.items()}
        named |= {f"models.{name}.checkpoint": model.checkpoint for name, model in s.models.items()}
        named |= {f"judges.{name}": judge.folder for name, judge in s.judges.items()}
        named |= {"vbench.full_info": None if s.vbench is None else s.vbench.full_info}
        return {key: None if name is None else locate(name) for key, name in named.items()} | {"recipe": path}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Evaluation:
    """The evaluation of a YAML file.

    Raises:
        SettingsError: what is wrong, with the file and the key; files that are named have to be there.
    """
    settings = load_recipe(EvalSettings, locate(path), overrides)
    for key, name in _local(settings):
        if not locate(name).exists():
            raise SettingsError(f"{path}: {key}: {name}: no such file or folder")
    if settings.prompts == VBENCH_PROMPTS and settings.vbench is not None:
        prompts = read_prompt_list(locate(settings.vbench.full_info), settings.vbench.dimensions)
    else:
        prompts = read_prompts(settings.prompts)
    chosen = _spread(len(prompts), settings.prompt_count)
    videos = [
        Video(index, copy, prompts[index], _name(settings, prompts[index], index, copy))
        for index in chosen
        for copy in range(settings.videos)
    ]
    return Evaluation(settings, videos)


def _local(settings: EvalSettings) -> list[tuple[str, str]]:
    """What has to be on this machine, by key. A model's folder of the form OWNER/NAME may be on the hub."""
    named: dict[str, Any] = {"reward": settings.reward, "reference": settings.reference}
    for name, model in settings.models.items():
        hub = not model.folder.startswith((".", "/", "~")) and model.folder.count("/") == 1
        if not hub or Path(model.folder).parts[0] in ("assets", "out"):
            named[f"models.{name}.folder"] = model.folder
        named[f"models.{name}.checkpoint"] = model.checkpoint
        named[f"models.{name}.adapter"] = model.adapter
    for name, judge in settings.judges.items():
        named[f"judges.{name}.folder"] = judge.folder
        named[f"judges.{name}.instruction"] = judge.instruction
    if settings.vbench is not None:
        named["vbench.full_info"] = settings.vbench.full_info
        named["vbench.python"] = settings.vbench.python
    return [(key, value) for key, value in named.items() if value is not None]


def _spread(total: int, count: int | None) -> list[int]:
    """Indices evenly spread from the first to the last."""
    if count is None or count >= total:
        return list(range(total))
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def _name(settings: EvalSettings, prompt: str, index: int, copy: int) -> str:
    of_prompt = prompt if settings.prompts == VBENCH_PROMPTS else f"{index:04d}"
    return f"{of_prompt}-{copy}.mp4"
