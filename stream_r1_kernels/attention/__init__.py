"""Chunk-wise causal attention."""

from . import autograd, cuda_backward, fake  # noqa: F401
from .api import cached_chunk_attention, chunk_attention
from .mask import ChunkMask, RangeMask
from .past import Past

__all__ = ["ChunkMask", "Past", "RangeMask", "cached_chunk_attention", "chunk_attention"]
