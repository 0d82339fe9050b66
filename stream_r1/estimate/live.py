"""Follows memory: the bytes of the storages that ops make, from when they are made to when nobody holds them.

It sees what ops return, so what an op allocates inside and gives back is not in it, but for the backward of
our attention on a GPU, whose scratch is large and known.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from stream_r1.estimate.work import name_of, tensors_in

Bytes = dict[str, float]  # by part: "activations", "cache", ...
T = TypeVar("T")

_WEIGHTS = "weights"
BACKWARD_QUERIES = 512  # of which the attention's backward on a GPU keeps the scores at a time


@dataclass(frozen=True)
class Reading:
    """Bytes by part, over what there was before."""

    peak: Bytes
    after: Bytes


class _Begun(NamedTuple):
    live: Counter[str]
    peak: float
    at_peak: Counter[str]


class LiveBytes:
    """Counts the storages of the fake tensors that it sees made.

    Args:
        scratch: count what the attention's backward needs inside on a GPU.
    """

    def __init__(self, *, scratch: bool = False) -> None:
        self.live: Counter[str] = Counter()
        self._part = "activations"
        self._scratch = scratch
        self._known: dict[int, tuple[Any, str, int]] = {}  # by storage: reference, part, bytes
        self._peak: float = 0
        self._at_peak: Counter[str] = Counter()

    def ignore(self, tensor: Tensor) -> None:
        """A tensor that is counted elsewhere: a weight."""
        self._follow(tensor, _WEIGHTS, 0)

    def move(self, tensor: Tensor, part: str) -> None:
        """Counts a tensor as part of something else."""
        reference, old, size = self._known[_key(tensor)]
        self._known[_key(tensor)] = (reference, part, size)
        self.live[old] -= size
        self.live[part] += size

    def read(self, run: Callable[[], T], part: str = "activations") -> tuple[T, Reading]:
        """What `run` needs at most and leaves behind; what it makes is counted as `part`."""
        self._part = part
        begun = self.begin()
        result = run()
        return result, self.end(begun)

    def begin(self) -> _Begun:
        begun = _Begun(self.live.copy(), self._peak, self._at_peak)
        self._peak, self._at_peak = sum(self.live.values()), self.live.copy()
        return begun

    def end(self, begun: _Begun) -> Reading:
        reading = Reading(_less(self._at_peak, begun.live), _less(self.live, begun.live))
        if begun.peak > self._peak:
            self._peak, self._at_peak = begun.peak, begun.at_peak
        return reading

    def replay(self, reading: Reading) -> None:
        """Needs as much as was read before, for tensors that are gone again; others are followed as made."""
        total = sum(self.live.values()) + sum(reading.peak.values())
        if total > self._peak:
            self._peak, self._at_peak = total, self.live.copy()
            self._at_peak.update(reading.peak)

    def on_op(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        part = "working weights" if self._casts_weight(func, args) else self._part
        for x in tensors_in(result):
            if isinstance(x, FakeTensor) and _key(x) not in self._known:
                self._follow(x, part, x.untyped_storage().nbytes())
        scratch = _attention_scratch(func, args) if self._scratch else 0
        total = sum(self.live.values()) + scratch
        if total > self._peak:
            self._peak, self._at_peak = total, self.live.copy()
            self._at_peak[self._part] += scratch

    def _casts_weight(self, func: Any, args: Sequence[Any]) -> bool:
        if func.overloadpacket is not torch.ops.aten._to_copy or not isinstance(args[0], FakeTensor):
            return False
        known = self._known.get(_key(args[0]))
        return known is not None and known[1] == _WEIGHTS

    def _follow(self, tensor: Tensor, part: str, size: int) -> None:
        key = _key(tensor)
        reference = weakref.ref(tensor.untyped_storage(), lambda _: self._gone(key))
        self._known[key] = (reference, part, size)
        self.live[part] += size

    def _gone(self, key: int) -> None:
        _, part, size = self._known.pop(key)
        self.live[part] -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _less(a: Counter[str], b: Counter[str]) -> Bytes:
    return {part: a[part] - b[part] for part in a.keys() | b.keys() if a[part] != b[part]}


def _attention_scratch(func: Any, args: Sequence[Any]) -> int:
    """Of csrc/cuda/attention_bindings.cpp: float32 copies and gradients, and two matrices of scores."""
    name = name_of(func)
    if name == "stream_r1.cached_chunk_attention_backward":
        q, k, past = args[2], args[3], args[5]
        keys, past_keys = k.shape[1], 0 if past is None else past.shape[1]
    elif name == "stream_r1.chunk_attention_backward":
        q = args[1]
        keys, past_keys = q.shape[1], 0
    else:
        return 0
    batch, tokens, heads, width = q.shape
    rows = 4 * tokens + 4 * keys + 2 * past_keys  # q, grad_out, out, grad_q; k, v and theirs; the past
    scores = 2 * min(tokens, BACKWARD_QUERIES) * max(keys, past_keys)
    return 4 * batch * heads * (rows * width + scores)


def call_with_numbers(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Within fake tensors, computes what depends on no fake tensor and is made of integers.

    Models that compute with sizes and places of tokens in tensors get numbers, not guesses.
    """
    tensors = tensors_in((*args, *kwargs.values()))
    if tensors and not any(isinstance(x, FakeTensor) for x in tensors):
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    if func is torch.ops.aten.index.Tensor:
        args = (args[0], _places(args[1]), *args[2:])
    result = func(*args, **kwargs)
    places = func.overloadpacket is torch.ops.aten.linspace
    if not tensors and isinstance(result, Tensor) and (places or not result.is_floating_point()):
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    return result


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices of which those that are true or false, and known, are numbers: so their count is known."""
    out: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                out += index.nonzero(as_tuple=True)
        else:
            out.append(index)
    return out
