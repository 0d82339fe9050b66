"""From a run's record and files to one self-contained page: nothing is fetched, everything is inside."""

from __future__ import annotations

import base64
import io
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from stream_r1 import maps
from stream_r1.demo import figures, measures
from stream_r1.demo.record import Record
from stream_r1.disk.whole import write_text
from stream_r1.drawn_world.measures import MEASURES as EXACT
from stream_r1.pages import LOOK
from stream_r1.pages.report import render

LABELS = {
    "before": "Student before",
    "after": "Student after distillation",
    "teacher": "Teacher, {steps} steps",
    "drawings": "Drawn",
}
_STREAMED = ("before", "after")
_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}
_MAP_COLUMNS = 6


def write_report(record: Record, folder: Path) -> Path:
    """Write ``index.html`` into ``folder`` from ``record`` and its files, leaving out what is missing."""
    write_text(folder / "index.html", render("stream_r1.demo", "report.html.j2", _context(record, folder)))
    return folder / "index.html"


def _context(record: Record, folder: Path) -> dict[str, Any]:
    columns = [name for name in LABELS if record.clips.get(name)]
    labels = {name: _label(name, record) for name in LABELS}
    rows, sheets = _videos(record, folder, columns, labels)
    return {
        "look": Markup(LOOK),
        "headline": "A student learns to stream, in minutes, on a CPU",
        "summary": _summary(record),
        "banner": _banner(record),
        "key": _key_numbers(record),
        "rows": rows,
        "columns": columns,
        "columns_note": _columns_note(columns),
        "sheets": sheets,
        "height": record.size[0],
        "width": record.size[1],
        "fps": record.fps,
        "chunk_frames": record.chunk_frames,
        "charts": _charts(record),
        "steps_note": _steps_note(record),
        "maps": _looks(record, folder),
        "measures": _measures(record),
        "measure_columns": [measures.COLUMNS[name] for name in measures.columns(record)],
        "measures_note": record.evaluated,
        "unsure": _unsure(record),
        "timing": _timing(record),
        "facts": _facts(record),
        "settings": record.settings,
        "written": datetime.now().strftime("%Y-%m-%d %H:%M"),
    }


def _label(name: str, record: Record) -> str:
    return LABELS[name].format(steps=record.teacher_steps or "many")


def _summary(record: Record) -> str:
    seconds = record.stages.get("distilling", 0.0)
    spent = f"{_steps(record)} ({_duration(seconds)})" if record.steps else "No step yet"
    return (
        "A small video diffusion model that needs many steps and sees the whole clip at once is distilled "
        f"into one that needs {_WORDS.get(record.denoising_steps, record.denoising_steps)}, and makes video "
        f"chunk by chunk. {spent} of Stream-R1: distribution matching, weighted by what a reward finds worth "
        "learning, and where."
    )


def _steps(record: Record) -> str:
    count = len(record.steps)
    return "1 student step" if count == 1 else f"{count} student steps"


def _banner(record: Record) -> str | None:
    if record.finished:
        return None
    if record.stopped:
        planned = f" (step {record.critic_steps} of {record.planned_steps})" if record.planned_steps else ""
        return (
            f"This run was stopped after {_steps(record)}{planned}. "
            "Run it again: it continues from here. What it has so far is below."
        )
    return "This run is not finished: what it has so far is below."


def _key_numbers(record: Record) -> list[dict[str, str]]:
    out = []
    if record.timing:
        out.append({"value": f"{record.timing.fps:.0f}", "unit": "fps", "label": "streamed, end to end"})
        out.append(
            {"value": f"{1000 * record.timing.first_frame:.0f}", "unit": "ms", "label": "to the first frame"}
        )
    if record.steps:
        out.append(
            {
                "value": str(len(record.steps)),
                "unit": "",
                "label": f"student steps in {_duration(record.stages.get('distilling', 0.0))}",
            }
        )
    evaluations = [record.evaluations.get(name, {}) for name in _STREAMED]
    if all(evaluation.keys() >= EXACT.keys() for evaluation in evaluations):
        before, after = (
            float(np.mean([evaluation[name].value for name in EXACT])) for evaluation in evaluations
        )
        label = "mean of the exact measures, before → after"
        out.append({"value": f"{before:.2f} → {after:.2f}", "unit": "", "label": label})
    return out


def _videos(
    record: Record, folder: Path, columns: list[str], labels: dict[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows, sheets = [], []
    for prompt in record.prompts:
        videos, pictures = [], []
        for name in columns:
            for clip in record.clips[name]:
                if clip.prompt != prompt or not (folder / clip.video).is_file():
                    continue
                videos.append(
                    {"role": name, "label": labels[name], "data": _base64(playable(folder / clip.video))}
                )
                if clip.sheet and (folder / clip.sheet).is_file():
                    pictures.append(
                        {"label": labels[name], "data": _base64((folder / clip.sheet).read_bytes())}
                    )
        if videos:
            streamed = [video for video in videos if video["role"] in _STREAMED]
            references = [video for video in videos if video["role"] not in _STREAMED]
            rows.append({"prompt": prompt, "videos": streamed, "references": references})
        if pictures:
            sheets.append({"prompt": prompt, "pictures": pictures})
    return rows, sheets


def playable(path: Path) -> bytes:
    """The mp4 with one index and no fragments, in which every browser seeks; nothing is encoded again."""
    import av

    out = io.BytesIO()
    with av.open(str(path)) as source, av.open(out, "w", format="mp4") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    return out.getvalue()


def _columns_note(columns: list[str]) -> str:
    notes = {
        "teacher": "The teacher sees all frames of its short clip at once",
        "drawings": "what is drawn shows the prompt as it is meant, from another start",
    }
    told = [notes[name] for name in columns if name in notes]
    text = "; ".join(told)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _charts(record: Record) -> list[dict[str, Any]]:
    steps = record.steps
    if len(steps) < 2:
        return []
    charts = []
    scores = {axis: [(p.step, p.scores[axis]) for p in steps if axis in p.scores] for axis in record.axes}
    lines = {axis: points for axis, points in scores.items() if len(points) > 1}
    if lines:
        names = ", ".join(f"{axis}: {measures.AXES[axis]}" for axis in lines if axis in measures.AXES)
        charts.append(
            {
                "svg": Markup(figures.curve(lines, ylabel="reward")),
                "caption": f"Scores of the student's rollouts while it learns. {names}. "
                "Thin: each step; thick: running mean.",
            }
        )
    for attribute, label, caption in (
        (
            "generator_loss",
            "DMD loss",
            "The student's weighted loss. Its gradient is normalised: it shows balance rather than progress.",
        ),
        (
            "critic_loss",
            "critic loss",
            "The critic's flow-matching loss: how well it keeps up with what the student makes.",
        ),
        (
            "weight",
            "weight",
            "Mean inter-reliability weight: how much a rollout counts as a whole, by its reward.",
        ),
    ):
        points = [(p.step, value) for p in steps if (value := getattr(p, attribute)) is not None]
        if len(points) > 1:
            charts.append({"svg": Markup(figures.curve({label: points}, ylabel=label)), "caption": caption})
    return charts


def _steps_note(record: Record) -> str:
    parts = [_steps(record)]
    if record.critic_steps:
        parts.append(f"{record.critic_steps} critic steps")
    text = " and ".join(parts) + f" in {_duration(record.stages.get('distilling', 0.0))}"
    if record.step_seconds:
        text += f"; a student step with its critic steps took {record.step_seconds:.2f} s, "
        text += "and the time budget decided how many there were"
    return text + "."


def _looks(record: Record, folder: Path) -> dict[str, Any] | None:
    if not record.maps or not (folder / record.maps).is_file():
        return None
    with np.load(folder / record.maps) as data:
        frames, saliency, weights, scores = (data[k] for k in ("frames", "saliency", "weights", "scores"))
        prompt = str(data["prompt"])
    count = len(frames)
    shown = np.unique(np.linspace(0, count - 1, min(count, _MAP_COLUMNS)).round().astype(int))
    strips = [_strip("Frames", "the student's video", maps.frame_strip(frames[shown]))]
    for axis, values, score in zip(record.axes, saliency, scores, strict=True):
        picture = maps.heat_strip(frames[shown], maps.unit_range(values)[shown])
        note = f"{measures.AXES.get(axis, '')}, score {score:+.2f}".lstrip(", ")
        strips.append(_strip(f"Saliency, {axis}", note, picture))
    picture = maps.heat_strip(frames[shown], maps.unit_range(weights)[shown], cmap="viridis")
    strips.append(_strip("Weights", f"in the loss: {weights.min():.2f} to {weights.max():.2f}", picture))
    return {
        "prompt": prompt,
        "frames": count,
        "strips": strips,
        "profile": Markup(figures.profile_bars(weights.mean((1, 2)).tolist())),
    }


def _strip(name: str, note: str, picture: NDArray[np.uint8]) -> dict[str, str]:
    return {"name": name, "note": note, "data": _base64(maps.png(picture))}


def _measures(record: Record) -> list[dict[str, Any]]:
    columns = measures.columns(record)
    return [
        {"title": title, "rows": [_measure_row(row, columns) for row in rows]}
        for title, rows in measures.groups(record).items()
    ]


def _measure_row(row: measures.Row, columns: list[str]) -> dict[str, Any]:
    better = row.measure.better
    direction = "near the drawings' is better" if better == "near reference" else f"{better} is better"
    shown = ""
    if row.change is not None:
        change, spread = row.change
        arrow = "▲" if change > 0 else "▼" if change < 0 else ""
        shown = f"{arrow} {_number(abs(change))} ± {_number(spread)}".strip()
    cells = [row.values.get(name) for name in columns]
    return {
        "name": row.name,
        "meaning": f"{row.measure.meaning}; {direction}",
        "cells": [
            {"value": _number(cell.value), "spread": f"± {_number(cell.spread)}"}
            if cell
            else {"value": "–", "spread": ""}
            for cell in cells
        ],
        "change": shown,
        "verdict": row.verdict,
    }


def _unsure(record: Record) -> str:
    """Which measures have not moved by more than their spread."""
    rows = [row for rows in measures.groups(record).values() for row in rows if row.change is not None]
    names = [row.name for row in rows if row.verdict == "unsure"]
    if not rows or not names:
        return "Every measure moved by more than twice its spread." if rows else ""
    return f"Not moved by more than twice the spread: {', '.join(names)}."


def _number(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return "–"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f}".replace("-", "−")


def _timing(record: Record) -> dict[str, Any] | None:
    timing = record.timing
    if timing is None:
        return None
    known = timing.text + timing.denoise + timing.cache + timing.decode
    parts = []
    for key, name, seconds in (
        ("text", "prompt", timing.text),
        ("denoise", f"denoising, {record.denoising_steps} passes", timing.denoise),
        ("cache", "cache pass", timing.cache),
        ("decode", "decoding", timing.decode),
        ("rest", "everything else", max(timing.total - known, 0.0)),
    ):
        per_chunk = 1000 * seconds / timing.chunks
        parts.append(
            {
                "key": key,
                "name": name,
                "percent": f"{100 * seconds / timing.total:.2f}",
                "value": f"{per_chunk:.1f} ms a chunk",
            }
        )
    return {
        "parts": parts,
        "sentence": f"{timing.frames} frames in {timing.total:.2f} s: {timing.fps:.1f} frames a second "
        f"end to end, where {record.fps} play in real time. The first frame is there "
        f"{1000 * timing.first_frame:.0f} ms after asking.",
        "note": "One video at a time, after a warm-up. End to end counts everything between asking for the "
        "video and holding its last frame in memory: encoding the prompt, the denoising passes, the pass "
        "that leaves keys and values in the cache, and the decoder. It does not count loading the models or "
        "writing the mp4.",
    }


def _facts(record: Record) -> list[tuple[str, str]]:
    facts = [("recipe", record.recipe), ("seed", str(record.seed)), ("started", record.started)]
    facts += list(record.machine.items())
    facts += [(f"time: {name}", _duration(seconds)) for name, seconds in record.stages.items()]
    facts.append(
        ("time: in all", f"{_duration(sum(record.stages.values()))} (budget {_duration(record.budget)})")
    )
    return facts


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
