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

from stream_r1.files import FileError, read_json
from stream_r1.messages import some
from stream_r1.models.tensor_files import require_finite
from stream_r1.models.weight_files import read_tensors
from stream_r1.models.weight_names import normalise

CONFIG = "adapter_config.json"

_LORA_NAME = re.compile(r"(.+)\.(lora_[AB])\.weight")

# How an adapter may begin: other ways (pissa, olora, loftq, corda, lora_ga, mica) change the weights that it
# is added to, which a folder of adapters does not hold.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
# Keys of a configuration that don't change what a plain adapter of linear layers adds, whatever they say.
_HARMLESS = frozenset(
    (
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config"),
        *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "ensure_weight_tying"),
    )
)


def merge_adapter(state: Mapping[str, Tensor], folder: str | Path) -> dict[str, Tensor]:
    """W + scale * B A for every layer that a LoRA adapter has, computed in float32 and kept in W's dtype.

    Args:
        state: weights under diffusers' names; not changed.
        folder: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`) as peft writes them. The
            scale is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.

    Raises:
        FileNotFoundError: no such folder or file.
        FileError: another kind of adapter, or one for other layers or shapes, by name.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: expected a LoRA adapter's folder, found no {CONFIG}")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise FileError(f"{folder}: expected peft_type LORA, got {some([config.get('peft_type')])}")
    _require_plain(config, folder / CONFIG)
    file = next(
        (f for f in sorted(folder.glob("adapter_model.*")) if f.suffix in (".safetensors", ".bin")), None
    )
    if file is None:
        raise FileNotFoundError(f"{folder}: expected adapter_model.safetensors, found none")

    tensors = normalise(
        {name.removeprefix("base_model.model."): value for name, value in read_tensors(file).items()},
        str(file),
    )
    require_finite(tensors.items(), str(file))
    halves: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}}
    for name, value in tensors.items():
        found = _LORA_NAME.fullmatch(name)
        if not found:
            raise FileError(f"{file}: expected lora_A and lora_B of linear layers, found {name}")
        if not value.is_floating_point():
            raise FileError(f"{file}: {name}: expected floating point, got {value.dtype}")
        halves[found[2]][f"{found[1]}.weight"] = value
    down, up = halves["lora_A"], halves["lora_B"]
    alone = sorted(down.keys() ^ up.keys())
    unknown = sorted(name for name in down if name not in state)
    if alone or unknown or not down:
        problem = f"only one half of {some(alone)}" if alone else f"{some(unknown) or 'nothing'}"
        raise FileError(f"{file}: expected lora_A and lora_B of the student's layers, found {problem}")

    merged = dict(state)
    for name, a in down.items():
        b, weight = up[name], state[name]
        if a.dim() != 2 or b.dim() != 2 or weight.shape != (len(b), a.shape[1]) or b.shape[1] != len(a):
            expected = f"[r, in] and [out, r] for {name} {list(weight.shape)}"
            raise FileError(f"{file}: expected {expected}, got {list(a.shape)} and {list(b.shape)}")
        if len(a) != config["r"]:
            expected = f"rank {config['r']} as in {CONFIG}"
            raise FileError(f"{file}: expected {expected}, got {len(a)} for {name}")
        scale = config["lora_alpha"] / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        merged[name] = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)
    return merged


def require_kept_base(config: Mapping[str, Any], file: Path) -> None:
    """Refuses an adapter that began by changing the weights that it is added to. Raises FileError."""
    begun = config.get("init_lora_weights")
    if begun not in _BEGINNINGS:
        raise FileError(
            f"{file}: expected init_lora_weights true, got {str(begun)[:40]!r}, which changes the weights "
            "that it is added to; save it as a plain adapter (peft: path_initial_model_for_weight_conversion)"
        )


def _require_plain(config: Mapping[str, Any], file: Path) -> None:
    """Refuses what adds anything but scale * B A to the weights that are there. Raises FileError."""
    require_kept_base(config, file)
    for name, value in config.items():
        expected = "none" if name == "bias" else False
        if name not in _HARMLESS and value and value != expected:
            raise FileError(f"{file}: expected {name} {str(expected).lower()}, got {str(value)[:80]}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise FileError(f"{file}: expected a rank r of at least 1, got {str(rank)[:40]}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise FileError(f"{file}: expected a number lora_alpha, got {str(alpha)[:40]}")
    if not isinstance(config.get("use_rslora", False), bool):
        raise FileError(f"{file}: expected use_rslora true or false, got {str(config['use_rslora'])[:40]}")
