"""The networks that a recipe names, as sizes: read from their configurations, or published ones by name.

No weight is read, but those of the tiny world's reward, which are a few megabytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn

from stream_r1.config import SettingsError
from stream_r1.distill.lora import add_adapters
from stream_r1.distill.settings import LoraSettings
from stream_r1.estimate.memoize import alike_pieces
from stream_r1.estimate.work import cast as cast_to
from stream_r1.files import FileError, read_json
from stream_r1.models.autoencoder import VideoAutoencoder
from stream_r1.models.block_vae import BlockVAE
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.models.vae import VideoVAE
from stream_r1.models.wan import PUBLISHED, WanModel, published_model
from stream_r1.models.weight_files import read_config
from stream_r1.recipe import InitRecipe, Recipe, locate
from stream_r1.rewards.base import Reward

Config = dict[str, Any]
Function = TypeVar("Function", bound=Callable[..., Any])

# UMT5-XXL, Wan's text encoder.
UMT5 = {
    "d_model": 4096,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "d_kv": 64,
    "vocab_size": 256384,
    "feed_forward_proj": "gated-gelu",
}
# Qwen2-VL-2B (2409.12191), the judge's base.
QWEN: Config = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "video_token_id": 151656,
    "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 1536},
}
INSTRUCTION = 600  # tokens around the video, taken for the published instruction and a prompt


def _all_of(*args: Any) -> Any:
    return args


def remembered(by: Callable[..., Any] = _all_of) -> Callable[[Function], Function]:
    """Has a function remember its results: advice asks for the same ones again.

    Args:
        by: of the arguments, all that the result depends on. Results are told apart by what it looks like:
            configurations are dictionaries, and can't be keys.
    """

    def remember(function: Function) -> Function:
        known: dict[str, Any] = {}

        @wraps(function)
        def remembering(*args: Any) -> Any:
            key = repr(by(*args))
            if key not in known:
                known[key] = function(*args)
            return known[key]

        return cast(Function, remembering)

    return remember


@dataclass(frozen=True)
class Network:
    """A transformer: its configuration, whether it is of our class, and how it is trained."""

    config: Config
    own: bool
    lora: LoraSettings | None = None

    @property
    def layers(self) -> int:
        return int(self.config["num_layers"])

    def make(self, layers: int) -> nn.Module:
        """A network of the same kind with so many layers, on the meta device."""
        config = self.config | {"num_layers": layers}
        with torch.device("meta"):
            model: Any = CausalWanTransformer(**config) if self.own else WanTransformer3DModel(**config)
            if self.lora is not None:
                add_adapters(model, self.lora, seed=0)
        made: nn.Module = model
        return made


@dataclass(frozen=True)
class Networks:
    """All that a recipe names. `assumed` says what was not there and what it was taken for."""

    student: Network
    teacher: Network | None
    critic: Network | None
    vae: Config | None
    reward: Config | None
    text: Config | None  # of UMT5; None: MiniLM
    assumed: tuple[str, ...] = ()


@dataclass
class _Reader:
    assumed: list[str] = field(default_factory=list)

    def transformer(self, what: str, path: str, otherwise: str = "") -> Config:
        """A folder's configuration, or published sizes by its name, or by another one's."""
        try:
            config = read_config(locate(path))
            published = config or published_model(path) or published_model(otherwise)
        except FileError as error:
            raise SettingsError(f"models.{what}: {error}") from None
        if isinstance(published, WanModel):
            self.assumed.append(f"models.{what}: {path} is not there: taken for {published.name}")
            return dict(published.transformer)
        if published:
            return published
        raise SettingsError(
            f"models.{what}: {path}: expected a folder with a config.json, or a name with "
            f"{' or '.join(PUBLISHED)} in it, so that its sizes are known"
        )

    def other(self, what: str, path: str, file: str, published: Config, called: str) -> Config:
        config = _read(locate(path) / file)
        if config is None:
            self.assumed.append(f"models.{what}: {path} is not there: taken for {called}")
            return published
        return config


def read_networks(recipe: Recipe | InitRecipe) -> Networks:
    """The sizes of what a recipe names.

    Raises:
        SettingsError: a transformer that is not there and whose name tells no size.
    """
    read, paths = _Reader(), recipe.models
    hint = getattr(paths, "critic", None) or paths.teacher
    student = read.transformer("student", paths.student, hint) | recipe.stream.overrides()
    text = None
    if paths.text != "minilm":
        text = read.other("text", paths.text, "text_encoder/config.json", UMT5, "UMT5-XXL")
    if isinstance(recipe, InitRecipe):
        alone = Network(student, own=True, lora=recipe.lora)
        return Networks(alone, None, None, None, None, text, tuple(read.assumed))
    teacher = read.transformer("teacher", recipe.models.teacher)
    critic = teacher if recipe.models.critic is None else read.transformer("critic", recipe.models.critic)
    own = recipe.distributed.sequence > 1
    if own:
        teacher, critic = (each | {"text_len": student.get("text_len", 512)} for each in (teacher, critic))
    version, size = ("2.2", "5B") if student.get("in_channels", 16) == 48 else ("2.1", "1.3B")
    published = dict(PUBLISHED[size].autoencoder)
    vae = read.other("vae", recipe.models.vae, "config.json", published, f"Wan {version}'s autoencoder")
    return Networks(
        Network(student, own=True, lora=recipe.student.lora),
        Network(teacher, own),
        Network(critic, own, lora=recipe.critic.lora),
        vae,
        _reward(read, recipe.models.reward, recipe.reward.overrides()),
        text,
        tuple(read.assumed),
    )


def _reward(read: _Reader, path: str, settings: Config) -> Config:
    folder = locate(path)
    config = _read(folder / "config.json")
    if config and config.get("type") == "small":
        return config | {"folder": str(folder)}
    judge = config if config and config.get("type") == "videoalign" else {}
    base = folder / str(judge.get("base_model") or "")
    sizes = _read(base / "config.json")
    if not (sizes and sizes.get("model_type") == "qwen2_vl"):
        sizes = QWEN
        read.assumed.append(f"models.reward: the base model of {path} is not there: taken for Qwen2-VL-2B")
    return {"type": "videoalign", "settings": judge | settings, "base": sizes}


def _read(path: Path) -> Config | None:
    return read_json(path) if path.is_file() else None


# --- as modules of fake tensors ---


def make_vae(config: Config, *, on_gpu: bool = False) -> VideoAutoencoder:
    """On a GPU in bfloat16, as `decoding_dtype` says; call it within fake tensors."""
    vae = _vae(config)
    return cast_to(vae, torch.bfloat16) if on_gpu else vae


def _vae(config: Config) -> VideoAutoencoder:
    sizes = {key: value for key, value in config.items() if not key.startswith("_")}
    if config.get("_class_name") == BlockVAE.__name__:
        return alike_pieces(BlockVAE(**sizes).eval().requires_grad_(False))
    channels = sizes.get("z_dim", 16)
    scale: Config = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}  # change no size
    return alike_pieces(VideoVAE(AutoencoderKLWan(**(sizes | scale))))


@remembered()
def text_bytes(config: Config | None, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the text encoder's weights."""
    from transformers import BertConfig, BertModel, UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        if config is None:
            model: nn.Module = BertModel(
                BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
            )
        else:
            model = UMT5EncoderModel(UMT5Config(**config))
    return sum(math.prod(p.shape) * dtype.itemsize for p in model.parameters())


def reward_layers(config: Config) -> dict[str, int]:
    """Layers of the reward's stacks of equal ones."""
    if config["type"] == "small":
        return {}
    base = config["base"]
    text = base.get("text_config") or base
    return {"vision": base["vision_config"]["depth"], "language": text["num_hidden_layers"]}


def make_reward(config: Config, layers: dict[str, int], on_gpu: bool) -> Reward:
    """The reward with so many layers. A judge's weights are fake: call it within fake tensors."""
    if config["type"] == "small":
        from stream_r1.models.text import MiniLMEncoder
        from stream_r1.rewards.small import SmallReward

        return SmallReward.from_pretrained(config["folder"], text_encoder=MiniLMEncoder())
    return _judge(config, layers, on_gpu)


def _judge(config: Config, layers: dict[str, int], on_gpu: bool) -> Reward:
    from transformers import Qwen2VLConfig, Qwen2VLModel

    from stream_r1.rewards.videoalign import VideoAlignReward, VideoAlignSettings
    from stream_r1.rewards.videoalign_checkpoint import REWARD_TOKENS, RewardConfig, RewardNetwork

    settings = VideoAlignSettings(**config["settings"])
    sizes = json.loads(json.dumps(config["base"]))
    sizes["vision_config"]["depth"] = layers["vision"]
    sizes.get("text_config", sizes)["num_hidden_layers"] = layers["language"]
    automatic = torch.bfloat16 if on_gpu else torch.float32
    dtype = automatic if settings.dtype == "auto" else getattr(torch, settings.dtype)
    architecture = Qwen2VLConfig(**sizes)
    model: Any = Qwen2VLModel._from_config(architecture, attn_implementation="sdpa", dtype=dtype)
    trained = RewardConfig("", 2.0, 448 * 448, 0, 0.0, (0.0,) * 3, (1.0,) * 3)
    tokenizer = _Tokens(architecture.video_token_id, REWARD_TOKENS)
    head = torch.zeros(3, model.config.text_config.hidden_size)
    network = RewardNetwork(model.requires_grad_(False).eval(), head, tokenizer, trained)
    return VideoAlignReward(network, "{text_prompt}" + "".join(REWARD_TOKENS), settings)


class _Tokens:
    """As many tokens as the instruction has, without knowing it."""

    def __init__(self, video: int, rewards: tuple[str, ...]) -> None:
        self.rewards = {name: video + 1 + index for index, name in enumerate(rewards)}
        self.video = video

    def convert_tokens_to_ids(self, names: str | list[str]) -> int | list[int]:
        return self.video if isinstance(names, str) else [self.rewards[name] for name in names]

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [0] * INSTRUCTION + [self.video, *self.rewards.values()]}
