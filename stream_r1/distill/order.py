"""The order in which data is seen: endless, shuffled, and described by two numbers."""

from __future__ import annotations

import torch


class ShuffledOrder:
    """Indices 0..count-1, shuffled again every epoch, indefinitely. Where it is, is two numbers.

    Args:
        count: how many things there are.
        seed: of the shuffling; epoch e of a seed is always the same permutation.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"ShuffledOrder: count must be at least 1, got {count}")
        self.count = count
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._shuffle()

    def _shuffle(self) -> None:
        mixed = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        self._order = torch.randperm(self.count, generator=mixed).tolist()

    def draw(self, size: int) -> list[int]:
        """The next `size` indices; an epoch ends where it ends, also amid a batch."""
        out: list[int] = []
        while len(out) < size:
            if self.position == self.count:
                self.epoch, self.position = self.epoch + 1, 0
                self._shuffle()
            take = self._order[self.position : self.position + size - len(out)]
            self.position += len(take)
            out += take
        return out

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["count"] != self.count:
            raise ValueError(f"ShuffledOrder: state is for {state['count']} items, expected {self.count}")
        self.epoch, self.position = state["epoch"], state["position"]
        self._shuffle()
