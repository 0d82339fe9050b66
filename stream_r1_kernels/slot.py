"""A chunk's place in one layer of a cache, in numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention.past import Past


class Slot(NamedTuple):
    """Where a chunk's keys and values lie in one layer, and the range that the chunk sees, itself included.

    Attributes:
        storage: of all layers, [L, 2, B, T, H, D].
        layer: index of the layer.
        start, stop: tokens of the chunk.
        visible_start, visible_stop: tokens of what it sees.
    """

    storage: Tensor
    layer: int
    start: int
    stop: int
    visible_start: int
    visible_stop: int

    def write(self, k: Tensor, v: Tensor) -> None:
        """Put keys and values [B, stop - start, H, D] there, in a compiled graph."""
        torch.ops.stream_r1.write_slot_(self.storage, k, v, self.layer, self.start)

    def views(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the chunk, [B, stop - start, H, D] each."""
        return self._tokens(self.start, self.stop)

    def visible(self) -> Past:
        """Keys and values that the chunk sees."""
        return Past(*self._tokens(self.visible_start, self.visible_stop), True)

    def _tokens(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        layer = self.storage.select(0, self.layer)  # storage[layer] would make a graph's integer a constant
        return layer[0, :, start:stop], layer[1, :, start:stop]
