"""CUDA streams and events without a GPU: ops run at once, and what they would have waited for is recorded.

Every op is on a lane: "main" or "side", the two streams, or "host", Python on pinned memory. A lane's ops are
in order; events order ops of several. Vector clocks tell what is known to be over when an op begins: of each
lane, how many ops. A race is a read that does not know of the write, or a write that does not know of all
reads and writes before it. Memory that another lane than its own uses has to be kept for that lane, or the
allocator would give it away while it is read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Known = Counter[str]  # by lane


class Recorder(TorchDispatchMode):
    """Records ops while it is entered.

    Args:
        ignored: names of calls that have no effect, as if they had been forgotten: "wait main", "uses side",
            "synchronize", ...
    """

    def __init__(self, ignored: str = "") -> None:
        super().__init__()
        self.lane, self.ignored = "main", ignored
        self.known: dict[str, Known] = defaultdict(Counter)
        self.races: list[str] = []
        self.ops: list[tuple[str, Known]] = []  # lane, and what was known as it began
        self._written: dict[int, tuple[str, int]] = {}  # by storage: lane and number of the op
        self._read: dict[int, list[tuple[str, int]]] = defaultdict(list)
        self._owner: dict[int, str] = {}
        self._users: dict[int, set[str]] = defaultdict(set)
        self._kept: dict[int, set[str]] = defaultdict(set)
        self._pinned: set[int] = set()
        self._copying = False
        self._alive: list[Tensor] = []  # so that no two storages have one address

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        reads, writes = set(), set()
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            (writes if written else reads).update(self._storages(value))
        used = reads | writes
        lane = "host" if used & self._pinned and not self._copying else self.lane
        made = self._storages(result) - used
        self._owner |= dict.fromkeys(made, lane)
        self._record(lane, reads, writes | made, str(func))
        return result

    def unkept(self) -> int:
        """Storages that a lane used which is not theirs, without a word to the allocator."""
        return sum(
            bool(users - {self._owner[at]} - self._kept[at])
            for at, users in self._users.items()
            if at in self._owner and at not in self._pinned
        )

    @contextmanager
    def on(self, lane: str) -> Iterator[None]:
        before, self.lane = self.lane, lane
        try:
            yield
        finally:
            self.lane = before

    def keep(self, tensor: Tensor) -> None:
        if self.ignored != f"uses {self.lane}":
            self._kept[tensor.untyped_storage().data_ptr()].add(self.lane)

    def copied(self, tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor)
        self._pinned.add(host.untyped_storage().data_ptr())
        self._copying = True
        host.copy_(tensor)
        self._copying = False
        return host

    def _storages(self, value: Any) -> set[int]:
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel()]
        self._alive += tensors
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def _record(self, lane: str, reads: set[int], writes: set[int], name: str) -> None:
        known = self.known[lane] | self.known["host"]
        number = known[lane] + 1
        self.ops.append((lane, Counter(known)))
        for at in reads | writes:
            self._users[at].add(lane)
            earlier = [self._written[at]] if at in self._written else []
            if at in writes:
                earlier += self._read.pop(at, [])
            self.races += [f"{lane}: {name}" for other, op in earlier if known[other] < op]
        known[lane] = number
        self.known[lane] = known
        for at in writes:
            self._written[at] = (lane, number)
        for at in reads - writes:
            self._read[at].append((lane, number))


class RecordedSide:
    """In place of `SideStream`."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.uses, self.to_host = recorder.keep, recorder.copied

    def current(self) -> Any:
        return self._recorder.on("side")


def recorded_moments(recorder: Recorder) -> type:
    """In place of `Moment`."""

    class RecordedMoment:
        def __init__(self, device: torch.device | None = None) -> None:
            self._known = recorder.known[recorder.lane] | recorder.known["host"]

        def wait(self) -> None:
            if recorder.ignored != f"wait {recorder.lane}":
                recorder.known[recorder.lane] |= self._known

        def synchronize(self) -> None:
            if recorder.ignored != "synchronize":
                recorder.known["host"] |= self._known

        def query(self) -> bool:
            return self._known <= recorder.known["host"]

        def since(self, earlier: RecordedMoment) -> float:
            self.synchronize()
            return float((self._known - earlier._known).total())

    return RecordedMoment
