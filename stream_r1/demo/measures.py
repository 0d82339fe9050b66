"""The rows of the table before / after: what is counted, what is compared, and what a judge says."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from stream_r1.demo.record import Number, Record
from stream_r1.drawn_world.measures import MEASURES as EXACT
from stream_r1.evaluation.report import MEASURES, Measure
from stream_r1.evaluation.single import FIGURES
from stream_r1.evaluation.spread import standard_error

COLUMNS = {"before": "Before", "after": "After", "teacher": "Teacher", "drawings": "Drawings"}
AXES = {"VQ": "visual quality", "MQ": "motion quality", "TA": "text alignment"}
_SURE = 2  # spreads that a change has to be larger than


class Row(NamedTuple):
    """One measure, by column."""

    name: str
    measure: Measure
    values: dict[str, Number]

    @property
    def change(self) -> tuple[float, float] | None:
        """after - before, and its spread: of the same prompts and noise, in pairs."""
        if not {"before", "after"} <= self.values.keys():
            return None
        before, after = self.values["before"], self.values["after"]
        pairs = zip(before.without, after.without, strict=True)
        return after.value - before.value, standard_error([b - a for a, b in pairs])

    @property
    def verdict(self) -> Literal["better", "worse", "unsure", ""]:
        """Whether it moved for the better, by more than its spread; nothing where that cannot be said."""
        if self.change is None:
            return ""
        change, spread = self.change
        if abs(change) <= _SURE * spread:
            return "unsure"
        better = self.measure.better
        if better != "near reference":
            return "better" if (change > 0) == (better == "higher") else "worse"
        if "drawings" not in self.values:
            return ""
        wanted = self.values["drawings"].value
        before, after = (abs(self.values[c].value - wanted) for c in ("before", "after"))
        return "better" if after < before else "worse"


def groups(record: Record) -> dict[str, list[Row]]:
    """Rows by the title that they stand under."""
    others = {"kid": ("KID", MEASURES["kid"])}
    others |= {
        name: (name.replace("_", " ").capitalize(), FIGURES[name]) for name in ("sharpness", "warp_error")
    }
    titled = {
        "Exact: counted, with nothing learnt": {
            name: (name.capitalize(), Measure("higher", meaning)) for name, meaning in EXACT.items()
        },
        "Compared with drawings": others,
        "A judge: a reward that did not guide the distillation": {
            f"judge/{axis}": (axis, Measure("higher", AXES.get(axis, "an axis of the judge")))
            for axis in record.judge_axes
        },
    }
    rows = {
        title: [Row(*named, values) for key, named in measures.items() if (values := _values(record, key))]
        for title, measures in titled.items()
    }
    return {title: found for title, found in rows.items() if found}


def columns(record: Record) -> list[str]:
    """Columns that have anything in them, in order."""
    return [name for name in COLUMNS if record.evaluations.get(name)]


def _values(record: Record, key: str) -> dict[str, Number]:
    found = {name: record.evaluations.get(name, {}).get(key) for name in COLUMNS}
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value.value)}
