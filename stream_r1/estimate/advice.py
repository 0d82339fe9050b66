"""What to change in a recipe that needs more memory than there is: settings, tried one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from stream_r1.config import build, merge, parse_overrides
from stream_r1.estimate.devices import DEVICES, Device
from stream_r1.estimate.memory import MACHINE
from stream_r1.estimate.networks import read_networks
from stream_r1.estimate.training import Estimate, estimate
from stream_r1.recipe import InitRecipe, Recipe

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe | InitRecipe)
MOST_GPUS = 64


@dataclass(frozen=True)
class Change:
    """Settings, on top of those before, and what is needed then."""

    overrides: tuple[str, ...]
    meaning: str
    gpus: int
    result: Estimate


def advise(recipe: AnyRecipe, device: Device, gpus: int, before: Estimate) -> list[Change]:
    """Changes that save memory, what costs least first, until it fits.

    Then come more GPUs, where settings do not do. Of settings that save nothing none is named.
    """
    kept: list[Change] = []
    best = before
    for overrides, meaning in _settings(recipe, gpus):
        tried = changed(recipe, overrides)
        result = estimate(tried, device, gpus)
        if result.total < 0.99 * best.total:
            recipe, best = tried, result
            kept.append(Change(overrides, meaning, gpus, result))
        if best.fits:
            return kept
    while (gpus := 2 * gpus) <= min(MOST_GPUS, recipe.batch):
        overrides = _for_more(recipe, gpus)
        result = estimate(changed(recipe, overrides), device, gpus)
        if result.fits:
            return [*kept, Change(overrides, "more GPUs", gpus, result)]
    return kept


def larger(needed: float, device: Device) -> list[str]:
    """Known GPUs with that much memory, the smallest first."""
    fitting = [d for d in DEVICES.values() if d.memory >= needed and d.memory > device.memory]
    return [d.name for d in sorted(fitting, key=lambda d: d.memory)]


def changed(recipe: AnyRecipe, overrides: tuple[str, ...]) -> AnyRecipe:
    """A recipe with other settings. Raises SettingsError."""
    return build(type(recipe), merge(recipe.model_dump(mode="json"), parse_overrides(overrides)), "recipe")


def _settings(recipe: Recipe | InitRecipe, gpus: int) -> Iterator[tuple[tuple[str, ...], str]]:
    distils = isinstance(recipe, Recipe)
    owner = recipe.rollout if isinstance(recipe, Recipe) else recipe
    if not owner.gradient_checkpointing:
        name = "rollout.gradient_checkpointing" if distils else "gradient_checkpointing"
        yield (f"{name}=true",), "compute blocks again in the backward"
    if recipe.models.text != "minilm" and (recipe.text.cache is None or recipe.text.dtype == "float32"):
        cache = recipe.text.cache or f"{recipe.out}/prompts"
        yield (f"text={{dtype: bfloat16, cache: {cache}}}",), "encode prompts first, and free UMT5"
    parts = recipe.batch // (gpus // recipe.distributed.sequence)
    if recipe.accumulation < parts:
        yield (f"accumulation={parts}",), "one sample at a time"
    if owner.keep_attention:
        name = "rollout.keep_attention" if distils else "keep_attention"
        yield (f"{name}=false",), "compute attention again, too"
    if recipe.precision == "float32":
        yield ("precision=bfloat16",), "matrix products in bfloat16"
    if recipe.distributed.shard != "full" and gpus > 1:
        yield _shared(recipe), "one copy of the models, divided among all GPUs"
    if (shared := _most_shared(recipe, gpus)) > recipe.distributed.sequence:
        alone = f"accumulation={recipe.batch // (gpus // shared)}"
        yield (f"distributed.sequence={shared}", alone), "one sample at a time on several GPUs"
    config = read_networks(recipe).student.config
    shortest = (config.get("sink_frames") or 0) + config.get("frames_per_chunk", 3)
    if (config.get("window_frames") or 0) > shortest:
        yield (f"stream.window_frames={shortest}",), "a window of the sink and the chunk alone"
    if isinstance(recipe, Recipe):
        if recipe.student.lora is None or recipe.critic.lora is None:
            yield ("student.lora={rank: 64}", "critic.lora={rank: 64}"), "train adapters alone"
    elif recipe.lora is None:
        yield ("lora={rank: 64}",), "train adapters alone"


def _most_shared(recipe: Recipe | InitRecipe, gpus: int) -> int:
    """Into how many parts GPUs of one machine can divide heads and tokens."""
    networks, size = read_networks(recipe), recipe.rollout
    named = [each for each in (networks.student, networks.teacher, networks.critic) if each is not None]
    if any(each.lora is not None and each.lora.dropout > 0 for each in named):
        return 1
    _, rows, columns = networks.student.config.get("patch_size", (1, 2, 2))
    counts = [each.config.get("num_attention_heads", 40) for each in named]
    counts.append(size.height // rows * (size.width // columns))
    wholes = (n for n in range(min(gpus, MACHINE), 0, -1) if gpus % n == 0)
    return next(n for n in wholes if all(count % n == 0 for count in counts))


def _shared(recipe: Recipe | InitRecipe) -> tuple[str, ...]:
    """Sharding over all GPUs, whose weights are gathered in bfloat16 where products are in it."""
    narrow = ("distributed.param_dtype=bfloat16",) if recipe.precision != "float32" else ()
    exact = ("precision=bfloat16",) if recipe.precision == "auto" else ()
    return ("distributed.shard=full", "distributed.replicas=null", *narrow, *exact)


def _for_more(recipe: Recipe | InitRecipe, gpus: int) -> tuple[str, ...]:
    shared = () if recipe.distributed.shard == "full" else _shared(recipe)
    parts = recipe.batch // (gpus // recipe.distributed.sequence)
    return (*shared, f"accumulation={parts}")
