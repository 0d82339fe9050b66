"""Linear layers with what follows them."""

from ..backends import EXTENSION_PROBLEM
from .api import fused_linear

if EXTENSION_PROBLEM is None:
    from . import fake  # noqa: F401

__all__ = ["fused_linear"]
