"""Win rates and agreement, beside published values."""

from __future__ import annotations

import csv
import io

import pytest

from stream_r1.votes.plan import CHECK
from stream_r1.votes.report import as_csv, as_html, krippendorff_alpha, summarise
from stream_r1.votes.store import Vote


def vote(rater: str, prompt: int, left: str, right: str, answer: str, question: str = "overall") -> Vote:
    names = sorted((left, right))
    return Vote(rater, f"{prompt}|{names[0]}|{names[1]}", question, prompt, left, right, answer)


def test_the_interval_is_wilsons() -> None:
    votes = [vote("r", i, "a", "b", "left" if i < 15 else "right") for i in range(20)]
    votes += [vote("r", 20 + i, "b", "a", "tie") for i in range(5)]
    (rate,) = summarise(votes).rates
    assert (rate.a, rate.wins, rate.losses, rate.ties, rate.rate) == ("a", 15, 5, 5, 0.75)
    # Wilson 1927, 15 of 20, z = 1.96: centre (p + z^2/2n) / (1 + z^2/n) plus and minus its half width
    n, p, z = 20, 0.75, 1.959964
    centre, width = (p + z * z / 2 / n) / (1 + z * z / n), z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    assert rate.low == pytest.approx(centre - width / (1 + z * z / n), abs=1e-6)
    assert rate.high == pytest.approx(centre + width / (1 + z * z / n), abs=1e-6)


def test_sides_do_not_matter() -> None:
    one = summarise([vote("r", i, "a", "b", "left") for i in range(4)])
    other = summarise([vote("r", i, "b", "a", "right") for i in range(4)])
    assert one == other


def test_agreement_is_krippendorffs() -> None:
    # Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section B: two observers, 10 values
    first, second = "ababaaaaaa", "bababbaaaa"
    assert krippendorff_alpha(
        [list(pair) for pair in zip("0100000010", "1110010000", strict=True)]
    ) == pytest.approx(0.095, abs=5e-4)
    assert krippendorff_alpha([list(pair) for pair in zip(first, first, strict=True)]) == 1
    assert krippendorff_alpha([list(pair) for pair in zip(first, second, strict=True)]) < 1
    assert krippendorff_alpha([["a"], ["b"]]) is None
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None


def test_who_prefers_a_damaged_copy_is_left_out() -> None:
    votes = [
        vote("good", 0, "a", CHECK, "left"),
        vote("bad", 0, CHECK, "a", "left"),
        vote("even", 0, "a", CHECK, "tie"),
    ]
    votes += [vote(rater, 1, "a", "b", "left") for rater in ("good", "bad", "even")]
    report = summarise(votes)
    assert (report.raters, report.failed, report.votes) == (1, 2, 1)
    assert [(rate.a, rate.b) for rate in report.rates] == [("a", "b")]


def test_nothing_but_ties_and_nothing_at_all() -> None:
    report = summarise([vote("r", 0, "a", "b", "tie")])
    assert report.rates[0].rate is None
    assert "all ties" in as_html(report, "t")
    assert summarise([]).rates == []
    assert as_html(summarise([]), "<b>").count("&lt;b&gt;") == 2


def test_the_table_has_a_row_a_question_and_pair() -> None:
    votes = [
        vote("r", i, "a", "b", "left", question) for i in range(3) for question in ("dynamics", "overall")
    ]
    votes += [vote("r", 3, "c", "b", "right", "overall")]
    rows = list(csv.DictReader(io.StringIO(as_csv(summarise(votes)))))
    assert [(row["question"], row["a"], row["b"]) for row in rows] == [
        ("dynamics", "a", "b"),
        ("overall", "a", "b"),
        ("overall", "b", "c"),
    ]
    assert rows[2]["rate"] == "1"
