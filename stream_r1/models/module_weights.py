"""Weights that are read past their module's call: whether they may be, and where they lie.

A fused op takes the weights of several modules at once. What others hang onto a module's call (hooks,
accelerate's and diffusers' offloading, storage in another dtype) acts in the call alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_plain(*modules: nn.Module) -> bool:
    """Whether nothing acts on the modules' calls: their weights are what a call would compute with."""
    for module in modules:
        if (
            "forward" in module.__dict__  # as accelerate and diffusers replace it
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return False
    return True


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter of the module itself; where accelerate keeps it elsewhere, a copy where the module runs.

    Raises:
        ValueError: diffusers' group offloading, which empties it but for the module's call.
    """
    hooks = getattr(module, "_diffusers_hook", None)
    if hooks is not None and hooks.get_hook("group_offloading") is not None:
        raise ValueError(
            f"{type(module).__name__}: {name}: expected weights that are there between calls (accelerate's "
            "cpu_offload, or the pipeline's offload=True), got diffusers' group offloading"
        )
    value: Tensor = getattr(module, name)
    if value is None or not value.is_meta:
        return value
    for hook in _align_hooks(module):
        if (kept := getattr(hook, "weights_map", None)) is not None:
            return kept[name].to(hook.execution_device)
    return value


def device_of(module: nn.Module, device: torch.device) -> torch.device:
    """Where the module runs: `device`, that of its parameters, unless accelerate keeps them elsewhere."""
    if device.type != "meta":
        return device
    for part in module.modules():
        for hook in _align_hooks(part):
            if (there := getattr(hook, "execution_device", None)) is not None:
                return torch.device(there)
    return device


def _align_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook] if hook is not None else []))
