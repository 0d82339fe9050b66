"""What the student takes from diffusers; without diffusers, the little of it that a forward pass needs.

The ops' tests and `benchmarks.gpu_check` run where torch is and little else. There a student can be made,
trained and given a state dict; folders are read and written by diffusers alone.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

if importlib.util.find_spec("diffusers") is not None:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
else:

    class ConfigMixin:  # type: ignore[no-redef]
        """Keeps the settings that a model was made with as `config`."""

        config: dict[str, Any]

        def register_to_config(self, **settings: Any) -> None:
            self.config |= settings

    def register_to_config(init: Any) -> Any:
        """An `__init__` that leaves its arguments in `config`."""

        @functools.wraps(init)
        def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = inspect.signature(init).bind(self, *args, **kwargs)
            bound.apply_defaults()
            self.config = {name: value for name, value in bound.arguments.items() if name != "self"}
            init(self, *args, **kwargs)

        return recorded

    class ModelMixin(nn.Module):  # type: ignore[no-redef]
        """A module that knows its dtype and device, and whose blocks can be computed again in a backward."""

        gradient_checkpointing = False
        _keep_in_fp32_modules: list[str] | None = None

        @property
        def dtype(self) -> torch.dtype:
            kept = self._keep_in_fp32_modules or ()
            return next(
                p.dtype for name, p in self.named_parameters() if not any(word in name for word in kept)
            )

        @property
        def device(self) -> torch.device:
            return next(self.parameters()).device

        def enable_gradient_checkpointing(self, function: Callable[..., Any] | None = None) -> None:
            self.gradient_checkpointing = True
            self._gradient_checkpointing_func = function or functools.partial(checkpoint, use_reentrant=False)

        @classmethod
        def from_pretrained(cls, folder: Any, **settings: Any) -> Any:
            raise ImportError(
                f"{cls.__name__}.from_pretrained: {folder}: needs diffusers, which is not installed"
            )

        def save_pretrained(self, folder: Any, **settings: Any) -> None:
            name = type(self).__name__
            raise ImportError(f"{name}.save_pretrained: {folder}: needs diffusers, which is not installed")


__all__ = ["ConfigMixin", "ModelMixin", "register_to_config"]
