"""From a recipe to what it names: models in memory, and the trainer over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from stream_r1.config import SettingsError
from stream_r1.distill.trainer import DistillTrainer
from stream_r1.models.checkpoints import load_student
from stream_r1.models.text import TextEncoder, load_text_encoder
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.models.vae import VideoVAE
from stream_r1.recipe import Recipe, locate, read_prompts
from stream_r1.rewards import Reward, load_reward


@dataclass
class Models:
    """Everything a recipe names, float32, on one device."""

    student: CausalWanTransformer
    teacher: nn.Module
    critic: nn.Module | None
    vae: VideoVAE
    reward: Reward
    text: TextEncoder


def load_models(recipe: Recipe, device: str = "cpu") -> Models:
    """The models of a recipe.

    Raises:
        SettingsError: models that are missing, all of them, before any is loaded.
    """
    require_models(recipe)
    paths = recipe.models
    student = load_student(locate(paths.student), device=device, **recipe.stream.overrides())
    return Models(
        student=student,
        teacher=_score_model(paths.teacher, device),
        critic=None if paths.critic is None else _score_model(paths.critic, device),
        vae=VideoVAE.from_pretrained(locate(paths.vae)).to(device),
        reward=load_reward(locate(paths.reward), device=device),
        text=load_text_encoder(paths.text if paths.text == "minilm" else str(locate(paths.text))),
    )


def make_trainer(recipe: Recipe, models: Models, folder: Path | str) -> DistillTrainer:
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
    )


def require_models(recipe: Recipe) -> None:
    """Refuse, before any work, models and prompts that are not there."""
    read_prompts(recipe.prompts)
    named = {f"models.{key}": value for key, value in recipe.models.model_dump(exclude_none=True).items()}
    if recipe.models.text == "minilm":
        del named["models.text"]
    missing = [
        f"{key}: {value}: no such folder or file"
        for key, value in named.items()
        if not locate(value).exists()
    ]
    if missing:
        raise SettingsError("\n  ".join(["models are missing", *missing]))


def _score_model(path: str, device: str) -> nn.Module:
    model: nn.Module = WanTransformer3DModel.from_pretrained(locate(path), torch_dtype=torch.float32)
    return model.to(device)
