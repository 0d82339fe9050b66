"""Per-frame AdaLN around the matmuls of a Wan block; the norm of its autoencoder."""

from ..backends import EXTENSION_PROBLEM
from .api import gated_add, modulated_norm, rms_norm, rms_norm_silu

if EXTENSION_PROBLEM is None:
    from . import fake  # noqa: F401

__all__ = ["gated_add", "modulated_norm", "rms_norm", "rms_norm_silu"]
