"""Chunk-wise causal attention."""

from ..backends import EXTENSION_PROBLEM
from .api import cached_chunk_attention, chunk_attention
from .mask import ChunkMask
from .past import Past

if EXTENSION_PROBLEM is None:
    from . import fake  # noqa: F401

__all__ = ["ChunkMask", "Past", "cached_chunk_attention", "chunk_attention"]
