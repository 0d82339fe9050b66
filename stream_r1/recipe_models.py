"""Whether a recipe fits the models that it names, by their config.json; no weights are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream_r1.files import FileError
from stream_r1.messages import shown, some
from stream_r1.models.sizes import read_sizes
from stream_r1.models.text import MINILM_DIM
from stream_r1.models.wan import refuse_unsupported_place, under_diffusers_keys, unsupported_setting
from stream_r1.models.weight_files import model_folder
from stream_r1.places import locate

if TYPE_CHECKING:
    from stream_r1.recipe import InitRecipe, Recipe

_ROLES = ("student", "teacher", "critic")
_TRANSFORMERS = ("WanTransformer3DModel", "CausalWanTransformer")
_CLASSES = {
    "student": _TRANSFORMERS,
    "teacher": _TRANSFORMERS[:1],
    "critic": _TRANSFORMERS[:1],
    "vae": ("AutoencoderKLWan", "BlockVAE"),
}


def misfits(recipe: Recipe | InitRecipe) -> list[str]:
    """Combinations that cannot work, one sentence each."""
    configs: dict[str, dict[str, Any]] = {}
    problems = []
    for name, path in recipe.models.model_dump(exclude={"text"}, exclude_none=True).items():
        try:
            config = configs[name] = _transformer(path) if name in _ROLES else _config(path)
        except FileError as error:
            problems.append(f"models.{name}: {error}")
            continue
        classes = _CLASSES.get(name, ())
        if classes and config.get("_class_name", classes[0]) not in classes:
            problems.append(
                f"models.{name}: expected {' or '.join(classes)}, got {some([config['_class_name']])}"
            )
        elif name in _ROLES and (problem := unsupported_setting(config)) is not None:
            problems.append(f"models.{name}: {problem}")
    if problems:
        return problems
    student, teacher, vae, reward = (
        configs.get(name, {}) for name in ("student", "teacher", "vae", "reward")
    )
    if student:
        student = student | recipe.stream.overrides()
        problems += _stream_misfits(recipe, student)
    transformers = {name: configs.get(name, {}) for name in ("student", "teacher", "critic")}
    problems += _sequence_misfits(recipe, transformers)
    if student and teacher:
        for key in ("in_channels", "text_dim", "patch_size"):
            if key in student and key in teacher and student[key] != teacher[key]:
                problems.append(
                    f"models.teacher: expected {key} {student[key]} as the student's, got {teacher[key]}"
                )
    channels = vae.get("z_dim", vae.get("channels"))
    if student and channels is not None and student.get("in_channels") != channels:
        problems.append(
            f"models.vae: expected {student.get('in_channels')} latent channels as the student's, "
            f"got {channels}"
        )
    width = _text_width(recipe.models.text)
    reads = (student or teacher).get("text_dim", width)
    if width is not None and reads != width:
        problems.append(
            f"models.text: expected embeddings of {reads} numbers as the student's text_dim, "
            f"got {width} of {recipe.models.text}"
        )
    if recipe.watch.prompts and recipe.models.vae is None:
        problems.append("watch.prompts: expected models.vae too, which decodes sample videos, got none")
    if recipe.kind == "distill" and reward.get("type") == "small" and recipe.reward.overrides():
        problems.append(f"reward: expected no settings for the small reward, got {recipe.reward.overrides()}")
    axes = reward.get("axes") if reward else None
    if axes is not None and not (isinstance(axes, list) and all(isinstance(axis, str) for axis in axes)):
        problems.append(f"models.reward: config.json: axes: expected a list of names, got {shown(axes)}")
        axes = None
    if (
        recipe.kind == "distill"
        and recipe.weighting.mode == "re-dmd"
        and axes
        and recipe.weighting.motion_axis not in axes
    ):
        problems.append(
            f"weighting.motion_axis: expected an axis of the reward ({', '.join(axes)}), "
            f"got {shown(recipe.weighting.motion_axis)}"
        )
    return problems


def _stream_misfits(recipe: Recipe | InitRecipe, student: dict[str, Any]) -> list[str]:
    problems = []
    chunk = student.get("frames_per_chunk", 3)
    try:
        recipe.rollout.lengths(chunk, student.get("first_chunk_frames"))
    except ValueError as error:
        problems.append(str(error))
    _, rows, columns = student.get("patch_size", (1, 2, 2))
    for name, size, patch in (
        ("height", recipe.rollout.height, rows),
        ("width", recipe.rollout.width, columns),
    ):
        if size % patch:
            problems.append(
                f"rollout.{name}: expected a multiple of the student's patch ({patch}), got {size}"
            )
    window, sink = student.get("window_frames"), student.get("sink_frames", 0)
    if window is None and recipe.rollout.bounds[1] > recipe.rollout.frames:
        problems.append("stream.window_frames: expected a window for rollout.length beyond frames, got none")
    if window is not None and window < sink + chunk:
        problems.append(
            f"stream.window_frames: expected at least {sink + chunk} (sink {sink} + a chunk of {chunk}), "
            f"got {window}"
        )
    first = student.get("first_chunk_frames") or chunk
    uneven = sink != chunk or first != chunk or (window is not None and window % chunk != 0)
    if student.get("sink_ema") is not None and uneven:
        problems.append(
            f"stream.sink_ema: expected sink_frames equal to a chunk ({chunk}), as the first, and a window "
            f"of whole chunks for a moving sink, got {sink}, {first} and {window}"
        )
    return problems


def _sequence_misfits(recipe: Recipe | InitRecipe, transformers: dict[str, dict[str, Any]]) -> list[str]:
    """Heads and tokens that the processes of `distributed.sequence` can't share evenly."""
    size, problems = recipe.distributed.sequence, []
    for name, config in transformers.items():
        if (heads := config.get("num_attention_heads", size)) % size:
            problems.append(
                f"distributed.sequence: expected a divisor of the {heads} heads of models.{name}, got {size}"
            )
    _, rows, columns = transformers["student"].get("patch_size", (1, 2, 2))
    tokens = recipe.rollout.height // rows * (recipe.rollout.width // columns)
    if tokens % size:
        problems.append(
            f"distributed.sequence: expected a divisor of the {tokens} tokens of a frame (rollout.height, "
            f"rollout.width), got {size}"
        )
    return problems


def _text_width(text: str) -> int | None:
    """Of an embedding; None: the encoder's folder is not there."""
    if text == "minilm":
        return MINILM_DIM
    width = _config(str(Path(text) / "text_encoder")).get("d_model")
    return width if isinstance(width, int) else None


def _transformer(path: str) -> dict[str, Any]:
    """The configuration of a transformer, as `_config`. Raises FileError for one that is not supported."""
    folder = model_folder(locate(path))
    refuse_unsupported_place(folder)
    return under_diffusers_keys(_config(str(folder)), str(folder / "config.json"))


def _config(folder: str) -> dict[str, Any]:
    """The folder's config.json, or nothing if it is not there (weight files carry no configuration)."""
    path = locate(folder) / "config.json"
    return read_sizes(path) if os.path.lexists(path) else {}
