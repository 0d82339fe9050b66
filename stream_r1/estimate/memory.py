"""The memory of a training step on one GPU: what is there all the time, and what its phases add.

    weights, optimizer, average, models that look at pixels      all the time, divided by the ranks that share
    rollout -> decode -> reward -> scores -> backward            what each makes goes to the next, or goes
    critic's rollout -> forward -> backward

What does not live together is not added up: the peak is that of the worst phase.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from stream_r1.config import SettingsError
from stream_r1.distill.run_settings import RunSettings
from stream_r1.estimate.live import Bytes
from stream_r1.estimate.networks import (
    Config,
    Network,
    make_reward,
    make_vae,
    remembered,
    reward_layers,
    text_bytes,
)
from stream_r1.estimate.plan import Plan, Role, roles
from stream_r1.estimate.run import Phase
from stream_r1.estimate.work import fake_tensors
from stream_r1.recipe import DRAWN_PROMPTS, Recipe, locate, read_prompts

MACHINE = 8  # GPUs of one, taken for the default of `replicas`
PROMPTS, PROMPT_TOKENS = 1024, 100  # remembered embeddings: the most; tokens that one is taken to have
GATHERED = 3  # blocks that exist whole at once: one computes, one is fetched, and the buffer it arrives in


@dataclass(frozen=True)
class Cluster:
    """How many GPUs, how many of them divide one copy of the models, and how many share samples."""

    gpus: int
    shards: int
    sequence: int = 1

    @property
    def replicas(self) -> int:
        return self.gpus // self.shards

    @property
    def parts(self) -> int:
        """Into how many parts a batch is divided."""
        return self.gpus // self.sequence


def cluster(settings: RunSettings, batch: int, accumulation: int, gpus: int) -> Cluster:
    """What a recipe makes of so many GPUs. Raises ValueError where they do not fit together."""
    if gpus < 1:
        raise ValueError(f"--gpus: expected at least 1, got {gpus}")
    chosen, shards = settings.distributed, 1
    if chosen.shard == "full":
        shards = gpus
    elif chosen.shard == "hybrid":
        replicas = chosen.replicas or max(1, gpus // MACHINE)
        if gpus % replicas:
            told = "distributed.replicas" if chosen.replicas else "one replica a machine of 8"
            raise ValueError(f"--gpus: expected a multiple of {replicas} ({told}), got {gpus}")
        shards = gpus // replicas
    if gpus % chosen.sequence:
        raise ValueError(f"--gpus: expected a multiple of distributed.sequence {chosen.sequence}, got {gpus}")
    if batch % (gpus // chosen.sequence * accumulation):
        shared = f" / sequence {chosen.sequence}" if chosen.sequence > 1 else ""
        raise SettingsError(
            f"batch: expected a multiple of {gpus} GPUs{shared} x accumulation {accumulation}, got {batch}"
        )
    return Cluster(gpus, shards, chosen.sequence)


@dataclass(frozen=True)
class Sizes:
    """Numbers that a network has on a rank."""

    kept: int  # of its weights
    trained: int  # of those, the ones that learn
    block: int  # of a whole block
    block_trained: int
    outside: int  # of the blocks, whole
    layers: int

    @property
    def whole(self) -> int:
        return self.block * self.layers + self.outside


def shard_of(shape: Sequence[int], shards: int) -> int:
    """Numbers of the first rank's part of a weight, which is divided along its first dimension."""
    return -(-shape[0] // shards) * math.prod(shape[1:])


@remembered()
def sizes(network: Network, shards: int) -> Sizes:
    """Of a network that so many ranks divide."""
    named = [(name, p.shape, p.requires_grad) for name, p in network.make(1).named_parameters()]
    kept = trained = block = block_trained = outside = 0
    for name, shape, learns in named:
        inside = name.startswith("blocks.")
        times = network.layers if inside else 1
        part = shard_of(shape, shards) * times
        kept += part
        trained += part * learns
        block += math.prod(shape) * inside
        block_trained += math.prod(shape) * inside * learns
        outside += math.prod(shape) * (not inside)
    return Sizes(kept, trained, block, block_trained, outside, network.layers)


@dataclass(frozen=True)
class Moment:
    """Bytes by part when a phase needs most."""

    phase: str
    parts: Bytes

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def resident(plan: Plan, networks: Mapping[Role, Sizes]) -> Bytes:
    """What is there all the time."""
    recipe, parts = plan.recipe, Counter[str]()
    for role, size in networks.items():
        parts["weights"] += 4 * size.kept
        if role != "teacher":
            parts["optimizer"] += 8 * size.trained
    parts["average"] = 4 * networks["student"].trained
    if isinstance(recipe, Recipe):
        named = plan.networks
        parts["reward"] = _reward_bytes(named.reward or {}, plan.on_gpu)
        parts["autoencoder"] = _vae_bytes(named.vae or {}, plan.on_gpu)
        parts["text encoder"] = _embeddings(plan)
        if named.text is None or recipe.text.cache is None:
            parts["text encoder"] += text_bytes(named.text, _text_dtype(plan))
    return dict(parts)


def _text_dtype(plan: Plan) -> torch.dtype:
    narrow = plan.networks.text is not None and plan.recipe.text.dtype == "bfloat16"
    return torch.bfloat16 if narrow else torch.float32


def _embeddings(plan: Plan) -> int:
    """Bytes of the prompts' that are remembered."""
    config, prompts = plan.networks.student.config, PROMPTS
    if plan.recipe.prompts == DRAWN_PROMPTS or locate(plan.recipe.prompts).is_file():
        prompts = min(PROMPTS, len(read_prompts(plan.recipe.prompts)) + 1)
    tokens = min(PROMPT_TOKENS, config.get("text_len", 512))
    return int(prompts * tokens * config.get("text_dim", 4096) * _text_dtype(plan).itemsize)


def _before(plan: Plan) -> list[Moment]:
    """UMT5 alone, where it encodes all prompts before other models come and is then given back."""
    alone = not isinstance(plan.recipe, Recipe) or plan.recipe.text.cache is not None
    if plan.networks.text is None or not alone:
        return []
    return [Moment("start: prompts", {"text encoder": text_bytes(plan.networks.text, _text_dtype(plan))})]


@remembered()
def _reward_bytes(config: Config, on_gpu: bool) -> int:
    layers = reward_layers(config)
    if config["type"] == "small":  # of real weights
        return _module_bytes(make_reward(config, layers, on_gpu)) + text_bytes(None)
    with fake_tensors():
        return _module_bytes(make_reward(config, layers, on_gpu))


@remembered()
def _vae_bytes(config: Config, on_gpu: bool) -> int:
    with fake_tensors():
        return _module_bytes(make_vae(config, on_gpu=on_gpu))


def _module_bytes(module: Any) -> int:
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


def moments(plan: Plan, phases: Sequence[Phase], shards: int) -> list[Moment]:
    """The memory of every phase of a step."""
    networks = {role: sizes(network, shards) for role, network in roles(plan).items()}
    always = Counter[str](resident(plan, networks))
    accumulation = plan.recipe.accumulation
    shown: Counter[str] = Counter()  # what the student's update leaves: the video, its weights
    for phase in phases:
        if phase.shown:
            shown.update(phase.after)
    out = _before(plan)
    for learns, update in groupby(phases, key=lambda phase: phase.learns):
        # An earlier micro-batch left what is shown, and the critic's update comes after the student's.
        live = Counter(shown) if learns != "student" or accumulation > 1 else Counter[str]()
        gradients = 4 * networks[learns].trained
        for phase in update:
            now = _sum(always, live, phase.peak)
            if accumulation > 1 or (phase.backward and not plan.keeps_gradients):
                now["gradients"] = gradients
            if phase.role and shards > 1:
                now["working weights"] += _gathered(networks[phase.role], plan.narrow, phase.backward)
            out.append(_moment(phase.name, now))
            live.update(phase.after)
        now = _sum(always, shown)
        now["gradients"] = gradients
        out.append(_moment(f"{learns}: optimizer", now))
    return out


def _sum(*parts: Mapping[str, float]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in parts:
        total.update(each)
    return total


def _moment(phase: str, parts: Mapping[str, float]) -> Moment:
    return Moment(phase, {part: size for part, size in parts.items() if size})


def _gathered(size: Sizes, narrow: bool, backward: bool) -> int:
    """Whole weights of a few blocks, and in the backward their gradients on the way to their ranks."""
    width = 2 if narrow else 4
    blocks = min(GATHERED, size.layers + 1)
    bytes_ = width * (blocks * size.block + size.outside)
    if backward:
        bytes_ += (width + 2 * 4) * size.block_trained
    return bytes_
