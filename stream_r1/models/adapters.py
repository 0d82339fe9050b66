"""LoRA adapters of a student, in the folders that peft writes, merged into its weights.

Adapters are trained on transformers with either family of names; merged by name, both fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stream_r1.models.weight_files import CheckpointError, read_json, read_tensors, some
from stream_r1.models.weight_names import normalise

CONFIG = "adapter_config.json"

_LORA_NAME = re.compile(r"(.+)\.(lora_[AB])\.weight")

# What a plain LoRA adapter of linear layers has in its configuration, where it says anything else.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": ([], None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}


def merge_adapter(state: Mapping[str, Tensor], folder: str | Path) -> dict[str, Tensor]:
    """W + scale * B A for every layer that a LoRA adapter has, computed in float32 and kept in W's dtype.

    Args:
        state: weights under diffusers' names; not changed.
        folder: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`) as peft writes them. The
            scale is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.

    Raises:
        FileNotFoundError: no such folder or file.
        CheckpointError: another kind of adapter, or one for other layers or shapes, by name.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: expected a LoRA adapter's folder, found no {CONFIG}")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: expected peft_type LORA, got {config.get('peft_type')}")
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise CheckpointError(f"{folder}: expected {name} {plain[0]}, got {config[name]}")
    file = next(
        (f for f in sorted(folder.glob("adapter_model.*")) if f.suffix in (".safetensors", ".bin")), None
    )
    if file is None:
        raise FileNotFoundError(f"{folder}: expected adapter_model.safetensors, found none")

    tensors = normalise(
        {name.removeprefix("base_model.model."): value for name, value in read_tensors(file).items()},
        str(file),
    )
    halves: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}}
    for name, value in tensors.items():
        found = _LORA_NAME.fullmatch(name)
        if not found:
            raise CheckpointError(f"{file}: expected lora_A and lora_B of linear layers, found {name}")
        halves[found[2]][f"{found[1]}.weight"] = value
    down, up = halves["lora_A"], halves["lora_B"]
    alone = sorted(down.keys() ^ up.keys())
    unknown = sorted(name for name in down if name not in state)
    if alone or unknown or not down:
        problem = f"only one half of {some(alone)}" if alone else f"{some(unknown) or 'nothing'}"
        raise CheckpointError(f"{file}: expected lora_A and lora_B of the student's layers, found {problem}")

    merged = dict(state)
    for name, a in down.items():
        b, weight = up[name], state[name]
        if a.dim() != 2 or b.dim() != 2 or weight.shape != (len(b), a.shape[1]) or b.shape[1] != len(a):
            expected = f"[r, in] and [out, r] for {name} {list(weight.shape)}"
            raise CheckpointError(f"{file}: expected {expected}, got {list(a.shape)} and {list(b.shape)}")
        scale = config["lora_alpha"] / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        merged[name] = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)
    return merged
