"""The rows of the table before / after: independent measures first, then the reward that guides."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from stream_r1.demo.record import Record
from stream_r1.evaluation.report import MEASURES

Better = Literal["lower", "higher", "near reference"]
COLUMNS = {"before": "Before", "after": "After", "teacher": "Teacher", "film": "Film"}
NAMES = {
    "kid": "KID",
    "naturalness": "Naturalness",
    "sharpness": "Sharpness",
    "warp_error": "Warp error",
    "motion": "Motion",
    "judder": "Judder",
    "prompt_match": "Prompt match",
}
AXES = {"VQ": "visual quality", "MQ": "motion quality", "TA": "text alignment"}


class Row(NamedTuple):
    """One measure, by column."""

    name: str
    meaning: str
    better: Better
    values: dict[str, float]

    @property
    def change(self) -> float | None:
        """after - before."""
        if "before" in self.values and "after" in self.values:
            return self.values["after"] - self.values["before"]
        return None

    @property
    def verdict(self) -> Literal["better", "worse", ""]:
        """Whether the change is for the better; nothing where that cannot be said."""
        change = self.change
        if not change:
            return ""
        if self.better != "near reference":
            return "better" if (change > 0) == (self.better == "higher") else "worse"
        if "film" not in self.values:
            return ""
        before, after = (abs(self.values[c] - self.values["film"]) for c in ("before", "after"))
        return "better" if after < before else "worse"


def independent_rows(record: Record) -> list[Row]:
    """What the distillation never sees."""
    rows = []
    for key, measure in MEASURES.items():
        values = _values(record, key)
        if values:
            rows.append(Row(NAMES.get(key, key), measure.meaning, measure.better, values))
    return rows


def reward_rows(record: Record) -> list[Row]:
    """What it is guided by."""
    rows = []
    for axis in record.axes:
        values = _values(record, f"reward/{axis}")
        if values:
            rows.append(Row(axis, AXES.get(axis, "an axis of the reward"), "higher", values))
    return rows


def columns(record: Record) -> list[str]:
    """Columns that have anything in them, in order."""
    return [name for name in COLUMNS if record.evaluations.get(name)]


def _values(record: Record, key: str) -> dict[str, float]:
    found = {name: record.evaluations.get(name, {}).get(key) for name in COLUMNS}
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
