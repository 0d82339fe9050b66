"""VideoAlign's files: their layout, their names, and how their low-rank updates become plain weights.

A folder is what VideoAlign's training writes and what is published as VideoReward:

    model_config.json                      data, model and LoRA settings; the scores' means and deviations
    checkpoint-<step>/model.pth            every weight (or model.safetensors), under PEFT's names

or, when only what was trained was saved,

    checkpoint-<step>/adapter_model.safetensors + non_lora_state_dict.pth    over the base model's weights

The tokenizer and the architecture are those of the base model, Qwen2-VL-2B-Instruct. Source: arXiv
2501.13918.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel

from stream_r1.files import FileError, read_json
from stream_r1.messages import shown
from stream_r1.models.adapters import CONFIG, require_kept_base
from stream_r1.models.checkpoints import check_fit
from stream_r1.models.library import read_whole
from stream_r1.models.sizes import read_sizes
from stream_r1.models.tensor_files import read_file, require_finite
from stream_r1.rewards.base import ScoreNormalizer

AXES = ("VQ", "MQ", "TA")
REWARD_TOKENS = tuple(f"<|{axis}_reward|>" for axis in AXES)
VIDEO_TOKEN = "<|video_pad|>"

# Of the published VideoReward, for a model_config.json that has none.
_PUBLISHED_NORMS = {
    "VQ_mean": 3.6757,
    "VQ_std": 2.2476,
    "MQ_mean": 1.1646,
    "MQ_std": 1.3811,
    "TA_mean": 2.8105,
    "TA_std": 2.5121,
}
_LARGEST = 2**31
_LORA_NAME = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")
_HEAD = "rm_head.weight"


class RewardConfig(NamedTuple):
    """What of `model_config.json` matters when scoring."""

    base_model: str
    fps: float
    max_pixels: int
    lora_rank: int
    lora_scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class RewardNetwork(NamedTuple):
    """A checkpoint in memory."""

    model: Any
    """transformers' Qwen2VLModel, low-rank updates merged, without the language head; frozen."""
    head: Tensor
    """rm_head: [1 or 3, width] float32."""
    tokenizer: Any
    config: RewardConfig


def load_network(
    folder: str | Path,
    *,
    base_model: str | Path | None = None,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> RewardNetwork:
    """Loads a VideoReward folder.

    Args:
        folder: has `model_config.json` and `checkpoint-*`.
        base_model: folder or hub name of Qwen2-VL-2B-Instruct; None: what `model_config.json` names.
        step: of the checkpoint; None: the last.
        dtype: of the weights. Updates are merged in float32 and rounded once.

    Raises:
        FileNotFoundError: a file or the base model is missing.
        FileError: the weights don't fit; it names them.
        ValueError: a configuration of another kind of reward.
    """
    folder = Path(folder)
    config = read_config(folder)
    base = str(base_model or config.base_model)
    checkpoint = find_checkpoint(folder, step)
    architecture, tokenizer = _base_files(base)
    state = merge_lora(
        _rename(_read_checkpoint(checkpoint, base), str(checkpoint)),
        rank=config.lora_rank,
        scale=config.lora_scale,
        dtype=dtype,
        source=str(checkpoint),
    )
    head = _take_head(state, architecture.text_config.hidden_size, str(checkpoint))
    embedding = state.get("language_model.embed_tokens.weight")
    if embedding is not None:
        if len(embedding) < len(tokenizer):
            raise FileError(
                f"{checkpoint}: embed_tokens.weight: expected a row for each of the tokenizer's "
                f"{len(tokenizer)} tokens, reward tokens included, got {list(embedding.shape)}"
            )
        architecture.text_config.vocab_size = len(embedding)  # training resized it to the tokenizer's length
    model = _assemble(architecture, state, device, str(checkpoint))
    return RewardNetwork(model, head.to(device), tokenizer, config)


def read_config(folder: Path) -> RewardConfig:
    """Reads `model_config.json`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: a key is missing, or the reward is of a kind that is not read at the three reward tokens.
    """
    path = folder / "model_config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder}: expected VideoAlign's model_config.json, found none")
    content = read_json(path)

    def get(section: str, key: str) -> Any:
        try:
            return content[section][key]
        except (KeyError, TypeError):
            raise ValueError(f"{path}: expected {section}.{key}, found none") from None

    expected = {
        ("model_config", "use_special_tokens"): True,
        ("data_config", "prompt_template_type"): "detailed_special",
        ("data_config", "sample_type"): "uniform",
        ("data_config", "num_frames"): None,
    }
    for (section, key), value in expected.items():
        if get(section, key) != value:
            raise FileError(f"{path}: {section}.{key}: expected {value!r}, got {shown(get(section, key))}")

    def number(section: str, key: str, kinds: tuple[type, ...] = (int, float)) -> Any:
        value = get(section, key)
        if type(value) not in kinds or not 0 < value < _LARGEST:
            raise FileError(f"{path}: {section}.{key}: expected a positive number, got {shown(value)}")
        return value

    rank, scale = 0, 0.0
    if get("peft_lora_config", "lora_enable"):
        rank, alpha = number("peft_lora_config", "lora_r", (int,)), number("peft_lora_config", "lora_alpha")
        scale = alpha / (math.sqrt(rank) if content["peft_lora_config"].get("use_rslora") else rank)
    norms = content.get("inference_config") or _PUBLISHED_NORMS
    if not isinstance(norms, dict):
        raise FileError(f"{path}: inference_config: expected keys and values, got {shown(norms)}")
    missing = [key for key in _PUBLISHED_NORMS if key not in norms]
    if missing:
        raise ValueError(f"{path}: inference_config: expected {', '.join(missing)}, found none")
    for key in _PUBLISHED_NORMS:
        if type(norms[key]) not in (int, float):
            raise FileError(f"{path}: inference_config.{key}: expected a number, got {shown(norms[key])}")
    mean, std = (tuple(float(norms[f"{axis}_{what}"]) for axis in AXES) for what in ("mean", "std"))
    try:
        ScoreNormalizer(mean, std)  # refuses deviations that are not positive
    except ValueError as error:
        raise FileError(f"{path}: inference_config: {error}") from None
    if not isinstance(get("model_config", "model_name_or_path"), str):
        got = shown(get("model_config", "model_name_or_path"))
        raise FileError(f"{path}: model_config.model_name_or_path: expected a folder or name, got {got}")
    return RewardConfig(
        base_model=get("model_config", "model_name_or_path"),
        fps=float(number("data_config", "fps")),
        max_pixels=number("data_config", "max_frame_pixels", (int,)),
        lora_rank=rank,
        lora_scale=scale,
        mean=mean,
        std=std,
    )


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """The folder `checkpoint-<step>`, or the last one."""
    steps = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    }
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint-<step>" if step is None else f"checkpoint-{step}"
        found = ", ".join(steps[number].name for number in sorted(steps)) or "none"
        raise FileNotFoundError(f"{folder}: expected a folder {wanted}, found {found}")
    return steps[max(steps) if step is None else step]


def to_transformers_name(name: str) -> str | None:
    """A stored name -> its name in transformers 5's Qwen2VLModel, or `rm_head.weight`; None for `lm_head`.

    `base_model.model.model.layers.0.mlp.up_proj.base_layer.weight` ->
    `language_model.layers.0.mlp.up_proj.weight`; the layouts of transformers 4 (`visual.`, `model.layers.`)
    and 5 (`model.visual.`, `model.language_model.layers.`) are both known. LoRA factors keep their ending.
    """
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    if name.startswith("lm_head."):
        return None
    if name.startswith("rm_head."):
        return name
    bare = name.removeprefix("model.")
    if bare.startswith(("visual.", "language_model.")):
        return bare
    return f"language_model.{bare}" if name.startswith("model.") else name


def merge_lora(
    state: Mapping[str, Tensor], *, rank: int, scale: float, dtype: torch.dtype, source: str = "state dict"
) -> dict[str, Tensor]:
    """W + scale * B A for every pair of factors (arXiv 2106.09685), and everything in `dtype`.

    Args:
        state: names as `to_transformers_name` gives them.
        rank: A is [rank, in], B is [out, rank].

    Raises:
        FileError: a factor without its partner or its weight, or of another shape.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        match = _LORA_NAME.fullmatch(name)
        if match:
            factors.setdefault(f"{match[1]}.weight", {})[match[2]] = value
        else:
            merged[name] = value
    for name, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise FileError(f"{source}: {name}: expected lora_A and lora_B, found only {set(pair)}")
        if name not in merged:
            raise FileError(f"{source}: {name}: expected it beside its lora_A and lora_B, found none")
        weight, down, up = merged[name], pair["A"], pair["B"]
        expected = [rank, weight.shape[1]], [weight.shape[0], rank]
        if (list(down.shape), list(up.shape)) != expected:
            raise FileError(
                f"{source}: {name}: expected lora_A {expected[0]} and lora_B {expected[1]}, "
                f"got {list(down.shape)} and {list(up.shape)}"
            )
        merged[name] = (weight.float() + scale * (up.float() @ down.float())).to(dtype)
    return {name: value.to(dtype) for name, value in merged.items()}


def _base_files(base: str) -> tuple[Any, Any]:
    if (Path(base) / "config.json").exists():
        read_sizes(Path(base) / "config.json")  # the library makes whatever it asks for
    try:
        architecture = AutoConfig.from_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(base)
    except Exception as error:  # of the libraries and their parsers
        kind = FileNotFoundError if isinstance(error, OSError) else FileError
        raise kind(
            f"base_model: expected the folder or hub name of Qwen2-VL-2B-Instruct (its configuration and "
            f"tokenizer), got {base}, which could not be read"
        ) from error
    if architecture.model_type != "qwen2_vl":
        raise ValueError(f"base_model: expected a qwen2_vl model, got {architecture.model_type} in {base}")
    tokenizer.add_tokens(list(REWARD_TOKENS), special_tokens=True)
    video_token = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    if video_token != architecture.video_token_id:
        raise ValueError(
            f"base_model: {base}: expected the tokenizer to give {VIDEO_TOKEN} the model's number "
            f"{architecture.video_token_id}, got {video_token}"
        )
    return architecture, tokenizer


def _read_checkpoint(checkpoint: Path, base: str) -> dict[str, Tensor]:
    for name in ("model.pth", "model.safetensors"):
        if (checkpoint / name).is_file():
            return read_file(checkpoint / name)
    adapter, rest = checkpoint / "adapter_model.safetensors", checkpoint / "non_lora_state_dict.pth"
    if not (adapter.is_file() and rest.is_file()):
        raise FileNotFoundError(
            f"{checkpoint}: expected model.pth or model.safetensors, or adapter_model.safetensors with "
            "non_lora_state_dict.pth, found none of these"
        )
    if (checkpoint / CONFIG).is_file():
        require_kept_base(read_json(checkpoint / CONFIG), checkpoint / CONFIG)
    model = read_whole(Qwen2VLModel, base)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    trained = {to_transformers_name(name): value for name, value in read_file(rest).items()}
    state |= {name if name == _HEAD else f"model.{name}": value for name, value in trained.items() if name}
    return state | read_file(adapter)


def _rename(stored: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, value in stored.items():
        ours = to_transformers_name(name)
        if ours is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = getattr(value, "dtype", type(value).__name__)
            raise FileError(f"{source}: {name}: expected floating point, got {got}")
        if ours in state:
            raise FileError(f"{source}: several entries are named {ours}, one of them {name}")
        state[ours] = value
    return state


def _take_head(state: dict[str, Tensor], width: int, source: str) -> Tensor:
    """[1, width] or [3, width]; removed from `state`."""
    head = state.pop(_HEAD, None)
    if head is None or list(head.shape) not in ([1, width], [len(AXES), width]):
        got = "none" if head is None else list(head.shape)
        raise FileError(f"{source}: {_HEAD}: expected [1, {width}] or [{len(AXES)}, {width}], got {got}")
    return head.float()


def _assemble(
    architecture: Any, state: Mapping[str, Tensor], device: str | torch.device, source: str
) -> nn.Module:
    architecture.text_config.attention_dropout = 0.0
    with init_empty_weights(include_buffers=False):  # the weights are there already: no time for random ones
        model: nn.Module = Qwen2VLModel._from_config(architecture, attn_implementation="sdpa")
    check_fit(model, state, source)
    require_finite(state.items(), source)
    model.load_state_dict(dict(state), assign=True)
    return model.to(device).requires_grad_(False).eval()
