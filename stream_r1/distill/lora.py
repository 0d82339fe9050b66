"""Low-rank adapters, trained through peft in place of a network's own weights, which stay as they are.

Source: LoRA (2106.09685).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stream_r1.config import SettingsError
from stream_r1.disk.whole import written
from stream_r1.distill.settings import LoraSettings

_PREFIX = "base_model.model."  # peft's, before the names of the network's layers
_NAME = "default"  # of the adapter, in parameters' names


def require_peft() -> None:
    """Refuses to continue without the package. Raises SettingsError."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise SettingsError("lora: needs the package peft: pip install 'stream-r1[lora]'") from error


def add_adapters(model: nn.Module, settings: LoraSettings, seed: int) -> None:
    """Freezes a model and gives its layers adapters, in place; before any step they add nothing.

    Args:
        model: a transformer of ours or of diffusers.
        settings: which layers, and how.
        seed: of the adapters' first halves; the second halves are zeros.

    Raises:
        SettingsError: peft is missing, or a target that is no linear layer of the model.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    layers = dict(model.named_modules())
    for target in settings.targets:
        named = [name for name in layers if f".{name}".endswith(f".{target}")]
        others = [name for name in named if not isinstance(layers[name], nn.Linear)]
        if others or not named:
            found = f"{others[0]}, a {type(layers[others[0]]).__name__}" if others else "nothing of that name"
            raise SettingsError(
                f"lora.targets: expected ends of names of linear layers of the {type(model).__name__} "
                f"(as to_q or ffn.net.2), got {target!r}: {found}"
            )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha if settings.alpha is not None else settings.rank,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_NAME)


def is_adapted(model: nn.Module) -> bool:
    """Whether `add_adapters` was there."""
    return hasattr(model, "peft_config")


def save_adapter(model: nn.Module, state: dict[str, Tensor], folder: Path | str) -> None:
    """Writes adapters as peft does: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        model: whose they are.
        state: its state dict, whole.
        folder: made where it is missing.
    """
    from peft import get_peft_model_state_dict

    own: dict[str, Tensor] = get_peft_model_state_dict(model, state_dict=state, adapter_name=_NAME)
    tensors = {f"{_PREFIX}{name}": value.detach().cpu().contiguous() for name, value in own.items()}
    config: Any = model.peft_config[_NAME]  # type: ignore[index]
    with written(folder, replaces="adapter_*") as place:
        place.mkdir()
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(place)


def without_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's own weights under its own names, of a state dict with adapters."""
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
