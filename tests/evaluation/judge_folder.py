"""Small Qwen models with random weights of the real classes, and a tokenizer of bytes."""

import json
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
WIDTH = 32
_TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 263,
}
_IDS = {
    "vision_start_token_id": 259,
    "vision_end_token_id": 260,
    "image_token_id": 261,
    "video_token_id": 262,
}


def write_judge(folder: Path, kind: str = "qwen3_vl") -> None:
    """A folder as the hub has it: configuration, weights, tokenizer, pixels' means."""
    torch.manual_seed(0)
    if kind == "qwen3_vl":
        rope = {
            "rope_type": "default",
            "mrope_section": [2, 3, 3],
            "mrope_interleaved": True,
            "rope_theta": 1e6,
        }
        text = _TEXT | {"head_dim": 16, "rope_parameters": rope}
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 16,
            "out_hidden_size": WIDTH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        }  # fmt: skip
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **_IDS)
        model = Qwen3VLForConditionalGeneration(config)
        pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    else:
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14,
            "out_hidden_size": WIDTH, "fullatt_block_indexes": [1], "window_size": 56,
        }  # fmt: skip
        config = Qwen2_5_VLConfig(text_config=_TEXT | {"rope_parameters": rope}, vision_config=vision, **_IDS)
        model = Qwen2_5_VLForConditionalGeneration(config)
        pixels = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.copy_(torch.randn_like(value) * value[0].numel() ** -0.5)
    model.generation_config.eos_token_id = 258
    model.generation_config.pad_token_id = 256
    model.save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[])
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
