"""Hooks of mkdocs: what the site has beside docs/**/*.md."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from build_support.site import commands_page, formulas, recipes_page, root_pages

_FROM_A_NETWORK = re.compile(
    r'<(?:script|link|img|iframe|video|source)\b[^>]*(?:src|href)="(?:https?:)?//[^>]*>'
)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made from code, and those that stand elsewhere in the repository."""
    made = {"recipes.md": recipes_page.page(), "commands.md": commands_page.page()}
    for name, content in (made | root_pages.pages()).items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Draws the formulas."""
    return formulas.drawn(html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuses a page that would load something from a network."""
    found = _FROM_A_NETWORK.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri}: expected only files of the site, got {found[0]}")
    return output
