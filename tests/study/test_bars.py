"""The bars of a report: filled where the interval leaves out 0, and nowhere else."""

import re

import pytest

from stream_r1.pages.report import bar, render
from stream_r1.study.differences import Difference


@pytest.mark.parametrize(
    ("low", "high", "filled"), [(0.1, 0.5, True), (-0.1, 0.7, False), (float("nan"), float("nan"), False)]
)
def test_a_dot_is_filled_where_its_interval_leaves_out_0(tmp_path, monkeypatch, low, high, filled):
    (tmp_path / "shown_bar").mkdir()
    (tmp_path / "shown_bar" / "__init__.py").touch()
    (tmp_path / "shown_bar" / "page.j2").write_text(
        '{% from "parts.html.j2" import interval %}{{ interval(bar) }}'
    )
    monkeypatch.syspath_prepend(tmp_path)
    page = render("shown_bar", "page.j2", {"bar": bar(Difference(0.3, low, high, (0.3,)), 1.0, "higher")})
    dot = re.search(r'<b class="(\w*)" style="left:([\d.]+)%"', page)
    assert dot[1] == ("clear" if filled else "")
    assert float(dot[2]) == 65
    assert "nan" not in page
