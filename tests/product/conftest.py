"""A whole world in a folder: every model that a recipe names, random and as small as its class allows."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from stream_r1.cli import main
from stream_r1.evaluation import Reference
from stream_r1.models.taehv import TinyVAE
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.rewards.base import ScoreNormalizer
from stream_r1.rewards.small import SmallHeads, SmallReward
from stream_r1.rewards.small_features import FeatureExtractor

TESTS = Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS / "product"))  # last: tests/distributed has a test_train_command of its own
GOLDEN = TESTS / "golden"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CHANNELS = 4
SIZES = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 1,
    "attention_head_dim": 12,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": 384,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}
PROMPTS = ("a red ball bounces in a meadow at noon", "a blue star floats up by the sea at night")


def vae():
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Folder with student/, teacher/, vae/, reward/, reference.safetensors, prompts.txt and recipe.yaml."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    stream = {"text_len": 32, "frames_per_chunk": 3, "window_frames": 6, "sink_frames": 3}
    CausalWanTransformer(**SIZES, **stream).save_pretrained(root / "student")
    WanTransformer3DModel(**SIZES).save_pretrained(root / "teacher")
    vae().save_pretrained(root / "vae")
    features = FeatureExtractor()
    reward = SmallReward(features, SmallHeads(features.sizes), ScoreNormalizer([0.0] * 3, [1.0] * 3))
    reward.save_pretrained(root / "reward")
    videos = [torch.rand(5, 3, 32, 48) for _ in PROMPTS]
    Reference.fit(videos).save(root / "reference.safetensors")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    recipe = {
        "models": {name: str(root / name) for name in ("student", "teacher", "vae", "reward")},
        "prompts": str(root / "prompts.txt"),
        "out": str(root / "out"),
        "steps": 4,
        "batch": 2,
        "critic_updates": 2,
        "student": {"lr": 1e-3},
        "critic": {"lr": 1e-3},
        "rollout": {"frames": 6, "height": 4, "width": 6},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def original(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world with one file of each kind that the package reads."""
    root = tmp_path_factory.mktemp("hostile")
    for name in ("student", "teacher", "vae", "reward"):
        shutil.copytree(world / name, root / name)
    torch.save(load_file(root / "student" / "diffusion_pytorch_model.safetensors"), root / "student.pt")
    shutil.copy(GOLDEN / "stream_absolute_sink.safetensors", root / "golden.safetensors")
    shutil.copy(world / "reference.safetensors", root / "reference.safetensors")
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    recipe["models"] = {name: str(root / name) for name in recipe["models"]}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"out": str(root / "out")}))
    _adapter(root / "adapter", root / "student" / WEIGHTS)
    save_file(TinyVAE(4, (12, 8, 6, 5), 6).state_dict(), root / "taehv.safetensors")
    _trajectories(root, recipe)
    _videoalign(root / "videoalign")
    (root / "secret.yaml").write_text("password: hunter2\n")
    for number in range(100):
        (root / f"base-{number}.yaml").write_text(
            f"base: base-{number - 1}.yaml\n" if number else "steps: 3\n"
        )
    return root


def _adapter(folder: Path, weights: Path) -> None:
    folder.mkdir()
    name = "blocks.0.attn1.to_q"
    out, inputs = load_file(weights)[f"{name}.weight"].shape
    halves = {"A": torch.ones(2, inputs), "B": torch.ones(out, 2)}
    save_file(
        {f"base_model.model.{name}.lora_{half}.weight": t for half, t in halves.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _trajectories(root: Path, recipe: dict) -> None:
    """A recipe of a start, and the one file of trajectories that it is learnt from."""
    start = {
        "kind": "ode-init",
        "models": {name: recipe["models"][name] for name in ("student", "teacher")},
        "prompts": recipe["prompts"],
        "out": str(root / "out"),
        "rollout": recipe["rollout"] | {"steps": [1000, 500]},
        "pairs": {"folder": str(root / "pairs"), "count": 2, "solver_steps": 2, "batch": 2},
        "steps": 1,
        "batch": 1,
        "watch": {"sample_every": 0},
    }
    (root / "start.yaml").write_text(yaml.safe_dump(start))
    with pytest.raises(SystemExit) as end:
        main(["data", "ode-pairs", str(root / "start.yaml")])
    assert not end.value.code


def _videoalign(root: Path) -> None:
    """A small VideoReward, and its base model beside it."""
    where = TESTS / "rewards" / "videoalign_folder.py"
    spec = importlib.util.spec_from_file_location("videoalign_folder", where)
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look there
    spec.loader.exec_module(made)
    written = made.write_reward(root)
    save_file(written.state, root / "VideoReward" / "checkpoint-20" / "model.safetensors")
    (root / "VideoReward" / "checkpoint-20" / "model.pth").unlink()
    settings = {"type": "videoalign", "base_model": "../base", "video_fps": 16}
    (root / "VideoReward" / "config.json").write_text(json.dumps(settings))
