"""A rank of a shared sequence without the others: what would come from them is counted, and none comes."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from stream_r1.estimate.work import Counting, Watching
from stream_r1.models.sequence import SequenceParallel


class CountedSequence(SequenceParallel):
    """The first of `size` ranks, on fake tensors. An exchange is one call of an op on the engine "link"."""

    def __init__(self, size: int) -> None:
        self.group, self.rank, self.size = None, 0, size

    def all_to_all(self, x: Tensor) -> Tensor:
        _count("all_to_all", x, x.nbytes // self.size * (self.size - 1))
        return torch.empty_like(x)

    def all_gather(self, x: Tensor) -> Tensor:
        _count("all_gather", x, x.nbytes * (self.size - 1))
        return x.new_empty(self.size, *x.shape)

    def all_reduce(self, x: Tensor) -> Tensor:
        _count("all_reduce", x, 2 * x.nbytes * (self.size - 1) // self.size)  # in parts, there and back
        return x


def _count(op: str, x: Tensor, received: int) -> None:
    for watcher in Watching.around():
        if isinstance(watcher, Counting):
            watcher.replay(Counter({(op, "link", x.dtype, 0, received, None): 1}))
