"""Pages that stand elsewhere in the repository, as pages of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "assets/README.md": "assets.md",
    "tests/golden/README.md": "recorded-calls.md",
}
TEXTS = ("LICENSE", "NOTICE")
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")


def pages() -> dict[str, str]:
    """The site's pages and texts that are not in docs/, by their names there."""
    found = {}
    for source, page in PAGES.items():
        found[page] = with_links_of_the_site((ROOT / source).read_text(encoding="utf-8"), source)
    return found | {f"{name}.txt": (ROOT / name).read_text(encoding="utf-8") for name in TEXTS}


def with_links_of_the_site(text: str, source: str) -> str:
    """Links from one file of the repository to another, as links between pages.

    One to a file that is no page becomes a link that mkdocs refuses.
    """

    def on_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        if target in PAGES:
            return PAGES[target]
        return f"{target}.txt" if target in TEXTS else target.removeprefix("docs/")

    return _LINK.sub(on_site, text)
