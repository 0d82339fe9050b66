"""Wan 2.1 14B and Wan 2.2 TI2V 5B at small sizes in their real formats, and what of the family is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file

from stream_r1.files import FileError
from stream_r1.models.checkpoints import load_score_model, load_student
from stream_r1.models.vae import VideoVAE
from stream_r1.models.wan import PUBLISHED, published_model, video_of
from stream_r1.models.weight_names import to_original_names

Config = dict[str, Any]

# 14B has 40 layers of 40 heads, 5B 30 of 24; both are the same modules at other sizes.
SMALL: dict[str, Config] = {
    "14B": {"num_attention_heads": 5, "ffn_dim": 28, "num_layers": 4, "in_channels": 16, "out_channels": 16},
    "5B": {"num_attention_heads": 3, "ffn_dim": 24, "num_layers": 3, "in_channels": 48, "out_channels": 48},
}
COMMON = {"attention_head_dim": 12, "text_dim": 10, "freq_dim": 16}


def their_model(size: str) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**(COMMON | SMALL[size])).eval()


def inputs(size: str, frames: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, frames, SMALL[size]["in_channels"], 4, 6, generator=generator)
    return x, 1000 * torch.rand(2, frames, generator=generator), torch.randn(2, 7, 10, generator=generator)


def originals(size: str, **changes: Any) -> Config:
    """The `config.json` of Wan's own folders."""
    sizes = COMMON | SMALL[size]
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": sizes["num_attention_heads"] * sizes["attention_head_dim"],
        "eps": 1e-6,
        "ffn_dim": sizes["ffn_dim"],
        "freq_dim": sizes["freq_dim"],
        "in_dim": sizes["in_channels"],
        "model_type": "ti2v" if size == "5B" else "t2v",
        "num_heads": sizes["num_attention_heads"],
        "num_layers": sizes["num_layers"],
        "out_dim": sizes["out_channels"],
        "text_len": 7,
        "text_dim": sizes["text_dim"],
    } | changes


def save(model: WanTransformer3DModel, kind: str, folder: Path, size: str) -> Path:
    """The weights in a published format."""
    state = to_original_names(model.state_dict())
    folder.mkdir(exist_ok=True)
    if kind == "diffusers":
        model.save_pretrained(folder / "transformer", max_shard_size="50KB")
        return folder
    if kind == "self-forcing":  # what its trainer writes: a generator inside of its wrapper, and an average
        ema = {f"model._fsdp_wrapped_module.{name}": value for name, value in state.items()}
        generator = {name: torch.zeros_like(value) for name, value in ema.items()}
        torch.save({"generator": generator, "generator_ema": ema}, folder / "model.pt")
        return folder / "model.pt"
    names = sorted(state)
    for part in range(3):
        save_file({n: state[n] for n in names[part::3]}, folder / f"model-{part}.safetensors")
    index = {n: f"model-{i % 3}.safetensors" for i, n in enumerate(names)}
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(originals(size)))
    return folder


@pytest.mark.parametrize("size", list(SMALL))
@pytest.mark.parametrize("kind", ["diffusers", "original", "self-forcing"])
@torch.no_grad()
def test_student_and_teacher_compute_what_diffusers_does(size: str, kind: str, tmp_path: Path) -> None:
    """A timestep a token, as Wan 2.2 5B takes them, is one a latent frame where videos are made of text."""
    theirs = their_model(size)
    path = save(theirs, kind, tmp_path / "model", size)
    x, t, text = inputs(size)
    told = {"head_dim": 12} if kind == "self-forcing" else {}
    student = load_student(path, text_len=7, **told)
    teacher = load_score_model(path, **told)
    expected = theirs(x.transpose(1, 2), t.repeat_interleave(2 * 3, dim=1), text).sample.transpose(1, 2)
    torch.testing.assert_close(student(x, t, text), expected, atol=2e-5, rtol=1e-5)
    one = theirs(x.transpose(1, 2), t[:, 0], text).sample
    torch.testing.assert_close(student(x, t[:, 0], text), one.transpose(1, 2), atol=2e-5, rtol=1e-5)
    assert torch.equal(teacher(x.transpose(1, 2), t[:, 0], text).sample, one)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in teacher.parameters())


@torch.no_grad()
def test_the_autoencoder_of_2_2_is_that_of_diffusers() -> None:
    torch.manual_seed(3)
    narrow = {"base_dim": 4, "decoder_base_dim": 8, "num_res_blocks": 1}
    scale = {"latents_mean": torch.randn(48).tolist(), "latents_std": (torch.rand(48) + 0.5).tolist()}
    theirs = AutoencoderKLWan(**(dict(PUBLISHED["5B"].autoencoder) | narrow | scale)).eval()
    vae = VideoVAE(theirs)
    assert (vae.channels, vae.spatial_factor, vae.temporal_factor) == (48, 16, 4)
    assert vae.latent_shape(121, 704, 1280) == (31, 44, 80)
    video = torch.rand(1, 9, 3, 32, 48)
    mean, std = (torch.tensor(scale[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    latents = (theirs.encode((video * 2 - 1).movedim(1, 2)).latent_dist.mode() - mean) / std
    torch.testing.assert_close(vae.encode(video), latents.movedim(2, 1), atol=1e-5, rtol=0)
    expected = (theirs.decode(latents * std + mean).sample.movedim(2, 1) / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.01
    torch.testing.assert_close(vae.decode(latents.movedim(2, 1)), expected, atol=1e-5, rtol=0)


def test_the_published_sizes_have_the_published_numbers_of_weights() -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        models = {name: WanTransformer3DModel(**model.transformer) for name, model in PUBLISHED.items()}
        vae = AutoencoderKLWan(**PUBLISHED["5B"].autoencoder)
    billions = {name: round(count(model) / 1e9, 2) for name, model in models.items()}
    assert billions == {"1.3B": 1.42, "14B": 14.29, "5B": 5.0}
    assert count(vae) * 4 == pytest.approx(2.82e9, rel=0.01)  # Wan2.2_VAE.pth
    widths = {name: model.config["num_attention_heads"] * 128 for name, model in models.items()}
    assert widths == {"1.3B": 1536, "14B": 5120, "5B": 3072}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "1.3B"),
        ("weights/Wan2.1-T2V-14B/transformer", "14B"),
        ("Wan2.2-TI2V-5B-Diffusers", "5B"),
        ("weights/wan-1.5B", None),
        ("weights/ode-init/student", None),
    ],
)
def test_names_tell_sizes(name: str, size: str | None) -> None:
    assert published_model(name) is (None if size is None else PUBLISHED[size])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Wan2.2-T2V-A14B-Diffusers", "two expert transformers"),
        ("Wan2.1-I2V-14B-480P", "more than text"),
        ("Wan2.1-FLF2V-14B-720P", "more than text"),
        ("Wan2.1-VACE-1.3B", "more than text"),
        ("Wan2.2-Animate-14B", "more than text"),
        ("Wan2.1-Fun-1.3B-InP", "more than text"),
    ],
)
def test_names_of_others_are_refused(name: str, told: str) -> None:
    with pytest.raises(FileError, match=rf"^{name}: .*{told}.* is not supported$"):
        published_model(name)


def test_videos_of_a_latent_space() -> None:
    assert video_of(16) == ((704, 1280), 24)
    assert video_of(8) == ((480, 832), 16)


@pytest.mark.parametrize("load", [load_student, load_score_model])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model_type": "i2v"},
            r"config\.json: model_type: expected t2v or ti2v \(.*\), got 'i2v'",
        ),
        ({"model_type": "vace"}, "got 'vace'"),
        ({"qk_norm": False}, "qk_norm: expected true, got False"),
        ({"dim": 61}, "dim and num_heads, one a multiple of the other, got 61 and 5"),
        ({"dim": 60.0}, "got 60.0 and 5"),
        ({"num_layers": 3}, "num_layers: expected 4 as in the weights, got 3"),
        ({"_class_name": "VaceWanModel"}, "got VaceWanModel"),
        ({"ffn_dim": -1}, "ffn_dim: expected a whole number"),
    ],
)
def test_other_originals_are_refused(load: Any, changes: Config, told: str, tmp_path: Path) -> None:
    folder = save(their_model("14B"), "original", tmp_path / "model", "14B")
    (folder / "config.json").write_text(json.dumps(originals("14B", **changes)))
    with pytest.raises(FileError, match=told) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_student, load_score_model])
def test_others_of_diffusers_are_refused(load: Any, tmp_path: Path) -> None:
    """Wan 2.2's image to video has no image encoder: only further channels tell."""
    torch.manual_seed(0)
    further = WanTransformer3DModel(**(COMMON | SMALL["14B"] | {"in_channels": 36}))
    further.save_pretrained(tmp_path / "further")
    with pytest.raises(
        FileError, match=r"config\.json: out_channels must be in_channels 36 \(text to video only"
    ):
        load(tmp_path / "further")
    images = WanTransformer3DModel(**(COMMON | SMALL["14B"]), image_dim=8, added_kv_proj_dim=60)
    images.save_pretrained(tmp_path / "images")
    with pytest.raises(FileError, match=r"image_dim must be None \(text to video only\), got 8"):
        load(tmp_path / "images")


@pytest.mark.parametrize("load", [load_student, load_score_model])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("img_emb.proj.0.weight", "image conditioning"),
        ("blocks.0.cross_attn.k_img.weight", "image conditioning"),
        ("model.vace_blocks.0.after_proj.bias", "conditioning by videos"),
        ("motion_encoder.dec.direction.weight", "conditioning by motion"),
        ("ref_conv.weight", "conditioning by references"),
    ],
)
def test_files_of_others_are_refused(load: Any, name: str, told: str, tmp_path: Path) -> None:
    state = to_original_names(their_model("14B").state_dict()) | {name: torch.zeros(1)}
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(FileError, match=rf"model\.pth: has {name}: {told}.* is not supported"):
        load(tmp_path / "model.pth", head_dim=12)


@pytest.mark.parametrize("load", [load_student, load_score_model])
def test_one_of_two_experts_is_refused(load: Any, tmp_path: Path) -> None:
    """By itself the transformer of Wan 2.2 A14B looks like that of Wan 2.1 14B."""
    pipeline = save(their_model("14B"), "diffusers", tmp_path / "wan", "14B")
    index = {"transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": [None, None]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    load(pipeline / "transformer")  # as Wan 2.2 5B's
    index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    (pipeline / "model_index.json").write_text(json.dumps(index))
    for path in (pipeline, pipeline / "transformer"):
        with pytest.raises(FileError, match=r"wan has transformer_2/: a second expert transformer .*A14B"):
            load(path)
    folder = save(their_model("14B"), "original", tmp_path / "low_noise_model", "14B")
    with pytest.raises(FileError, match="low_noise_model: one of two expert transformers"):
        load(folder)
