"""Rotary positions on a grid of frames, rows and columns."""

from . import autograd, fake  # noqa: F401
from .api import qk_norm_rotary
from .grid import RotaryGrid
from .reference import apply_rotary

__all__ = ["RotaryGrid", "apply_rotary", "qk_norm_rotary"]
