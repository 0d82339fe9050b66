"""Hooks of mkdocs: what the site has beside docs/**/*.md."""

from __future__ import annotations

from typing import Any

from mkdocs.structure.files import File, Files

from build_support.site import commands_page, formulas, recipes_page, root_pages


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made from code, and those that stand elsewhere in the repository."""
    made = {"recipes.md": recipes_page.page(), "commands.md": commands_page.page()}
    for name, content in (made | root_pages.pages()).items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Draws the formulas."""
    return formulas.drawn(html)
