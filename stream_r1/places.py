"""Where files are that the project brings: the small world's weights and the recipes."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").is_file() else None
BROUGHT = ("assets", "recipes")
"""Folders of a checkout that an installed package has inside."""


def locate(path: str | Path) -> Path:
    """``path`` where the command runs; else in the checkout; else, for ``assets/...`` and ``recipes/...``, in
    the installed package; unchanged where it is in none of them.
    """
    path = Path(path)
    if path.is_absolute() or path.exists():
        return path
    roots = [_CHECKOUT] if _CHECKOUT is not None else [_PACKAGE] if path.parts[:1] in _NAMES else []
    return next((root / path for root in roots if (root / path).exists()), path)


_NAMES = [(name,) for name in BROUGHT]
