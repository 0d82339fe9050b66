"""Wan 2.2 TI2V 5B from its folder to a stream and a step of training, small; what estimates know of sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from stream_r1 import recipe as recipes
from stream_r1.assembly import load_models, make_trainer
from stream_r1.config import SettingsError
from stream_r1.estimate.networks import make_vae, read_networks
from stream_r1.estimate.work import fake_tensors
from stream_r1.models.wan import PUBLISHED
from stream_r1.sampling.pipeline import StreamR1Pipeline

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SIZES: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 12,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 384,
    "freq_dim": 16,
    "ffn_dim": 24,
    "num_layers": 2,
}


class FixedEncoder:
    text_len, dim = 8, 384

    def encode(self, prompts: list[str]) -> torch.Tensor:
        return torch.ones(len(prompts), self.text_len, self.dim)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder as that of Wan 2.2 TI2V 5B, without its text encoder."""
    folder = tmp_path_factory.mktemp("Wan2.2-TI2V-5B-Diffusers")
    torch.manual_seed(0)
    WanTransformer3DModel(**SIZES).save_pretrained(folder / "transformer")
    narrow = {"base_dim": 4, "decoder_base_dim": 4, "num_res_blocks": 1}
    scale = {"latents_mean": [0.1] * 48, "latents_std": [0.8] * 48}
    AutoencoderKLWan(**(dict(PUBLISHED["5B"].autoencoder) | narrow | scale)).save_pretrained(folder / "vae")
    index = {"_class_name": "WanPipeline", "transformer_2": [None, None], "expand_timesteps": True}
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": None}))
    return folder


def test_it_streams_at_its_own_size_and_rate(wan: Path) -> None:
    pipeline = StreamR1Pipeline.from_pretrained(wan, text_encoder=FixedEncoder())
    assert (pipeline.size, pipeline.fps) == ((704, 1280), 24)
    assert pipeline.sampler.latent_size == (44, 80)
    small = StreamR1Pipeline.from_pretrained(wan, size=(64, 96), text_encoder=FixedEncoder())
    chunks = list(small.stream("a fox", chunks=2))
    assert [tuple(chunk.latents.shape) for chunk in chunks] == [(1, 3, 48, 4, 6)] * 2
    assert [tuple(chunk.frames.shape) for chunk in chunks] == [(1, 9, 3, 64, 96), (1, 12, 3, 64, 96)]
    with pytest.raises(ValueError, match=r"size must be positive multiples of \(32, 32\), got \(720, 1280\)"):
        StreamR1Pipeline.from_pretrained(wan, size=(720, 1280), text_encoder=FixedEncoder())


def test_a_step_of_its_recipe(wan: Path, world: Path, tmp_path: Path) -> None:
    folders = dict.fromkeys(("student", "teacher", "critic"), wan / "transformer")
    folders |= {"vae": wan / "vae", "reward": world / "reward"}
    changes = [f"models.{name}={folder}" for name, folder in folders.items()]
    changes += [f"prompts={world / 'prompts.txt'}", "models.text=minilm", "text.cache=null"]
    changes += ["rollout={frames: 6, height: 4, width: 6}", "batch=1", "accumulation=1"]
    changes += ["distributed={shard: none, param_dtype: float32}", "reward={fps: null, video_fps: null}"]
    changes += ["precision=float32", "stream={window_frames: 6}"]
    recipe = recipes.load(RECIPES / "wan2.2-ti2v-5b" / "stream-r1.yaml", changes)
    models = load_models(recipe)
    before = {name: value.clone() for name, value in models.student.state_dict().items()}
    trainer = make_trainer(recipe, models, tmp_path)
    done = next(iter(trainer.run()))
    assert done.preview.video.shape == (1, 21, 3, 64, 96)
    assert torch.isfinite(torch.tensor(list(done.scalars.values()))).all()
    assert any(not torch.equal(value, before[name]) for name, value in models.student.state_dict().items())


@pytest.mark.parametrize(
    ("name", "size", "channels", "factor"), [("wan2.1-14b", "14B", 16, 8), ("wan2.2-ti2v-5b", "5B", 48, 16)]
)
def test_estimates_know_the_sizes(name: str, size: str, channels: int, factor: int) -> None:
    recipe = recipes.load(RECIPES / name / "stream-r1.yaml")
    networks = read_networks(recipe)
    for network in (networks.student, networks.teacher, networks.critic):
        assert network is not None
        assert network.config.items() >= PUBLISHED[size].transformer.items()
    with fake_tensors():
        vae = make_vae(networks.vae or {})
    assert (vae.channels, vae.spatial_factor) == (channels, factor)
    height, width = PUBLISHED[size].size
    latent = vae.latent_shape(vae.frames(recipe.rollout.frames), height, width)
    assert latent == (recipe.rollout.frames, recipe.rollout.height, recipe.rollout.width)


@pytest.mark.parametrize("role", ["student", "teacher", "critic"])
def test_recipes_refuse_others_of_the_family(wan: Path, world: Path, tmp_path: Path, role: str) -> None:
    """Before a weight is read."""

    def refused(changes: dict[str, Any], told: str) -> None:
        folder = tmp_path / "transformer"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(
            json.dumps(json.loads((wan / "transformer/config.json").read_text()) | changes)
        )
        with pytest.raises(SettingsError, match=rf"models\.{role}: .*{told}"):
            recipes.load(world / "recipe.yaml", [f"models.{role}={folder}"])

    refused({"image_dim": 1280}, r"image_dim must be None \(text to video only\), got 1280")
    refused({"in_channels": 36, "out_channels": 16}, r"out_channels must be in_channels 36")
    refused({"_class_name": "WanVACETransformer3DModel"}, "got WanVACETransformer3DModel")
    refused(
        {"_class_name": "WanModel", "dim": 36, "num_heads": 3, "model_type": "i2v"}, "model_type: .*'i2v'"
    )
    (tmp_path / "transformer_2").mkdir()
    refused({}, r"has transformer_2/: a second expert transformer \(Wan 2\.2 A14B\) is not supported")


def test_estimates_refuse_others_by_the_names_of_their_folders() -> None:
    path = RECIPES / "wan2.1-14b" / "stream-r1.yaml"
    for name, told in (("Wan2.2-T2V-A14B-Diffusers", "two expert"), ("Wan2.1-VACE-14B", "more than text")):
        recipe = recipes.load(path, [f"models.teacher=weights/{name}/transformer"])
        with pytest.raises(SettingsError, match=rf"models\.teacher: .*{told}.* is not supported"):
            read_networks(recipe)
