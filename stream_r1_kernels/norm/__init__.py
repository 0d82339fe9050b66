"""Per-frame AdaLN around the matmuls of a Wan block; the norm of its autoencoder."""

from . import autograd, fake  # noqa: F401
from .api import gated_add, modulated_norm, rms_norm, rms_norm_silu

__all__ = ["gated_add", "modulated_norm", "rms_norm", "rms_norm_silu"]
