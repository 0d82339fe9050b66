"""From a recipe to what it names: models in memory, and the trainer over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from stream_r1.config import SettingsError, problems_of
from stream_r1.devices import decoding_dtype
from stream_r1.disk.fingerprint import fingerprint
from stream_r1.distill.initialise import InitTrainer, Objective, Samples
from stream_r1.distill.ode import (
    OdePairs,
    OdeRegression,
    StoredTrajectories,
    load_ode_pairs,
    make_ode_pairs,
    texts_used,
)
from stream_r1.distill.ranks import Ranks
from stream_r1.distill.teacher_forcing import TeacherForcing
from stream_r1.distill.trainer import DistillTrainer, hashed
from stream_r1.drawn_world import Scene
from stream_r1.drawn_world.reward import MeasuredReward
from stream_r1.models.autoencoder import VideoAutoencoder
from stream_r1.models.autoencoders import load_autoencoder
from stream_r1.models.checkpoints import load_score_model, load_student
from stream_r1.models.prompt_cache import PromptEmbeddings
from stream_r1.models.text import TextEncoder, TransformersEncoder, cleaning, load_text_encoder
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.recipe import InitRecipe, Recipe, locate, read_prompts
from stream_r1.rewards import Reward, load_reward
from stream_r1.rewards.wrong import WrongReward
from stream_r1.schedule import FlowSchedule


@dataclass
class Models:
    """Everything a recipe names, on one device, in float32; the autoencoder in its `decoding_dtype`."""

    student: CausalWanTransformer
    teacher: nn.Module
    critic: nn.Module | None
    vae: VideoAutoencoder
    reward: Reward
    text: TextEncoder


def load_models(recipe: Recipe, ranks: Ranks | None = None) -> Models:
    """The models of a recipe, on the rank's device.

    Those that the ranks divide among them stay in host memory: they move block by block, in parts.

    Raises:
        SettingsError: models that are missing, all of them, before any is loaded.
    """
    require_models(recipe)
    ranks = ranks or Ranks()
    paths, device = recipe.models, ranks.device
    watched = recipe.watch.prompts or ()
    prompts = [*read_prompts(recipe.prompts), recipe.matching.negative_text, *watched]
    text = _text_encoder(recipe, prompts, ranks)  # before the others: while it encodes, it needs room
    return Models(
        student=_student(recipe, ranks),
        teacher=load_score_model(locate(paths.teacher), device=_home(recipe, ranks)),
        critic=None
        if paths.critic is None
        else load_score_model(locate(paths.critic), device=_home(recipe, ranks)),
        vae=load_autoencoder(locate(paths.vae), dtype=decoding_dtype(device), device=device),
        reward=_reward(recipe, device),
        text=text,
    )


def make_trainer(
    recipe: Recipe, models: Models, folder: Path | str, ranks: Ranks | None = None
) -> DistillTrainer:
    """The trainer of a recipe; checkpoints go into ``folder``."""
    return DistillTrainer(
        recipe.distillation(),
        student=models.student,
        teacher=models.teacher,
        critic=models.critic,
        prompts=read_prompts(recipe.prompts),
        text_encoder=models.text,
        vae=models.vae,
        reward=models.reward,
        folder=folder,
        ranks=ranks,
        origin=recipe.origin(),
    )


def make_init_trainer(recipe: InitRecipe, folder: Path | str, ranks: Ranks | None = None) -> InitTrainer:
    """The trainer of a start; checkpoints go into ``folder``.

    Raises:
        SettingsError: models that are missing, or the teacher's trajectories.
    """
    require_models(recipe, unused=("teacher",))
    pairs_folder = locate(recipe.pairs.folder)
    if not any(pairs_folder.glob("pairs-*.safetensors")):
        raise SettingsError(
            f"pairs.folder: {recipe.pairs.folder}: no pairs-*.safetensors; "
            "stream-r1 data ode-pairs RECIPE makes them"
        )
    ranks = ranks or Ranks()
    everything = read_prompts(recipe.prompts)
    prompts = everything[: texts_used(pairs_folder)]
    shown = list(recipe.watch.prompts or prompts[:2]) if recipe.models.vae is not None else []
    text, texts_shown = _embeddings(recipe, ranks, prompts, shown)
    try:
        pairs = load_ode_pairs(pairs_folder, text, data=_pairs_data(recipe, everything))
    except ValueError as error:
        raise SettingsError(f"pairs.folder: {error}") from None
    _require_fitting(recipe, pairs)
    schedule = FlowSchedule(recipe.rollout.shift)
    objective: Objective = OdeRegression(pairs)
    if recipe.kind == "teacher-forcing":
        assert isinstance(pairs.trajectories, StoredTrajectories)
        videos = pairs.trajectories.only(-1)
        objective = TeacherForcing(
            videos, pairs.text, pairs.text_index, schedule=schedule, steps=recipe.rollout.steps
        )
    samples = None
    if recipe.models.vae is not None:
        dtype = decoding_dtype(ranks.device)
        vae = load_autoencoder(locate(recipe.models.vae), dtype=dtype, device=ranks.device)
        texts = {prompt: texts_shown[[index]] for index, prompt in enumerate(shown)}
        samples = Samples(vae, texts, recipe.rollout)
    return InitTrainer(
        recipe.training(),
        _student(recipe, ranks),
        objective,
        folder=folder,
        ranks=ranks,
        samples=samples,
        origin=recipe.origin(),
    )


def write_ode_pairs(recipe: InitRecipe, ranks: Ranks | None = None) -> Iterator[int]:
    """Writes the teacher's trajectories that a start's recipe names, each rank its part of the files.

    Continues where an earlier call stopped; yields the number of the last one after each file.
    """
    require_models(recipe)
    ranks, size = ranks or Ranks(), recipe.rollout
    prompts = read_prompts(recipe.prompts)
    used = prompts[: recipe.pairs.count]  # pair i has prompt i, in a circle
    text, negative = _embeddings(recipe, ranks, used, [recipe.pairs.negative_text])
    teacher = load_score_model(locate(recipe.models.teacher), device=ranks.device).requires_grad_(False)
    channels: int = teacher.config.in_channels  # type: ignore[union-attr, assignment]
    yield from make_ode_pairs(
        teacher,
        text,
        recipe.pairs.folder,
        pairs=recipe.pairs.count,
        latent_shape=(size.frames, channels, size.height, size.width),
        negative=negative[[0]].to(ranks.device),
        schedule=FlowSchedule(size.shift),
        steps=size.steps,
        solver_steps=recipe.pairs.solver_steps,
        guidance_scale=recipe.pairs.guidance_scale,
        order=recipe.pairs.order,
        batch=recipe.pairs.batch,
        seed=recipe.seed,
        precision=recipe.precision,
        data=_pairs_data(recipe, prompts),
        weights=fingerprint([locate(recipe.models.teacher)]),
        share=(ranks.rank, ranks.size),
        agree=ranks.broadcast,
    )


def _pairs_data(recipe: InitRecipe, prompts: list[str]) -> str:
    """Tells the texts, as they are encoded, from others."""
    clean = cleaning(recipe.models.text)
    return hashed([clean(prompt) for prompt in (*prompts, recipe.pairs.negative_text)])


def _require_fitting(recipe: InitRecipe, pairs: OdePairs) -> None:
    """Refuse trajectories that are not what the recipe would make."""
    count, _, frames, _, height, width = pairs.trajectories.shape
    size, made_with = recipe.rollout, pairs.settings
    steps = FlowSchedule(size.shift).denoising_steps(size.steps)
    problems = [
        f"{name}: expected {got} as in {recipe.pairs.folder}, got {asked}"
        for name, asked, got in (
            ("rollout.frames", size.frames, frames),
            ("rollout.height", size.height, height),
            ("rollout.width", size.width, width),
            (
                "rollout.steps, shifted",
                [round(t, 1) for t in steps],
                [round(t, 1) for t in pairs.timesteps.tolist()],
            ),
            ("rollout.shift", size.shift, made_with.get("shift", size.shift)),
            *(
                (f"pairs.{name}", asked, made_with.get(name, asked))
                for name in ("guidance_scale", "solver_steps", "order")
                for asked in [getattr(recipe.pairs, name)]
            ),
        )
        if asked != got
    ]
    if count < recipe.pairs.count:
        problems.append(
            f"pairs.count: {recipe.pairs.folder} has {count} of {recipe.pairs.count} trajectories; "
            "stream-r1 data ode-pairs RECIPE makes the others"
        )
    if problems:
        raise problems_of("pairs", problems)


def require_models(recipe: Recipe | InitRecipe, *, unused: tuple[str, ...] = ()) -> None:
    """Refuse, before any work, models and prompts that are not there."""
    read_prompts(recipe.prompts)
    paths = recipe.models.model_dump(exclude_none=True, exclude=set(unused))
    named = {f"models.{key}": value for key, value in paths.items()}
    if recipe.models.text == "minilm":
        del named["models.text"]
    missing = [
        f"{key}: {value}: no such folder or file"
        for key, value in named.items()
        if not locate(value).exists()
    ]
    if missing:
        raise problems_of("models are missing", missing)


def _home(recipe: Recipe | InitRecipe, ranks: Ranks | None) -> torch.device:
    """Where a transformer is loaded."""
    divided = ranks is not None and ranks.launched and recipe.distributed.shard != "none"
    return torch.device("cpu") if ranks is None or divided else ranks.device


def _student(recipe: Recipe | InitRecipe, ranks: Ranks | None) -> CausalWanTransformer:
    path = locate(recipe.models.student)
    return load_student(path, device=_home(recipe, ranks), **recipe.stream.overrides())


def _reward(recipe: Recipe, device: torch.device) -> Reward:
    if recipe.reward.measured:
        prompts = [*read_prompts(recipe.prompts), *(recipe.watch.prompts or ())]
        for prompt in prompts:
            if not Scene.has(prompt):
                raise SettingsError(
                    f"reward.measured: expected prompts of the drawn world, got {prompt[:80]!r}"
                )
        reward: Reward = MeasuredReward()
    else:
        reward = load_reward(locate(recipe.models.reward), device=device, **recipe.reward.overrides())
    return reward if recipe.reward.wrong is None else WrongReward(reward, recipe.reward.wrong)


def _text_encoder(recipe: Recipe | InitRecipe, prompts: list[str], ranks: Ranks) -> TransformersEncoder:
    """The encoder; with a cache, the prompts are in it, each rank having encoded its share."""
    spec, chosen = recipe.models.text, recipe.text
    encoder = load_text_encoder(
        spec if spec == "minilm" else str(locate(spec)),
        dtype=getattr(torch, chosen.dtype),
        device=ranks.device,
        cache=chosen.cache,
    )
    if chosen.cache is not None:
        encoder.keep(list(dict.fromkeys(prompts))[ranks.rank :: ranks.size])
        ranks.barrier()
    return encoder


def _embeddings(recipe: InitRecipe, ranks: Ranks, *prompts: list[str]) -> list[PromptEmbeddings]:
    """Of each list of prompts, in the encoder's dtype, in host memory or on the disk."""
    encoder = _text_encoder(recipe, [prompt for some in prompts for prompt in some], ranks)
    return [encoder.embeddings(some) for some in prompts]
