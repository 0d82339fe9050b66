"""A small VideoReward folder with random weights, in the published layout and names, and videos for it."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from stream_r1.rewards.videoalign import VideoAlignReward

RANK, ALPHA = 4, 8
WIDTH = 32
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
NORMS = {"VQ_mean": 0.5, "VQ_std": 2.0, "MQ_mean": -0.25, "MQ_std": 0.5, "TA_mean": 0.0, "TA_std": 1.5}
TEMPLATE = (
    "\nRate it.  \nQuality: <|VQ_reward|>\nMotion: <|MQ_reward|>\n"
    "Prompt - {text_prompt}\nAlignment: <|TA_reward|>\nEND\n"
)
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Qwen2-VL-2B's configuration, flat as on the hub, at a size for tests.
_BASE_CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "use_sliding_window": False,
    "vocab_size": 320,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "vision_start_token_id": 259,
    "vision_end_token_id": 260,
    "image_token_id": 261,
    "video_token_id": 262,
    "tie_word_embeddings": True,
    "vision_config": {
        "model_type": "qwen2_vl",
        "depth": 2,
        "embed_dim": 32,
        "mlp_ratio": 2,
        "num_heads": 2,
        "in_chans": 3,
        "hidden_size": WIDTH,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
}


@dataclass
class Written:
    """A folder and what went into it."""

    folder: Path
    base: Path
    state: dict[str, Tensor]
    """As in `checkpoint-20/model.pth`."""
    model: Qwen2VLModel
    """transformers' own, with every update as a branch beside its weight: y = W x + alpha / r * B (A x)."""
    head: Tensor


def write_base(folder: Path) -> None:
    """Tokenizer (bytes, no merges) and configuration of the base model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_BASE_CONFIG))
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[])
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.save_pretrained(folder)


def write_reward(folder: Path, *, norms: dict[str, float] | None = NORMS, outputs: int = 1) -> Written:
    """`folder`/VideoReward over `folder`/base."""
    base = folder / "base"
    write_base(base)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    config = Qwen2VLConfig(**_BASE_CONFIG)
    config.text_config.vocab_size = 266  # 256 bytes, Qwen's 7 tokens and the 3 reward tokens: not padded
    model = Qwen2VLModel._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.copy_(draw(*value.shape, scale=value[0].numel() ** -0.5))
            else:
                value.copy_(draw(*value.shape, scale=0.1) + (1 if "norm" in name and "weight" in name else 0))
        model.language_model.embed_tokens.weight.mul_(WIDTH**0.5)
    factors = {
        name: (draw(RANK, module.in_features, scale=0.1), draw(module.out_features, RANK, scale=0.3))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(_TARGETS)
    }
    head = draw(outputs, WIDTH, scale=0.5)
    state = {_stored_name(name, factors): value.clone() for name, value in model.state_dict().items()}
    for name, pair in factors.items():
        for factor, value in zip("AB", pair, strict=True):
            state[f"{_stored_name(name, {})}.lora_{factor}.default.weight"] = value
    state["base_model.model.lm_head.weight"] = model.language_model.embed_tokens.weight.detach().clone()
    state["base_model.model.rm_head.weight"] = head
    for name, (down, up) in factors.items():
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, out, down=down, up=up: out + (inputs[0] @ down.T @ up.T) * (ALPHA / RANK)
        )
    reward = folder / "VideoReward"
    for step in (5, 20):
        (reward / f"checkpoint-{step}").mkdir(parents=True)
    torch.save(state, reward / "checkpoint-20" / "model.pth")
    (reward / "model_config.json").write_text(json.dumps(model_config(base, norms)))
    (reward / "instruction.txt").write_text(TEMPLATE, encoding="utf-8")
    return Written(reward, base, state, model, head)


def model_config(base: Path, norms: dict[str, float] | None) -> dict:
    """model_config.json as VideoAlign's training writes it, those keys that matter here."""
    content = {
        "data_config": {
            "max_frame_pixels": 56 * 84,
            "num_frames": None,
            "fps": 2.0,
            "eval_dim": ["VQ", "MQ", "TA"],
            "prompt_template_type": "detailed_special",
            "sample_type": "uniform",
        },
        "training_args": {"bf16": True},
        "model_config": {"model_name_or_path": str(base), "output_dim": 1, "use_special_tokens": True},
        "peft_lora_config": {
            "lora_enable": True,
            "vision_lora": False,
            "lora_r": RANK,
            "lora_alpha": ALPHA,
            "use_rslora": False,
        },
    }
    return content | ({"inference_config": norms} if norms else {})


def copy_of(written: Written) -> Path:
    """A VideoReward folder that a test may change."""
    folder = Path(tempfile.mkdtemp(dir=written.folder.parent)) / "VideoReward"
    shutil.copytree(written.folder, folder)
    return folder


def change_weights(written: Written, state: dict[str, Tensor], **settings) -> VideoAlignReward:
    """The reward with other weights."""
    folder = copy_of(written)
    torch.save(state, folder / "checkpoint-20" / "model.pth")
    return open_reward(folder, **settings)


def open_reward(folder: Path, **settings) -> VideoAlignReward:
    """The reward in a folder, shown every frame, small ones at their size, with a short instruction."""
    settings = {"template": TEMPLATE, "fps": "all", "min_pixels": 28 * 28} | settings
    return VideoAlignReward.from_pretrained(folder, **settings)


def smooth_video(batch=2, frames=4, height=56, width=84, seed=0) -> Tensor:
    """[B, T, 3, H, W], well inside [0, 1], so that a bicubic resize stays there."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch * frames, 3, 6, 6, generator=generator) * 0.5 + 0.25
    video = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return video.unflatten(0, (batch, frames))


def reference_patches(video):
    """[T, 3, H, W] in [0, 1] -> [N, 1176] and the grid, patch by patch."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    pixels = (video - mean) / std
    t, rows, columns = len(video) // 2, video.shape[-2] // 14, video.shape[-1] // 14
    patches = [
        pixels[2 * f : 2 * f + 2, :, 14 * r : 14 * r + 14, 14 * c : 14 * c + 14].transpose(0, 1).flatten()
        for f in range(t)
        for top in range(0, rows, 2)
        for left in range(0, columns, 2)
        for r in (top, top + 1)
        for c in (left, left + 1)
    ]
    return torch.stack(patches), (t, rows, columns)


def _stored_name(name: str, factors: dict) -> str:
    """A name in transformers 5's Qwen2VLModel -> its name in transformers 4 under PEFT."""
    module, _, parameter = name.rpartition(".")
    if module in factors:
        name = f"{module}.base_layer.{parameter}"
    if name.startswith("language_model."):
        name = "model." + name.removeprefix("language_model.")
    return f"base_model.model.{name}"
