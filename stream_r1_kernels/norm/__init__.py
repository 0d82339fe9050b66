"""Per-frame AdaLN around the matmuls of a Wan block."""

from .api import gated_add, modulated_norm

__all__ = ["gated_add", "modulated_norm"]
