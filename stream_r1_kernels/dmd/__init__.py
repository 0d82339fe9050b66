"""The weighted distribution-matching loss and its gradient."""

from ..backends import EXTENSION_PROBLEM
from .api import dmd_gradient_, dmd_loss

if EXTENSION_PROBLEM is None:
    from . import fake  # noqa: F401

__all__ = ["dmd_gradient_", "dmd_loss"]
