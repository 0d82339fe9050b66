"""The streaming cache in FP8: float8_e4m3fn keys and values with a scale a token and head.

A byte a number and four a head's row: half the memory of bfloat16. What a chunk sees is dequantised when it
is read, for one layer at a time; keys and values of the chunk under way are stored, and seen, in FP8 too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention.past import Past
from .cache import ChunkCache
from .fp8 import QuantizedRows, quantize_rows
from .fp8.rows import FP8
from .graphs import renew_sinks_
from .layer_cache import LayerCache
from .sink import kept_sink


class Fp8Slot(NamedTuple):
    """`Slot` of a cache in FP8.

    Attributes:
        storage, scales: of all layers, [L, 2, B, T, H, D] and [L, 2, B, T, H, 1].
        dtype: in which keys and values are read.
        layer, start, stop, visible_start, visible_stop: as of `Slot`.
    """

    storage: Tensor
    scales: Tensor
    dtype: torch.dtype
    layer: int
    start: int
    stop: int
    visible_start: int
    visible_stop: int

    def write(self, k: Tensor, v: Tensor) -> None:
        """Put keys and values [B, stop - start, H, D] there."""
        for part, x in enumerate((k, v)):
            self._store(part, self.start, self.stop, x)

    def visible(self) -> Past:
        """Keys and values that the chunk sees, in memory of their own."""
        k, v = (self._read(part, self.visible_start, self.visible_stop) for part in (0, 1))
        return Past(k, v, True)

    def _store(self, part: int, start: int, stop: int, x: Tensor) -> None:
        rows = quantize_rows(x.flatten(1, 2))
        self.storage[self.layer, part, :, start:stop].copy_(rows.data.view(x.shape))
        self.scales[self.layer, part, :, start:stop].copy_(rows.scale.view(*x.shape[:3], 1))

    def _read(self, part: int, start: int, stop: int) -> Tensor:
        where = (self.layer, part, slice(None), slice(start, stop))
        return QuantizedRows(self.storage[where], self.scales[where]).dequantize(self.dtype)


class Fp8ChunkCache(ChunkCache):
    """A `ChunkCache` that keeps keys and values in FP8.

    Its sink, where it is averaged or moves, is kept as in a `ChunkCache`, and quantised once a chunk.

    Args:
        dtype: in which keys and values come and are read; the rest as for `ChunkCache`.
    """

    scales: Tensor

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
        self.dtype = dtype
        self.scales = torch.zeros(*shape[:-1], 1, device=device)
        return torch.zeros(shape, dtype=FP8, device=device)

    def _keep_sink(self) -> tuple[Tensor | None, Tensor | None]:
        if self.window_frames is None or self.sink_frames == 0:
            return None, None
        shape = self.storage[:, 0, :, : self.sink_frames * self.tokens_per_frame].shape
        sink = torch.zeros((), dtype=self.dtype, device=self.storage.device).expand(shape)
        return kept_sink(sink, self.ema, turns=self.moves_sink, moves=self._layout.spare > 0)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, their scales and the kept sink included."""
        return super().nbytes + self.scales.nbytes

    def _of(self, layer: int) -> LayerCache:
        return Fp8LayerCache(self, layer)

    @torch.no_grad()
    def _renew_sink(self, layers: slice) -> None:
        if self._moves:
            start, end = self.sink_frames * self.tokens_per_frame, self.capacity * self.tokens_per_frame
            for part in (self.storage[layers], self.scales[layers]):
                part[:, :, :, start : start + self._moves] = part[:, :, :, end : end + self._moves]
        if self._renewal is None or self._sink_k is None:
            return
        place, tokens = self._surplus, self._sink_k.shape[2]
        for layer in range(len(self))[layers]:
            whole = Fp8Slot(
                self.storage, self.scales, self.dtype, layer, place, place + tokens, 0, self.storage.shape[3]
            )
            seen = whole.visible()
            read = torch.stack((seen.k, seen.v))[None]
            one = slice(layer, layer + 1)
            sink_v = None if self._sink_v is None else self._sink_v[one]
            renew: Any = renew_sinks_
            renew(read, self._sink_k[one], sink_v, 0, 1, *self._renewal, place)
            for index in (0,) if sink_v is None else (0, 1):  # values that stay are not rounded again
                whole._store(index, place, place + tokens, read[0, index, :, place : place + tokens])


class Fp8LayerCache(LayerCache):
    """One layer's part of an `Fp8ChunkCache`."""

    __slots__ = ()

    _cache: Fp8ChunkCache

    def slot(self) -> tuple[Tensor, Tensor]:
        """Raises ValueError: there is nothing to write numbers to; use `write`."""
        raise ValueError("Fp8ChunkCache: slot: expected write(k, v), as keys and values are kept in FP8")

    def write(self, k: Tensor, v: Tensor) -> None:
        """As `LayerCache.write`."""
        self._cache.moments.refuse_write("write")
        self.place().write(k, v)

    def place(self) -> Fp8Slot:  # type: ignore[override]
        """As `LayerCache.place`."""
        place, cache = super().place(), self._cache
        return Fp8Slot(cache.storage, cache.scales, cache.dtype, *place[1:])

    def past(self, holds_fresh: bool, copy: bool = False) -> Past | None:  # type: ignore[override]
        """As `LayerCache.past`; always a copy."""
        self._cache.moments.refuse_earlier("past")
        place = self.place()
        if holds_fresh:
            return place.visible()
        ranges = [(place.visible_start, place.start), (place.stop, place.visible_stop)]
        ranges = [(start, stop) for start, stop in ranges if start < stop]
        if not ranges:
            return None
        k, v = (torch.cat([place._read(part, *each) for each in ranges], dim=1) for part in (0, 1))
        return Past(k, v, False)
