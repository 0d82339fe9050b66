"""Formulas ($...$, $$...$$) become MathML, which browsers draw by themselves."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves where it found a formula.
_FORMULA = re.compile(
    r'<span class="arithmatex">\\\((?P<inline>.*?)\\\)</span>'
    r'|<div class="arithmatex">\\\[(?P<block>.*?)\\\]</div>',
    re.S,
)


def drawn(page: str) -> str:
    """A page's HTML with its formulas drawn."""
    return _FORMULA.sub(_as_mathml, page)


def _as_mathml(match: re.Match[str]) -> str:
    if match["inline"] is not None:
        return convert(html.unescape(match["inline"]))
    return f'<div class="formula">{convert(html.unescape(match["block"]).strip(), display="block")}</div>'
