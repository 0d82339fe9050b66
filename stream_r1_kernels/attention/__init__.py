"""Chunk-wise causal attention."""

from .api import cached_chunk_attention, chunk_attention
from .mask import ChunkMask
from .past import Past

__all__ = ["ChunkMask", "Past", "cached_chunk_attention", "chunk_attention"]
