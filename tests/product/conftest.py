"""A whole world in a folder: every model that a recipe names, random and as small as its class allows."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from stream_r1.evaluation import Reference
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.rewards.base import ScoreNormalizer
from stream_r1.rewards.small import SmallHeads, SmallReward
from stream_r1.rewards.small_features import FeatureExtractor

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
