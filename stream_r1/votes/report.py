"""What the votes say: win rates with intervals, agreement of the raters, tables and a page."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader
from scipy.stats import binomtest

from stream_r1.pages import LOOK
from stream_r1.votes.plan import CHECK
from stream_r1.votes.store import Vote


@dataclass(frozen=True)
class WinRate:
    """Of model `a` against model `b` on a question.

    `rate` is a's share of the votes that were no ties, `low` and `high` its 95 % interval after Wilson, `p`
    the two-sided probability of a split this uneven between equals. None where all were ties.
    """

    question: str
    a: str
    b: str
    wins: int
    losses: int
    ties: int
    rate: float | None
    low: float | None
    high: float | None
    p: float | None

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties


@dataclass(frozen=True)
class VoteReport:
    """Everything that is reported.

    Attributes:
        raters: whose votes count.
        failed: raters who preferred a damaged copy, or called it a tie, on any question.
        agreement: by question, Krippendorff's alpha of the answers to pairs that several raters saw: 1 is
            perfect, 0 what chance gives; None: no pair had two raters.
    """

    rates: list[WinRate]
    agreement: dict[str, float | None]
    raters: int
    failed: int
    votes: int


def summarise(votes: Iterable[Vote]) -> VoteReport:
    """The report of all votes."""
    votes = list(votes)
    failed = {v.rater for v in votes if CHECK in (v.left, v.right) and v.winner in (None, CHECK)}
    kept = [v for v in votes if v.rater not in failed and CHECK not in (v.left, v.right)]
    models = list(dict.fromkeys(name for v in kept for name in sorted((v.left, v.right))))
    questions = list(dict.fromkeys(v.question for v in kept))
    rates = []
    for question in questions:
        for i, a in enumerate(models):
            for b in models[i + 1 :]:
                pair = [v for v in kept if v.question == question and {v.left, v.right} == {a, b}]
                if pair:
                    rates.append(_rate(question, a, b, Counter(v.winner for v in pair)))
    agreement = {question: _agreement([v for v in kept if v.question == question]) for question in questions}
    raters = {v.rater for v in kept}
    return VoteReport(rates, agreement, len(raters), len(failed), len(kept))


def _rate(question: str, a: str, b: str, winners: Counter[str | None]) -> WinRate:
    wins, losses, ties = winners[a], winners[b], winners[None]
    if wins + losses == 0:
        return WinRate(question, a, b, wins, losses, ties, None, None, None, None)
    test = binomtest(wins, wins + losses)
    interval = test.proportion_ci(0.95, method="wilson")
    rate = wins / (wins + losses)
    return WinRate(question, a, b, wins, losses, ties, rate, interval.low, interval.high, test.pvalue)


def _agreement(votes: list[Vote]) -> float | None:
    by_item: dict[str, list[str | None]] = defaultdict(list)
    for vote in votes:
        by_item[vote.item].append(vote.winner)
    return krippendorff_alpha(by_item.values())


def krippendorff_alpha(units: Iterable[list[str | None]]) -> float | None:
    """Agreement on nominal values, of units that any number of raters valued.

    alpha = 1 - observed / expected disagreement (Krippendorff, Content Analysis, 2004, chapter 11). None
    where no unit has two values, or where all values are alike, of which nothing can be said.
    """
    units = [unit for unit in units if len(unit) > 1]
    total = sum(map(len, units))
    counts = Counter(value for unit in units for value in unit)
    if len(counts) < 2:
        return None
    observed = 0.0
    for unit in units:
        alike = sum(n * (n - 1) for n in Counter(unit).values())
        observed += (len(unit) * (len(unit) - 1) - alike) / (len(unit) - 1)
    expected = total * total - sum(n * n for n in counts.values())
    return 1.0 - (total - 1) * observed / expected


def as_csv(report: VoteReport) -> str:
    """A row a question and pair of models."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("question", "a", "b", "wins", "losses", "ties", "rate", "low", "high", "p")
    writer.writerow(names)
    for rate in report.rates:
        values = [getattr(rate, name) for name in names]
        writer.writerow([f"{x:.6g}" if isinstance(x, float) else "" if x is None else x for x in values])
    return text.getvalue()


def as_html(report: VoteReport, title: str) -> str:
    """A page that needs no network."""
    environment = Environment(loader=PackageLoader("stream_r1.votes", "."), autoescape=True)
    return environment.get_template("report.html.j2").render(report=report, title=title, look=LOOK)
