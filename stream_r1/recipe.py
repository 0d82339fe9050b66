"""A recipe: all settings of a run, and whether they fit the models it names.

`Recipe` distils (``kind: distill``, or none given); `InitRecipe` trains a student's initialization before
that, by ODE regression (``kind: ode-init``) or teacher forcing (``kind: teacher-forcing``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from stream_r1.config import (
    Count,
    Positive,
    Settings,
    SettingsError,
    build,
    merge,
    parse_overrides,
    problems_of,
    read_recipe,
)
from stream_r1.data.prompts import read_prompt_file
from stream_r1.disk.fingerprint import fingerprint
from stream_r1.distill.settings import (
    DistillSettings,
    Frames,
    GuidanceSettings,
    InitSettings,
    RolloutSettings,
)
from stream_r1.messages import shown
from stream_r1.places import locate as locate
from stream_r1.recipe_models import misfits
from stream_r1.rewards.wrong import WrongKind
from stream_r1.watch.settings import WatchSettings

DRAWN_PROMPTS = "drawn"


class ModelPaths(Settings):
    """Where the models are: folders, relative to where the command runs or to the project's root.

    student: the network that is distilled: a folder or a file of weights, see `load_student`.
    teacher: the bidirectional model whose distribution is matched, in the same formats.
    vae: Wan's autoencoder.
    reward: a reward's folder; its `config.json` says which kind.
    critic: the network that is trained on the student's videos; None: initialized as a copy of the teacher.
    text: "minilm", or a folder with UMT5 and its tokenizer.
    """

    student: str
    teacher: str
    vae: str
    reward: str
    critic: str | None = None
    text: str = "minilm"


class StreamSettings(Settings):
    """How the student streams; None keeps what its folder says.

    window_frames: latent frames that a chunk sees, sink and itself included.
    sink_frames: first frames that stay visible indefinitely.
    positions: "absolute" (Self Forcing) or "window" (Reward Forcing, Stream-R1).
    sink_ema: decay of the sink's moving average; "none": the sink stays as it was.
    """

    window_frames: Frames | None = None
    sink_frames: int | None = Field(default=None, ge=0, le=16384)
    positions: Literal["absolute", "window"] | None = None
    sink_ema: Annotated[float, Field(gt=0, lt=1)] | Literal["none"] | None = None

    def overrides(self) -> dict[str, Any]:
        """What was set, as a student takes it."""
        set_here = self.model_dump(exclude_none=True)
        return set_here | ({"sink_ema": None} if self.sink_ema == "none" else {})


class TextSettings(Settings):
    """How UMT5 encodes the prompts.

    dtype: of its weights and of the embeddings.
    cache: folder that keeps embeddings. With one, every prompt is encoded before the training begins, the
        processes sharing the work, and the encoder's memory is freed. None: it stays in memory.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    cache: str | None = None


class RewardSettings(Settings):
    """How the VideoAlign reward is run; None keeps what its folder says. The small reward has only `wrong`
    and `measured`.

    wrong: make it wrong on purpose, for a study: see `WrongReward`.
    measured: the drawn world's own measures in place of the folder's model: see `MeasuredReward`.

    fps: frames a second that it sees; "checkpoint": as it was trained; "all": every frame. Other frames have
        no saliency.
    video_fps: frames a second of the student's videos.
    max_pixels: of a resized frame.
    dtype: of its weights.
    gradient_checkpointing: keep only a layer's input for the backward.
    samples_at_once: videos scored together.
    """

    wrong: WrongKind | None = None
    measured: bool = False
    fps: Positive | Literal["checkpoint", "all"] | None = None
    video_fps: Positive | None = None
    max_pixels: Count | None = None
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    gradient_checkpointing: bool | None = None
    samples_at_once: Count | None = None

    def overrides(self) -> dict[str, Any]:
        """What was set, as `load_reward` takes it."""
        return self.model_dump(exclude_none=True, exclude={"wrong", "measured"})


class Recipe(DistillSettings):
    """The settings of the distillation, its models, its prompts and where results go.

    kind: what the run does.
    models: where the models are.
    stream: how the student streams.
    reward: how the reward is run.
    text: how prompts are encoded.
    prompts: a text file, one prompt a line, a .parquet file, or "drawn": every prompt of the drawn world.
    out: folder for checkpoints, metrics and the student.
    watch: what is recorded, and where.
    """

    kind: Literal["distill"] = "distill"
    models: ModelPaths
    stream: StreamSettings = StreamSettings()
    reward: RewardSettings = RewardSettings()
    text: TextSettings = TextSettings()
    prompts: str = DRAWN_PROMPTS
    out: str = "out/train"
    watch: WatchSettings = WatchSettings()

    def distillation(self) -> DistillSettings:
        """The part that the trainer is given."""
        return DistillSettings(**{name: getattr(self, name) for name in DistillSettings.model_fields})

    def as_yaml(self) -> str:
        """The resolved settings; a recipe again."""
        return _as_yaml(self)

    def inputs(self, path: Path | str) -> dict[str, Path | None]:
        """What the run reads, the recipe at `path` included, by key."""
        return _inputs(self, path)

    def origin(self) -> dict[str, Any]:
        """What decides a run's outcome besides `distillation` and the prompts: how models stream, score and
        encode, and what their folders hold.
        """
        reward = self.reward.model_dump(mode="json", exclude={"gradient_checkpointing", "samples_at_once"})
        return _origin(self) | {"reward": reward}


class InitModelPaths(Settings):
    """Where the models are: folders, as those of a distillation.

    student: the initial weights.
    teacher: the model that makes the trajectories.
    vae: Wan's autoencoder, which decodes sample videos; None: there are none.
    text: "minilm", or a folder with UMT5 and its tokenizer.
    """

    student: str
    teacher: str
    vae: str | None = None
    text: str = "minilm"


class PairSettings(GuidanceSettings):
    """The teacher's trajectories that an initialization is trained on: arguments of `make_ode_pairs`.

    folder: where they are kept.
    count: how many.
    solver_steps: steps of the teacher's solver.
    guidance_scale: as `matching.guidance_scale` of a distillation.
    negative_prompt: as `matching.negative_prompt` of a distillation.
    order: of the solver: 1 is Euler's, 2 a second-order one.
    batch: trajectories generated together.
    """

    folder: str
    count: Annotated[int, Field(ge=1, le=10**7)] = 1000
    solver_steps: Annotated[int, Field(ge=1, le=10**5)] = 48
    order: Literal[1, 2] = 2
    batch: Count = 4


class InitRecipe(InitSettings):
    """The settings of the training of an initialization, its models, its data and where results go.

    Both kinds are trained on `pairs`, which ``stream-r1 data ode-pairs`` makes: ODE regression from whole
    trajectories, teacher forcing from their ends, the teacher's videos.

    kind: which of the two.
    models: where the models are.
    stream: how the student streams.
    rollout: only sizes, steps and shift are used.
    pairs: the trajectories.
    text: how prompts are encoded.
    prompts: a text file, one prompt a line, a .parquet file, or "drawn": every prompt of the drawn world.
    out: folder for checkpoints, metrics and the student.
    watch: what is recorded, and where.
    """

    kind: Literal["ode-init", "teacher-forcing"]
    models: InitModelPaths
    stream: StreamSettings = StreamSettings()
    rollout: RolloutSettings = RolloutSettings()
    pairs: PairSettings
    text: TextSettings = TextSettings()
    prompts: str = DRAWN_PROMPTS
    out: str = "out/start"
    watch: WatchSettings = WatchSettings()

    def training(self) -> InitSettings:
        """The part that the trainer is given."""
        return InitSettings(**{name: getattr(self, name) for name in InitSettings.model_fields})

    def as_yaml(self) -> str:
        """The resolved settings; a recipe again."""
        return _as_yaml(self)

    def inputs(self, path: Path | str) -> dict[str, Path | None]:
        """As `Recipe.inputs`."""
        return _inputs(self, path) | {"pairs.folder": locate(self.pairs.folder)}

    def origin(self) -> dict[str, Any]:
        """As `Recipe.origin`; the teacher's trajectories count, and not the teacher."""
        found = _origin(self)
        del found["models"]["teacher"]
        return found | {"pairs": fingerprint([locate(self.pairs.folder)])}


def _origin(recipe: Recipe | InitRecipe) -> dict[str, Any]:
    named = recipe.models.model_dump(exclude_none=True)
    models = {
        name: folder if folder == "minilm" else fingerprint([locate(folder)])
        for name, folder in named.items()
    }
    return {
        "models": models,
        "stream": recipe.stream.model_dump(mode="json"),
        "text": {"dtype": recipe.text.dtype},
    }


def _inputs(recipe: Recipe | InitRecipe, path: Path | str) -> dict[str, Path | None]:
    named = recipe.models.model_dump(exclude_none=True)
    if recipe.models.text == "minilm":
        del named["text"]
    read: dict[str, Path | None] = {f"models.{name}": locate(value) for name, value in named.items()}
    return read | {"prompts": locate(recipe.prompts), "the recipe": locate(path)}


def _as_yaml(recipe: Recipe | InitRecipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)


_KEYS = {*Recipe.model_fields, *InitRecipe.model_fields}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of a distillation, see `load_any`; another kind is refused."""
    recipe = load_any(path, overrides)
    if not isinstance(recipe, Recipe):
        raise SettingsError(f"{path}: kind: expected distill, got {recipe.kind!r}")
    return recipe


def load_start(path: str | Path, overrides: Sequence[str] = ()) -> InitRecipe:
    """A recipe of an initialization, see `load_any`; another kind is refused."""
    recipe = load_any(path, overrides)
    if not isinstance(recipe, InitRecipe):
        raise SettingsError(f"{path}: kind: expected ode-init or teacher-forcing, got {recipe.kind!r}")
    return recipe


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | InitRecipe:
    """A recipe file with ``key=value`` overrides, checked by itself and against the models that are there.

    Raises:
        SettingsError: what is wrong, everything at once.
    """
    return build_any(path, parse_overrides(overrides))


def build_any(path: str | Path, changes: dict[str, Any]) -> Recipe | InitRecipe:
    """As `load_any`, with the overrides as data."""
    data = merge(read_recipe(locate(path), _KEYS), changes)
    source = str(locate(path)) + (" with overrides" if changes else "")
    kinds = ("distill", "ode-init", "teacher-forcing")
    kind = data.get("kind", "distill")
    if kind not in kinds:
        raise SettingsError(f"{source}: kind: expected one of {', '.join(kinds)}, got {shown(kind)}")
    recipe: Recipe | InitRecipe
    recipe = build(Recipe, data, source) if kind == "distill" else build(InitRecipe, data, source)
    problems = misfits(recipe)
    if problems:
        raise problems_of(f"{path}: does not fit its models", problems)
    return recipe


def read_prompts(source: str) -> list[str]:
    """Prompts of a recipe: "drawn", every prompt of the drawn world, or those of a file.

    Raises:
        SettingsError: no such file, or one of no use; see `read_prompt_file`.
    """
    if source == DRAWN_PROMPTS:
        from stream_r1.drawn_world import all_scenes

        return [scene.prompt for scene in all_scenes()]
    path = locate(source)
    if not path.is_file():
        raise SettingsError(
            f"prompts: {source}: no such file; expected a text file, one prompt a line, a .parquet file "
            f'or "{DRAWN_PROMPTS}"'
        )
    return read_prompt_file(path)
