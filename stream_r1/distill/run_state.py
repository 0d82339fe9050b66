"""What the rest of a training run depends on, and so what a checkpoint of it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stream_r1.distill.checkpoint_files import flatten
from stream_r1.distill.guard import Guard, require_guard
from stream_r1.distill.order import ShuffledOrder
from stream_r1.distill.ranks import Ranks
from stream_r1.distill.sharding import local
from stream_r1.distill.verification import CheckpointError, Expected, require_history, require_order
from stream_r1.distill.weighting import StreamR1Weights

Parts = dict[str, dict[str, Tensor]]
"""Tensors by part ("student", "critic_optimizer", ...) and name."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors: "<parameter>/<what>". Its settings are the caller's to keep."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{key}": value for index, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes: all, or adapters."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state without the weights that training leaves as they are."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


def load_trained(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies what `trained_state` gave into a model. Raises CheckpointError if they do not match."""
    try:
        missing = trained_state(model).keys() - tensors.keys()
        if missing:
            raise RuntimeError(f"missing {', '.join(sorted(missing))}")
        unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
        if unexpected:
            raise RuntimeError(f"unexpected {', '.join(unexpected)}")
    except RuntimeError as error:
        raise CheckpointError(
            f"{type(model).__name__}: the checkpoint is of another model: {error}"
        ) from error


class Ema:
    """Moving average of a model's parameters in float32; the parameters themselves before `start`.

    Args:
        model: what is averaged, of it what is trained.
        decay: of the average, per update.
        start: first step that is averaged; the average begins as a copy then.
    """

    def __init__(self, model: nn.Module, decay: float, start: int = 0) -> None:
        self.model = model
        self.decay = decay
        self.start = start
        self.average: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self, step: int) -> None:
        if step < self.start:
            return
        parameters = trained(self.model)
        if self.average is None:
            self.average = {name: p.detach().float().clone() for name, p in parameters.items()}
            return
        for name, p in parameters.items():
            self.average[name].lerp_(p.detach().float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with the averaged weights in it; its own come back afterwards."""
        if self.average is None:
            yield self.model
            return
        with self.replaced(self.average):
            yield self.model

    @contextmanager
    def replaced(self, weights: dict[str, Tensor]) -> Iterator[nn.Module]:
        """The model with other weights in it; its own come back afterwards."""
        own = {name: p.detach().clone() for name, p in trained(self.model).items()}
        self._fill(weights)
        try:
            yield self.model
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, p in trained(self.model).items():
            p.copy_(values[name])
        torch.clear_autocast_cache()  # its narrow copies are of the weights before

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.average or {})

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        device = next(self.model.parameters()).device
        self.average = {name: value.to(device) for name, value in tensors.items()} or None


@dataclass
class RunState:
    """The state of a run.

    networks: what is trained, by part; "student" is among them.
    optimizers: each with the network whose parameters it has, by part.
    ema: the student's average.
    order, random: where the run is in its data and in its draws.
    weights: the reward's, with the history of its scores; None without a reward.
    guard: what it saw, and the weights that it keeps; None without one.
    step: steps done.
    skipped: updates in a row that were not finite, by network.
    """

    networks: dict[str, nn.Module]
    optimizers: dict[str, tuple[str, torch.optim.Optimizer]]
    ema: Ema
    order: ShuffledOrder
    random: torch.Generator
    weights: StreamR1Weights | None = None
    guard: Guard | None = None
    step: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def tensors(self) -> Parts:
        return {
            **{name: trained_state(model) for name, model in self.networks.items()},
            "ema": self.ema.tensors(),
            "kept": dict(self.guard.kept) if self.guard is not None else {},
            **{part: optimizer_tensors(optimizer) for part, (_, optimizer) in self.optimizers.items()},
            "draws": {"random": self.random.get_state()},
        }

    def values(self) -> dict[str, Any]:
        """The rest of it, as JSON can hold it."""
        own: dict[str, Any] = {"order": self.order.state_dict()}
        if self.weights is not None:
            own["weights"] = self.weights.state_dict()
        if self.guard is not None:
            own["guard"] = self.guard.state_dict()
        return {"step": self.step, "skipped": self.skipped, "own": own}

    def check_values(self, own: dict[str, Any], source: str) -> None:
        """Raises CheckpointError for anything that this run's `values` would not give."""
        require_order(own.get("order"), self.order.count, f"{source}: order")
        if self.weights is not None and own.get("weights") is not None:
            require_history(own["weights"], self.weights.state_dict(), f"{source}: weights")
        if self.guard is not None and own.get("guard") is not None:
            require_guard(own["guard"], f"{source}: guard")

    def restore(self, parts: Parts, values: dict[str, Any]) -> None:
        """Takes back what `tensors` and `values` gave."""
        for name, model in self.networks.items():
            load_trained(model, parts[name])
        self.ema.load_tensors(parts.get("ema", {}))
        for part, (_, optimizer) in self.optimizers.items():
            load_optimizer_tensors(optimizer, parts.get(part, {}))
        self.random.set_state(parts["draws"]["random"])
        own = values["own"]
        self.order.load_state_dict(own["order"])
        if self.weights is not None and own.get("weights") is not None:
            self.weights.load_state_dict(own["weights"])
        if self.guard is not None and own.get("guard") is not None:
            device = next(self.networks["student"].parameters()).device
            kept = {name: value.to(device) for name, value in parts.get("kept", {}).items()}
            self.guard.load_state_dict(own["guard"], kept)
        self.step = values["step"]
        self.skipped.clear()  # the optimizer steps count in it
        self.skipped.update(values["skipped"])

    @contextmanager
    def best(self) -> Iterator[nn.Module]:
        """The student as it is to be used: its average, or what the guard kept before an alarm."""
        if self.guard is not None and self.guard.stops and self.guard.kept:
            with self.ema.replaced(self.guard.kept) as student:
                yield student
        else:
            with self.ema.applied() as student:
                yield student

    def all_finite(self, ranks: Ranks) -> bool:
        """Whether no updates are being skipped and every number is finite, on all ranks."""
        if any(self.skipped.values()):
            return False
        tensors = (local(t) for t in flatten(self.tensors()).values())
        return not ranks.any(not all(bool(t.isfinite().all()) for t in tensors))

    def expected(self) -> Expected:
        """What every checkpoint of this run holds."""
        own = self.tensors()
        return Expected(
            models={name: own[name] for name in self.networks},
            averages=dict.fromkeys(("ema", "kept"), trained(self.networks["student"])),
            optimizers={
                part: [p for group in optimizer.param_groups for p in group["params"]]
                for part, (_, optimizer) in self.optimizers.items()
            },
            generators={"draws": own["draws"]},
        )

    def parameter_of(self, key: str, shape: torch.Size) -> Tensor | None:
        """The parameter that a tensor of a checkpoint belongs to, and is sharded as, if it has its shape.

        Keys are <part>/<parameter> or, of optimizers, <part>/<parameter's index>/<what>.
        """
        part, _, name = key.partition("/")
        owner = (
            self.optimizers[part][0]
            if part in self.optimizers
            else "student"
            if part in ("ema", "kept")
            else part
        )
        model = self.networks.get(owner)
        if model is None:
            return None
        index = name.partition("/")[0]
        parameter: Tensor | None
        if index.isdigit():
            parameter = list(trained(model).values())[int(index)]
        else:
            parameter = dict(model.named_parameters()).get(name)
        return parameter if parameter is not None and parameter.shape == shape else None
