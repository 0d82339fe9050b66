"""The weighted distribution-matching loss and its gradient."""

from . import autograd, fake  # noqa: F401
from .api import dmd_gradient_, dmd_loss

__all__ = ["dmd_gradient_", "dmd_loss"]
