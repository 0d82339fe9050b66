"""Runs phases of a step on fake tensors, and estimates those of deep networks from two shallow ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

from stream_r1.estimate.live import Bytes, LiveBytes, call_with_numbers
from stream_r1.estimate.plan import Plan, Role
from stream_r1.estimate.streaming import as_on
from stream_r1.estimate.work import Counting, Watching, Work, fake_tensors, grown_work

T = TypeVar("T")


@dataclass(frozen=True)
class Phase:
    """Bytes by part, over what there was when it began, and calls of ops.

    Attributes:
        role: the network whose layers it runs through.
        passes: forward passes of it, each of which gathers the weights where they are divided.
        backward: whether it makes gradients.
        learns: the network whose update it belongs to.
        shown: what it leaves stays until the step is done.
    """

    name: str
    role: Role | None
    peak: Bytes
    after: Bytes
    work: tuple[Work, ...]
    passes: int = 0
    backward: bool = False
    learns: Role = "student"
    shown: bool = False


def grown(onto: Phase, a: Phase, b: Phase, times: int) -> Phase:
    """A phase and so many times what b has more than a."""
    return replace(
        onto,
        peak=_line(onto.peak, a.peak, b.peak, times),
        after=_line(onto.after, a.after, b.after, times),
        work=tuple(grown_work(onto.work, a.work, b.work, times)),
    )


def _line(onto: Bytes, a: Bytes, b: Bytes, times: int) -> Bytes:
    parts = sorted(onto.keys() | a.keys() | b.keys())
    return {part: onto.get(part, 0) + (b.get(part, 0) - a.get(part, 0)) * times for part in parts}


class Run:
    """Phases as they run, one after the other, within fake tensors."""

    def __init__(self, plan: Plan, stack: ExitStack) -> None:
        self.plan = plan
        self.phases: list[Phase] = []
        self.fake = stack.enter_context(fake_tensors())
        self._watching = stack.enter_context(Watching(call=call_with_numbers))
        if plan.device is not None:
            stack.enter_context(as_on(plan.device))
        # A GPU does not have oneDNN's convolutions, and neither do fake tensors.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of GPUs by Intel
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        self.live, self._counting = LiveBytes(scratch=plan.on_gpu), Counting()

    def begin(self, *modules: Any) -> None:
        """Follows memory from here on; the modules' weights are counted elsewhere."""
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.live.ignore(tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor))
        self._watching.watchers += [self.live, self._counting]

    def phase(
        self, name: str, role: Role | None, run: Callable[[], T], part: str = "activations", **more: Any
    ) -> T:
        begun = self._counting.begin()
        result, reading = self.live.read(run, part)
        work = tuple(self._counting.as_work(self._counting.end(begun)))
        self.phases.append(Phase(name, role, reading.peak, reading.after, work, **more))
        return result

    def precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.plan.half)
