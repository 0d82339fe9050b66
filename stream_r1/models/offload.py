"""CPU offload: one of several models is on a device, the others are in the CPU's memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ModelOffload:
    """Keeps at most one of several models on a device: the one at work.

    A model that is added waits on the CPU. `use` copies its weights to the device and lets go of the copy of
    the model before it; nothing is copied back, so what is written to weights on the device is lost. A model
    stays until another one is used.

    Args:
        device: where models work.
        models: those that are offloaded, frozen and in eval mode; a module of one is not another.
    """

    def __init__(self, device: torch.device | str, *models: nn.Module) -> None:
        self.device = torch.device(device)
        self._waiting: dict[nn.Module, list[tuple[nn.Module, str, Tensor]]] = {}  # owner, name, on the CPU
        self._here: nn.Module | None = None
        for model in models:
            self.add(model)

    def add(self, model: nn.Module, *, often: bool = True) -> None:
        """Offloads a model to the CPU.

        Args:
            often: it is used in every chunk, so its memory on the CPU is pinned, from which copies are fast.
        """
        if model in self._waiting:
            return
        moved: dict[int, Tensor] = {}  # weights that several layers share stay shared
        waiting = []
        for owner in model.modules():
            for name, tensor in _own_tensors(owner):
                if id(tensor) not in moved:
                    there = tensor.detach().to("cpu")
                    pins = often and self.device.type == "cuda"
                    moved[id(tensor)] = _like(tensor, there.pin_memory() if pins else there)
                waiting.append((owner, name, moved[id(tensor)]))
        self._waiting[model] = waiting
        self._put_back(model)

    def remove(self, model: nn.Module) -> None:
        """Leaves a model on the CPU, and knows nothing of it any more."""
        if model in self._waiting:
            self._put_back(model)
            del self._waiting[model]

    def use(self, model: nn.Module) -> None:
        """Onloads a model, and offloads the one before it. Does nothing for models that were not added."""
        if model is self._here or model not in self._waiting:
            return
        if self._here is not None:
            self._put_back(self._here)
        self._here = model
        copies: dict[int, Tensor] = {}
        try:
            for owner, name, waiting in self._waiting[model]:
                if id(waiting) not in copies:
                    copy = waiting.detach().to(self.device, copy=True, non_blocking=True)
                    copies[id(waiting)] = _like(waiting, copy)
                setattr(owner, name, copies[id(waiting)])
        except BaseException:  # out of memory, say: a part of a model is of no use there
            self._put_back(model)
            raise

    def _put_back(self, model: nn.Module) -> None:
        for owner, name, waiting in self._waiting[model]:
            setattr(owner, name, waiting)
        if self._here is model:
            self._here = None


def _own_tensors(owner: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of a module, without those of the modules in it; shared ones each time."""
    parameters = owner.named_parameters(recurse=False, remove_duplicate=False)
    return [*parameters, *owner.named_buffers(recurse=False, remove_duplicate=False)]


def _like(old: Tensor, tensor: Tensor) -> Tensor:
    """A parameter where the old one is a parameter."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=old.requires_grad)
    return tensor
