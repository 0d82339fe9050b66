"""``stream-r1 votes``: the page of blind comparisons, and what the votes say."""

from __future__ import annotations

import secrets
from pathlib import Path

from rich.table import Table
from rich.text import Text

from stream_r1.commands.console import make_console
from stream_r1.commands.outputs import check_folder
from stream_r1.disk.whole import write_text
from stream_r1.votes.plan import Comparison, load
from stream_r1.votes.report import VoteReport, as_csv, as_html, summarise
from stream_r1.votes.store import VoteStore


def serve(recipe: Path, overrides: list[str], host: str, port: int) -> None:
    """Serve the page until Ctrl-C; votes are on the disk as they come."""
    try:
        import uvicorn

        from stream_r1.pages.application import LOCAL, page_address
        from stream_r1.votes.app import create_app
    except ImportError as error:
        raise RuntimeError(
            f"votes serve: needs fastapi and uvicorn: pip install 'stream-r1[serve]' ({error})"
        ) from None
    comparison = load(recipe, overrides)
    prepare(comparison)
    token = None if host in LOCAL else secrets.token_urlsafe(12)
    console = make_console()
    console.print(page_address(host, port, token), soft_wrap=True, highlight=False)
    console.print(f"votes: {comparison.database}; Ctrl-C ends it", soft_wrap=True, highlight=False)
    uvicorn.run(create_app(comparison, token), host=host, port=port, log_level="warning")


def prepare(comparison: Comparison) -> None:
    """Makes the damaged copies of the attention checks that are not there."""
    from stream_r1.votes.damage import write_damaged

    check_folder("out", comparison.out, comparison.settings.models)
    comparison.begin()
    first = next(iter(comparison.videos.values()))
    for index in comparison.checked:
        target = comparison.damaged(index)
        if not target.exists():
            write_damaged(first[index], target)


def report(recipe: Path, overrides: list[str]) -> None:
    """Show the table, and write report.html and report.csv beside the votes."""
    comparison = load(recipe, overrides)
    if not comparison.database.is_file():
        raise FileNotFoundError(
            f"{comparison.database}: no such file; expected votes: stream-r1 votes serve {recipe}"
        )
    comparison.require_same()
    found = summarise(VoteStore(comparison.database).votes())
    page = comparison.out / "report.html"
    write_text(page, as_html(found, f"Votes: {', '.join(comparison.settings.models)}"))
    write_text(page.with_suffix(".csv"), as_csv(found))
    console = make_console()
    console.print(_table(found))
    left_out = f", {found.failed} left out for a failed attention check" if found.failed else ""
    console.print(f"{found.votes} votes of {found.raters} raters{left_out}", highlight=False)
    console.print(str(page), soft_wrap=True, highlight=False)


def _table(found: VoteReport) -> Table:
    table = Table("question", "preferred", "to", "share", "95 % interval", "votes", "ties", "alpha")
    for rate in found.rates:
        shares = ["-", "-"]
        if rate.rate is not None and rate.low is not None and rate.high is not None:
            shares = [f"{rate.rate:.1%}", f"{rate.low:.1%} to {rate.high:.1%}"]
        alpha = found.agreement[rate.question]
        names = (rate.question, rate.a, rate.b)
        table.add_row(
            *(Text(name) for name in names),
            *shares,
            str(rate.votes),
            str(rate.ties),
            "-" if alpha is None else f"{alpha:.2f}",
        )
    return table
