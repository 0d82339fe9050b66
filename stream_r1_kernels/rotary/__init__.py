"""Rotary positions on a grid of frames, rows and columns."""

from ..backends import EXTENSION_PROBLEM
from .api import qk_norm_rotary
from .grid import RotaryGrid
from .reference import apply_rotary

if EXTENSION_PROBLEM is None:
    from . import fake  # noqa: F401

__all__ = ["RotaryGrid", "apply_rotary", "qk_norm_rotary"]
