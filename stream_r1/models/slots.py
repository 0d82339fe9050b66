"""Where the chunks of a pass leave their keys and values, and what they see."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stream_r1_kernels import ChunkCache, Fp8ChunkCache, Past
from stream_r1_kernels.cache_fp8 import Fp8Slot
from stream_r1_kernels.slot import Slot


class FreshSlot(NamedTuple):
    """Where a chunk's keys and values go while it is sampled, and what it sees there: itself included."""

    views: tuple[Tensor, Tensor, Past] | None  # K and V [B, T, H, D / H], what it sees; None: a cache in FP8
    open: Callable[[], None] | None  # runs before anything is written
    place: Slot | Fp8Slot  # the same in numbers
    asked: bool  # whether anything is made of what its tokens see; else keys and values are all

    def views_to_write(self) -> tuple[Tensor, Tensor, Past] | None:
        """The views, where they may be written to: as inputs of a compiled graph they would keep their first
        offsets.
        """
        return None if torch.compiler.is_compiling() else self.views

    def write(self, k: Tensor, v: Tensor) -> Past | None:
        """Put keys and values [B, T, H, D / H] there. What the chunk sees then, if it is asked for."""
        views = self.views_to_write()
        if views is None:
            self.place.write(k, v)
            return self.place.visible() if self.asked else None
        slot_k, slot_v, visible = views
        slot_k.copy_(k)
        slot_v.copy_(v)
        return visible


def take_slots(cache: ChunkCache, chunks: int) -> tuple[Tensor, Tensor, list[tuple[FreshSlot, ...]]]:
    """Rotary phases (cos, sin) of the chunk under way and of those after it, [tokens of all, D / 2] each, and
    every layer's slots of them. The last of them is under way then, and it alone has tokens that the last
    layer is asked for.
    """
    phases, slots = [], []
    for place in range(chunks):
        if place > 0:
            cache.commit()
            cache.begin_chunk(renew_sink=False)
        phases.append(cache.positions())
        of_layers: list[FreshSlot] = []
        for number, layer in enumerate(cache.layers, 1):
            asked = number < len(cache) or place == chunks - 1
            renew = layer.renew_sink if place > 0 else None
            views = None if isinstance(cache, Fp8ChunkCache) else (*layer.slot(), layer.past(True))
            of_layers.append(FreshSlot(views, renew, layer.place(), asked))
        slots.append(of_layers)
    cos, sin = phases[0] if chunks == 1 else map(torch.cat, zip(*phases, strict=True))
    return cos, sin, list(zip(*slots, strict=True))
