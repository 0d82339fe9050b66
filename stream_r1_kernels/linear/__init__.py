"""Linear layers with what follows them."""

from . import autograd, fake  # noqa: F401
from .api import fused_linear

__all__ = ["fused_linear"]
