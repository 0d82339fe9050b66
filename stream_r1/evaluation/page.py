"""The tables and the page of an evaluation."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch.nn import functional

from stream_r1.demo import figures as drawn
from stream_r1.demo.report import playable
from stream_r1.disk.whole import write_text, written
from stream_r1.evaluation.drift import CURVES
from stream_r1.evaluation.plan import Evaluation
from stream_r1.evaluation.results import GROUPS, Figure, Found, as_csv, as_json, collect, curves_csv
from stream_r1.evaluation.vbench import DIMENSIONS, PUBLISHED
from stream_r1.pages.report import bar, reach, render, short
from stream_r1.sampling.video import VideoWriter
from stream_r1.sampling.video_file import VideoFile

PAGE = "index.html"
_EMBEDDED = 3 << 20  # bytes of a video on the page: a larger one is shown smaller
_SMALLER = 416  # pixels, its longer side


def write_report(evaluation: Evaluation) -> Path:
    """Write results.csv, results.json, curves.csv and index.html from the pieces that are done.

    Returns the page. Raises FileError for a piece's file that can't be read.
    """
    found = collect(evaluation)
    write_text(evaluation.out / "results.csv", as_csv(found))
    write_text(evaluation.out / "results.json", as_json(evaluation, found))
    if found.curves:
        write_text(evaluation.out / "curves.csv", curves_csv(evaluation, found))
    page = render("stream_r1.evaluation", "page.html.j2", _context(evaluation, found))
    write_text(evaluation.out / PAGE, page)
    return evaluation.out / PAGE


def _context(evaluation: Evaluation, found: Found) -> dict[str, Any]:
    settings = evaluation.settings
    copies = f", {settings.videos} videos each" if settings.videos > 1 else ""
    count = len({video.index for video in evaluation.videos})
    return {
        "title": f"Evaluation: {', '.join(settings.models)}",
        "base": settings.base,
        "several": len(settings.models) > 1,
        "prompts": f"{count} prompt{'s' * (count > 1)}{copies}",
        "seconds": f"{settings.seconds:g}",
        "made": {model: len(found.made.get(model, ())) for model in settings.models},
        "asked": len(evaluation.videos),
        "rows": _videos(evaluation),
        "groups": _groups(found, settings.base),
        "charts": _charts(evaluation, found),
        "latency": _latency(found),
        "vbench": _vbench(found),
        "dimensions": [(name, [_percent(s.get(name)) for s in found.vbench.values()]) for name in DIMENSIONS],
        "scored": list(found.vbench),
        "run_vbench": settings.vbench is not None and "vbench" in settings.parts and not found.vbench,
        "refused": found.refused,
        "models": {
            name: _said(model.model_dump(exclude_defaults=True)) for name, model in settings.models.items()
        },
    }


def _said(changed: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in changed.items())


def _groups(found: Found, base: str) -> list[dict[str, Any]]:
    groups = []
    for group, title in GROUPS.items():
        figures = [_figure(figure) for figure in found.figures if figure.group == group]
        if figures:
            groups.append({"name": group, "title": title, "figures": figures})
    return groups


def _figure(figure: Figure) -> dict[str, Any]:
    furthest = reach(row.change for row in figure.rows if row.change is not None)
    better = figure.measure.better
    return {
        "name": figure.name,
        "meaning": figure.measure.meaning,
        "better": "" if better == "near reference" else f"; {better} is better",
        "rows": [
            {
                "model": row.model,
                "mean": short(row.own.mean),
                "own": f"{short(row.own.low)} to {short(row.own.high)}",
                "change": None if row.change is None else bar(row.change, furthest, better),
            }
            for row in figure.rows
        ],
    }


def _charts(evaluation: Evaluation, found: Found) -> list[dict[str, Any]]:
    window, charts = evaluation.settings.window_seconds, []
    for name, by_model in found.curves.items():
        lines = {}
        for model, curve in by_model.items():
            seconds = [(n + 0.5) * window for n in range(len(curve.mean))]
            lines[model] = (seconds, curve.mean.tolist(), curve.low.tolist(), curve.high.tolist())
        charts.append(
            {"svg": Markup(drawn.bands(lines, ylabel=name)), "name": name, "meaning": CURVES[name].meaning}
        )
    return charts


def _latency(found: Found) -> list[dict[str, str]]:
    rows = []
    for model, times in found.latency.items():
        row = {name: f"{1000 * value:.0f}" for name, value in times._asdict().items()}
        row |= {"model": model, "fps": f"{times.fps:.1f}", "stalled": f"{times.stalled:.1f} s"}
        row["missed"] = f"{times.missed:.1%}".replace("%", " %") + f" of {times.chunks}"
        rows.append(row)
    return rows


def _vbench(found: Found) -> list[dict[str, str]]:
    if not found.vbench:
        return []
    rows = [
        {"name": model, "source": "this evaluation"}
        | {name: _percent(value) for name, value in found.totals[model]._asdict().items()}
        for model in found.totals
    ]
    return rows + [
        {
            "name": row.name,
            "total": f"{row.total:.2f}",
            "quality": "–" if row.quality is None else f"{row.quality:.2f}",
            "semantic": "–" if row.semantic is None else f"{row.semantic:.2f}",
            "source": row.source,
        }
        for row in PUBLISHED
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _videos(evaluation: Evaluation) -> list[dict[str, Any]]:
    """For each shown prompt the first video of every model."""
    first = [video for video in evaluation.videos if video.copy == 0]
    count = min(evaluation.settings.shown, len(first))
    rows = []
    for n in range(count):
        video = first[round(n * (len(first) - 1) / max(count - 1, 1))]
        files = {model: evaluation.file(model, video) for model in evaluation.settings.models}
        videos = [
            {"model": model, "data": _embedded(path, evaluation.out / model / "page" / f"{video.stem}.mp4")}
            for model, path in files.items()
            if path.is_file()
        ]
        if videos:
            rows.append({"prompt": video.prompt, "videos": videos})
    return rows


def _embedded(path: Path, smaller: Path) -> str:
    """The mp4 as base64; a large one as a smaller copy of it, which is kept."""
    if path.stat().st_size > _EMBEDDED:
        if not smaller.is_file():
            with (
                VideoFile(path) as file,
                written(smaller) as place,
                VideoWriter(place, float(file.fps), crf=30) as writer,
            ):
                for frames in file.pieces(32):
                    writer.write(_shrunk(frames))
        path = smaller
    return base64.b64encode(playable(path)).decode("ascii")


def _shrunk(frames: torch.Tensor) -> torch.Tensor:
    height, width = frames.shape[2:]
    scale = min(1.0, _SMALLER / max(height, width))
    size = (max(2, 2 * round(height * scale / 2)), max(2, 2 * round(width * scale / 2)))
    return frames if scale == 1 else functional.interpolate(frames, size, mode="area")
