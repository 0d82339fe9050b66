"""What the reports share: a style on top of the pages' look, intervals as bars, pages of templates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from stream_r1.pages import LOOK
from stream_r1.study.differences import Difference

STYLE = LOOK + (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def render(package: str, template: str, context: dict[str, Any]) -> str:
    """A page of a package's template, which may import `parts.html.j2` and has `style` for its head."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("stream_r1.pages", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render({"style": STYLE, **context})


def reach(differences: Iterable[Difference]) -> float:
    """What the bars of these differences are drawn up to, on either side."""
    bounds = [x for d in differences for x in (d.low, d.high)]
    return max((abs(x) for x in bounds if math.isfinite(x)), default=0.0) or 1.0


def bar(change: Difference, reach: float, better: str) -> dict[str, Any]:
    """A difference as text and as a bar from -reach to reach, in per cent of its width."""
    verdict = ""
    if change.clear and better != "near reference":
        verdict = "better" if (change.mean > 0) == (better == "higher") else "worse"
    known = math.isfinite(change.low) and math.isfinite(change.high)
    ends = (change.low, change.high) if known else (change.mean, change.mean)
    at, low, high = (50 + 50 * value / reach for value in (change.mean, *ends))
    interval = f" ({signed(change.low)} to {signed(change.high)})" if known else ""
    return {
        "text": signed(change.mean) + interval,
        "at": at,
        "low": low,
        "width": high - low,
        "verdict": verdict,
        "filled": change.clear,
    }


def short(value: float | None) -> str:
    """A number for a table; a dash for none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}".replace("-", "−")


def signed(value: float) -> str:
    """A difference for a table."""
    return f"{value:+.3f}".replace("-", "−")
