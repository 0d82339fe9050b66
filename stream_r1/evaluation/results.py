"""What an evaluation found, from the files of its pieces: figures with intervals, curves, tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stream_r1.evaluation.drift import CURVES, changes_over
from stream_r1.evaluation.kid import kernel_distances
from stream_r1.evaluation.latency import Latency, latency, latency_figures
from stream_r1.evaluation.make import Made, read_made
from stream_r1.evaluation.parts import Measuring, measurings, read_result
from stream_r1.evaluation.plan import Evaluation, Video
from stream_r1.evaluation.reference import Reference
from stream_r1.evaluation.report import MEASURES, Measure
from stream_r1.evaluation.single import FIGURES
from stream_r1.evaluation.vbench import Totals, read_results, totals
from stream_r1.files import FileError
from stream_r1.recipe import locate
from stream_r1.study.differences import Difference, difference

Numbers = dict[int, NDArray[np.float64]]
"""By prompt: a number a video of it, nan where there is none."""

GROUPS = {
    "figures": "Single videos",
    "reward": "The reward's axes",
    "judge": "The judges",
    "drift": "Change from the first tenth of a stream to its last",
    "latency": "Latency of each stream",
}
_LATENCY = {
    "first frame": Measure("lower", "seconds from asking to the first chunk's frames"),
    "chunk": Measure("lower", "seconds from chunk to chunk, the median of a stream, with writing"),
    "missed": Measure("lower", "share of chunks that came later than a player needed them"),
}


@dataclass(frozen=True)
class Row:
    """One figure of one model: its mean with the 95 % interval, and the difference from the base."""

    model: str
    own: Difference
    change: Difference | None


@dataclass(frozen=True)
class Figure:
    group: str  # of `GROUPS`
    name: str
    measure: Measure
    rows: list[Row]


@dataclass(frozen=True)
class Curve:
    """Of one model over the windows of a stream, [windows] each: mean over videos, and the range of the
    middle eight tenths of them.
    """

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass
class Found:
    """Everything that is reported, by model where it is a mapping; what is not there is left out.

    curves: by name. refused: by judge and axis, answers without a number. done: pieces that are there.
    """

    made: dict[str, list[Made]] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    latency: dict[str, Latency] = field(default_factory=dict)
    vbench: dict[str, dict[str, float]] = field(default_factory=dict)
    totals: dict[str, Totals] = field(default_factory=dict)
    refused: dict[str, dict[str, int]] = field(default_factory=dict)


def collect(evaluation: Evaluation) -> Found:
    """From the files. Raises FileError for one that can't be read."""
    found = Found()
    figures: dict[tuple[str, str], dict[str, Numbers]] = {}
    curves: dict[str, dict[str, list[list[float]]]] = {}
    features: dict[str, dict[Video, list[list[float]]]] = {}
    parts = measurings(evaluation.settings)
    for model in evaluation.settings.models:
        for video in evaluation.videos:
            made = read_made(evaluation, model, video)
            if made is None:
                continue
            found.made.setdefault(model, []).append(made)
            if "latency" in evaluation.settings.parts:
                for name, value in latency_figures(made).items():
                    _put(evaluation, figures, ("latency", name), model, video, value)
            for part in parts:
                result = read_result(evaluation, model, part, video)
                if result is not None:
                    for key, value in _values(part, result, found, model):
                        _put(evaluation, figures, key, model, video, value)
                    for name, curve in result.get("curves", {}).items():
                        curves.setdefault(name, {}).setdefault(model, []).append(curve)
                    if result.get("features"):
                        features.setdefault(model, {})[video] = result["features"]
        if "latency" in evaluation.settings.parts and found.made.get(model):
            found.latency[model] = latency(found.made[model])
        if evaluation.settings.vbench is not None:
            scores = read_results(evaluation.vbench_results(model))
            if scores:
                found.vbench[model] = scores
            if (all_of_it := totals(scores)) is not None:
                found.totals[model] = all_of_it
    for model, values in _kid(evaluation, features).items():
        for video, value in values.items():
            _put(evaluation, figures, ("figures", "kid"), model, video, value)
    found.figures = [_figure(evaluation, key, by_model) for key, by_model in figures.items()]
    found.figures.sort(key=lambda figure: list(GROUPS).index(figure.group))
    found.curves = {
        name: {model: _curve(rows) for model, rows in curves[name].items()}
        for name in CURVES
        if name in curves
    }
    return found


def _values(
    part: Measuring, result: dict[str, Any], found: Found, model: str
) -> Iterable[tuple[tuple[str, str], float]]:
    """(group, name) and value of everything that one file has."""
    try:
        for name, value in result.get("figures", {}).items():
            yield ("figures", name), _number(value)
        for axis, value in result.get("axes", {}).items():
            yield ("reward", axis), _number(value)
        for name, curve in result.get("curves", {}).items():
            yield ("drift", name), changes_over([_number(value) for value in curve])
        for axis, rating in result.get("ratings", {}).items():
            judge = part.name.removeprefix("judge-")
            if rating["digit"] is None:
                refused = found.refused.setdefault(f"{judge}: {axis}", {})
                refused[model] = refused.get(model, 0) + 1
            yield ("judge", f"{judge}: {axis}"), _number(rating["expected"])
            yield ("judge", f"{judge}: {axis}, digit"), _number(rating["digit"])
    except (TypeError, KeyError, AttributeError) as error:
        raise FileError(
            f"results of {part.name}: expected numbers by name, got something else: {error!r}"
        ) from None


def _number(value: Any) -> float:
    if value is None:
        return float("nan")
    if type(value) not in (int, float):
        raise TypeError(f"{value!r}")
    return float(value)


def _put(
    evaluation: Evaluation,
    figures: dict[tuple[str, str], dict[str, Numbers]],
    key: tuple[str, str],
    model: str,
    video: Video,
    value: float,
) -> None:
    numbers = figures.setdefault(key, {}).setdefault(model, {})
    numbers.setdefault(video.index, np.full(evaluation.settings.videos, np.nan))[video.copy] = value


def _figure(evaluation: Evaluation, key: tuple[str, str], by_model: dict[str, Numbers]) -> Figure:
    group, name = key
    base, rows = evaluation.settings.base, []
    for model, numbers in by_model.items():
        own = _difference(numbers, {index: np.zeros_like(values) for index, values in numbers.items()})
        if own is None:
            continue
        other = by_model.get(base)
        change = _difference(numbers, other) if other is not None and model != base else None
        rows.append(Row(model, own, change))
    return Figure(group, name, _meaning(group, name), rows)


def _difference(numbers: Numbers, against: Numbers) -> Difference | None:
    """In pairs; of a single pair nothing is known but the difference: no interval."""
    found = difference(numbers, against)
    pairs = [numbers[index] - against[index] for index in numbers.keys() & against.keys()]
    if found is None or sum(int(np.isfinite(pair).sum()) for pair in pairs) > 1:
        return found
    return found._replace(low=float("nan"), high=float("nan"))


def _meaning(group: str, name: str) -> Measure:
    if group == "figures":
        return FIGURES.get(name) or MEASURES[name]
    if group == "latency":
        return _LATENCY[name]
    if group == "drift":
        return Measure("near reference", f"{CURVES[name].meaning}; 0 is no drift")
    if group == "judge":
        what = (
            "the digit that was written" if name.endswith(", digit") else "by the probabilities of the digits"
        )
        return Measure("higher", f"1 to 5, {what}")
    return Measure("higher", "an axis of the reward")


def _curve(rows: list[list[float]]) -> Curve:
    length = min(map(len, rows))
    values = np.array([[_number(value) for value in row[:length]] for row in rows])
    low, mean, high = np.full((3, length), np.nan)
    for n in range(length):
        column = values[np.isfinite(values[:, n]), n]
        if len(column):
            mean[n] = column.mean()
            low[n], high[n] = np.quantile(column, (0.1, 0.9))
    return Curve(mean, low, high)


def _kid(
    evaluation: Evaluation, features: dict[str, dict[Video, list[list[float]]]]
) -> dict[str, dict[Video, float]]:
    """KID of each model as a number a video, whose mean it is: what a video adds, by the jackknife (N - 1
    times how much KID falls where the video is left out, about the mean of that).
    """
    if evaluation.settings.reference is None:
        return {}
    reference = Reference.load(locate(evaluation.settings.reference)).features
    found = {}
    for model, by_video in features.items():
        rows = list(by_video.values())
        if len(rows) > 1 and all(len(row) == len(rows[0]) > 1 for row in rows):
            flat = torch.tensor([frame for row in rows for frame in row])
            total, *without = kernel_distances(flat, reference, len(rows[0]))
            usual = sum(without) / len(rows)
            added = [total + (len(rows) - 1) * (usual - w) for w in without]
            found[model] = dict(zip(by_video, added, strict=True))
    return found


def as_csv(found: Found) -> str:
    """A row a figure and model: mean, its interval, the difference from the base, its interval."""
    header = (
        "group",
        "figure",
        "model",
        "mean",
        "low",
        "high",
        "difference",
        "difference_low",
        "difference_high",
    )
    rows = []
    for figure in found.figures:
        for row in figure.rows:
            change = [""] * 3 if row.change is None else _three(row.change)
            rows.append((figure.group, figure.name, row.model, *_three(row.own), *change))
    rows += [
        ("vbench", name, model, f"{value:.6g}", *[""] * 5)
        for model, scores in found.vbench.items()
        for name, value in (scores | (found.totals[model]._asdict() if model in found.totals else {})).items()
    ]
    rows += [
        ("latency of all", name, model, f"{value:.6g}", *[""] * 5)
        for model, found_out in found.latency.items()
        for name, value in found_out._asdict().items()
    ]
    return _table(header, rows)


def curves_csv(evaluation: Evaluation, found: Found) -> str:
    """A row a curve, model and window."""
    window = evaluation.settings.window_seconds
    rows = [
        (name, model, f"{(n + 0.5) * window:.3f}", *(f"{x[n]:.6g}" for x in (c.mean, c.low, c.high)))
        for name, by_model in found.curves.items()
        for model, c in by_model.items()
        for n in range(len(c.mean))
    ]
    return _table(("curve", "model", "second", "mean", "low", "high"), rows)


def as_json(evaluation: Evaluation, found: Found) -> str:
    """Settings and everything that was found."""
    content = {
        "settings": evaluation.settings.model_dump(mode="json"),
        "videos": {model: len(records) for model, records in found.made.items()},
        "figures": [
            {
                "group": figure.group,
                "name": figure.name,
                "better": figure.measure.better,
                "meaning": figure.measure.meaning,
                "models": {
                    row.model: {
                        **_interval(row.own),
                        "difference": None if row.change is None else _interval(row.change),
                    }
                    for row in figure.rows
                },
            }
            for figure in found.figures
        ],
        "latency": {model: values._asdict() for model, values in found.latency.items()},
        "vbench": {
            model: {
                "dimensions": scores,
                "totals": found.totals[model]._asdict() if model in found.totals else None,
            }
            for model, scores in found.vbench.items()
        },
        "answers without a number": found.refused,
    }
    return json.dumps(_finite(content), indent=1) + "\n"


def _interval(d: Difference) -> dict[str, float]:
    return {"mean": d.mean, "low": d.low, "high": d.high}


def _three(d: Difference) -> list[str]:
    return ["" if np.isnan(value) else f"{value:.6g}" for value in (d.mean, d.low, d.high)]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
