"""One layer's part of the streaming cache: its slot, and what the chunk under way sees of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from .attention.past import Past
from .cache_reuse import snapshot
from .graphs import integers_may_change
from .slot import Slot

if TYPE_CHECKING:
    from .cache import ChunkCache


class LayerCache:
    """One layer's part of a `ChunkCache`."""

    __slots__ = ("_cache", "_layer")

    def __init__(self, cache: ChunkCache, layer: int) -> None:
        self._cache = cache
        self._layer = layer

    def slot(self) -> tuple[Tensor, Tensor]:
        """Where the fresh chunk's keys and values go: views [B, T, H, D] into the buffer.

        Raises:
            ValueError: no chunk is under way, or a backward pass computes something again.
        """
        self._cache.moments.refuse_write("slot")
        return self._chunk_views()[:2]

    def write(self, k: Tensor, v: Tensor) -> None:
        """Put the fresh chunk's keys and values [B, T, H, D] into its slot.

        As copies into `slot()`. In a compiled graph this costs the slot alone, where a copy into a view may
        cost a walk through the whole buffer.

        Raises:
            ValueError: as `slot`.
        """
        if torch.compiler.is_compiling():
            self.place().write(k, v)
            return
        for part, value in zip(self.slot(), (k, v), strict=True):
            part.copy_(value)

    @integers_may_change
    def place(self) -> Slot:
        """The slot and what is visible with it as numbers: they stay those of this chunk.

        Raises:
            ValueError: no chunk is under way.
        """
        cache = self._cache
        cache._check_open("place, write")
        start, stop = cache._slot_start, cache._slot_start + cache._slot_tokens
        return Slot(cache.storage, self._layer, start, stop, cache._visible_start, cache._visible_stop)

    def renew_sink(self) -> None:
        """This layer's sink as the chunk under way sees it, after `begin_chunk(renew_sink=False)`."""
        self._cache._renew_sink(slice(self._layer, self._layer + 1))

    def _chunk_views(self) -> tuple[Tensor, Tensor, Past]:
        """The slot and what is visible with it: made once a chunk, for a small model's pass would notice."""
        self._cache._check_open("slot, past")
        if torch.compiler.is_compiling():  # in a graph they cost nothing, and it keeps one input, not many
            return self._make_views()
        views = self._cache._views.get(self._layer)
        if views is None:
            self._cache._invalidate(slice(self._layer, self._layer + 1))
            views = self._cache._views[self._layer] = self._make_views()
        return views

    def _make_views(self) -> tuple[Tensor, Tensor, Past]:
        place = self.place()
        return *place.views(), place.visible()

    @overload
    def past(self, holds_fresh: Literal[True], copy: bool = ...) -> Past: ...

    @overload
    def past(self, holds_fresh: bool, copy: bool = ...) -> Past | None: ...

    @integers_may_change
    def past(self, holds_fresh: bool, copy: bool = False) -> Past | None:
        """What the fresh chunk sees.

        Args:
            holds_fresh: True (sampling): the visible range of the buffer, with the fresh slot in it, no copy.
                False (training): what earlier chunks left; a view where that is one range, gathered where the
                slot lies amid it.
            copy: a snapshot, for a backward pass that comes after the memory was used again: after later
                chunks of a window, or after `reset()`. Without it such a backward pass raises.

        Returns:
            `Past` with keys and values [B, Tp, H, D], or None where there is no past (first chunk,
            holds_fresh=False).

        Raises:
            ValueError: no chunk is under way, or a backward pass computes an earlier chunk again.
        """
        self._cache.moments.refuse_earlier("past")
        if holds_fresh:
            return self._chunk_views()[2]
        cache = self._cache
        cache._check_open("past")
        k, v = cache.storage.select(0, self._layer)  # [] would make a graph's integer a constant
        start, stop = cache._visible_start, cache._visible_stop
        fresh_start = cache._slot_start
        fresh_stop = fresh_start + cache._slot_tokens
        compiling = torch.compiler.is_compiling()
        learns = compiling and torch.is_grad_enabled()  # a graph lends nothing
        if start < fresh_start and fresh_stop < stop:
            k, v = (torch.cat((x[:, start:fresh_start], x[:, fresh_stop:stop]), dim=1) for x in (k, v))
            return Past(snapshot(k), snapshot(v), False) if learns else Past(k, v, False)
        start, stop = (start, fresh_start) if start < fresh_start else (fresh_stop, stop)
        if start == stop:
            return None
        if copy or learns:
            return Past(snapshot(k[:, start:stop]), snapshot(v[:, start:stop]), False)
        if compiling:
            return Past(k[:, start:stop], v[:, start:stop], False)
        return Past(*cache.tracked.view(self._layer, cache.storage[self._layer], start, stop), False)
