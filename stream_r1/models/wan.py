"""Wan's published models: their sizes, and which of the family are refused, by name.

Sources: Wan 2.1 (2503.20314) and its repository; the configurations of Wan 2.2's repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_r1.files import FileError, read_json
from stream_r1.messages import shown

Config = dict[str, Any]


@dataclass(frozen=True)
class WanModel:
    """A published text-to-video model.

    Attributes:
        transformer: settings of `WanTransformer3DModel` other than its defaults.
        autoencoder: the same of `AutoencoderKLWan`, without `latents_mean` and `latents_std`.
        size: height and width of its videos in pixels.
        fps: their frames a second.
    """

    name: str
    transformer: Mapping[str, Any]
    autoencoder: Mapping[str, Any]
    size: tuple[int, int]
    fps: float


# 16 x 16 pixels a latent cell: a patch of 2 x 2 before three halvings
_VAE_2_2 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
}
PUBLISHED: dict[str, WanModel] = {
    "1.3B": WanModel(
        "Wan 2.1 of 1.3B",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        {},
        (480, 832),
        16,
    ),
    "14B": WanModel(
        "Wan 2.1 of 14B",
        {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
        {},
        (480, 832),
        16,
    ),
    "5B": WanModel(
        "Wan 2.2 TI2V of 5B",
        {
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "num_layers": 30,
            "in_channels": 48,
            "out_channels": 48,
        },
        _VAE_2_2,
        (704, 1280),
        24,
    ),
}
"""By what the names of folders hold."""

_EXPERTS = "a second expert transformer (Wan 2.2 A14B)"
_IMAGES = "image conditioning (Wan I2V); start from given frames with first_frames instead"
_PARTS = {"transformer_2": _EXPERTS, "image_encoder": _IMAGES}
_NAMES = {  # in names of folders
    r"A14B": "two expert transformers (Wan 2.2 A14B)",
    r"(?<![A-Za-z])(I2V|FLF2V|VACE|S2V|Animate|Fun)(?![A-Za-z])": "conditioning by more than text",
}
_WEIGHTS = {  # in names of weights, original and diffusers'
    r"(img_emb|image_embedder|\.k_img|\.add_k_proj)\b": "image conditioning (Wan I2V)",
    r"\bvace_": "conditioning by videos (Wan VACE)",
    r"\b(ref_conv|control_adapter)\.": "conditioning by references or cameras (Wan Fun)",
    r"\b(motion_encoder|face_adapter|face_encoder)\.": "conditioning by motion (Wan Animate)",
    r"\b(casual_audio_encoder|audio_injector|audio_proj)\.": "conditioning by sound (Wan S2V)",
}
_ORIGINAL = {  # keys of Wan's own configurations
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    **{
        key: key for key in ("patch_size", "text_dim", "freq_dim", "ffn_dim", "num_layers", "text_len", "eps")
    },
    "cross_attn_norm": "cross_attn_norm",
}
_ORIGINAL_CLASSES = ("WanModel", "CausalWanModel")


def published_model(name: str) -> WanModel | None:
    """The published model that a folder's name tells; None: none.

    Raises:
        FileError: the name is that of a model that is not supported.
    """
    for pattern, meaning in _NAMES.items():
        if re.search(pattern, name):
            raise FileError(f"{name}: {meaning} is not supported")
    sizes = "|".join(map(re.escape, PUBLISHED))
    found = re.search(rf"(?<![0-9.])({sizes})(?![0-9A-Za-z])", name)
    return None if found is None else PUBLISHED[found[1]]


def video_of(spatial_factor: int) -> tuple[tuple[int, int], float]:
    """Height and width in pixels and frames a second of the videos of a published model.

    Args:
        spatial_factor: pixels a latent cell of its autoencoder; 16 is Wan 2.2's.
    """
    model = PUBLISHED["5B" if spatial_factor == 16 else "1.3B"]
    return model.size, model.fps


def under_diffusers_keys(config: Config, source: str) -> Config:
    """A transformer's configuration, where it is Wan's own under diffusers' keys.

    Raises:
        FileError: it can't be read so, or is of a model that is not supported.
    """
    if config.get("_class_name") not in _ORIGINAL_CLASSES:
        return config
    width, heads, kind = config.get("dim"), config.get("num_heads"), config.get("model_type", "t2v")
    if type(width) is not int or type(heads) is not int or heads < 1 or width < 1 or width % heads:
        expected = "dim and num_heads, one a multiple of the other"
        raise FileError(f"{source}: expected {expected}, got {shown(width)} and {shown(heads)}")
    if kind not in ("t2v", "ti2v"):
        raise FileError(f"{source}: model_type: expected t2v or ti2v (text to video), got {shown(kind)}")
    if config.get("qk_norm", True) is not True:
        raise FileError(f"{source}: qk_norm: expected true, got {shown(config['qk_norm'])}")
    named = {ours: config[key] for key, ours in _ORIGINAL.items() if key in config}
    return {"_class_name": "WanTransformer3DModel", "attention_head_dim": width // heads} | named


def unsupported_setting(config: Mapping[str, Any]) -> str | None:
    """What a transformer's configuration, under diffusers' keys, asks for that is not supported, if anything.

    Videos are made from text alone: the model returns as many channels as it takes.
    """
    for name in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        if config.get(name) is not None:
            return f"{name} must be None (text to video only), got {config[name]}"
    norm, patch = config.get("qk_norm", "rms_norm_across_heads"), config.get("patch_size", (1, 2, 2))
    if norm != "rms_norm_across_heads":
        return f"qk_norm must be 'rms_norm_across_heads', got {norm!r}"
    if not isinstance(patch, list | tuple) or len(patch) != 3 or patch[0] != 1:
        got = tuple(patch) if isinstance(patch, list) else patch
        return f"patch_size must be (1, height, width), got {got}"
    channels = config.get("in_channels", 16)
    made = config.get("out_channels", 16) or channels
    if made != channels:
        return (
            f"out_channels must be in_channels {channels} (text to video only: others are conditioned by "
            f"further channels, as Wan I2V), got {made}"
        )
    return None


def unsupported_part(folder: Path) -> str | None:
    """What of a pipeline's folder is not supported, if anything: "has transformer_2/: ... "."""
    index = folder / "model_index.json"  # of a repository only the parts that are needed are here
    listed = read_json(index) if index.is_file() else {}
    for part, meaning in _PARTS.items():
        named = listed.get(part)
        if (folder / part).is_dir() or (any(named) if isinstance(named, list) else named):
            return f"has {part}/: {meaning} is not supported"
    return None


def refuse_unsupported_place(path: Path) -> None:
    """Refuse a transformer, a folder or a file, that lies among the parts of a model that is not supported.

    Raises:
        FileError: which part.
    """
    folder = path if path.is_dir() else path.parent
    if folder.name in ("high_noise_model", "low_noise_model"):
        raise FileError(f"{path}: one of two expert transformers (Wan 2.2 A14B) is not supported")
    for pipeline in (folder, folder.parent) if folder.name.startswith("transformer") else (folder,):
        problem = unsupported_part(pipeline)
        if problem is not None:
            raise FileError(f"{path}: {pipeline.name} {problem}")


def refuse_unsupported_weights(names: Iterable[str], source: str) -> None:
    """Refuse weights of the family's other models, by their names.

    Raises:
        FileError: what they are for.
    """
    for name in names:
        for pattern, meaning in _WEIGHTS.items():
            if re.search(pattern, name):
                raise FileError(f"{source}: has {name}: {meaning} is not supported")
